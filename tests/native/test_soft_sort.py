"""Whole rows at every lane count against the Python reference, without torch's ops in between.

A scalar is what a CUDA thread will compute with; 64 bytes is the AVX-512 build, here on whatever
registers the machine has. Scratch and outputs start as NaN.
"""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmkernels.ops.soft_sort import reference
from fmkernels.ops.soft_sort.networks import NETWORKS, sorts
from fmkernels.ops.soft_sort_cross_entropy import reference as cross_entropy_reference
from fmkernels.testing import assert_parity

ART_LAMBDA = 0.25
LARGE = np.float32(1e30).item()
REGISTER_BYTES = (0, 16, 32, 64)
PROBLEMS = [(1, 1), (1001, 2), (501, 3), (203, 7), (35, 16), (33, 17), (17, 33)]  # queries, n
every_distribution = pytest.mark.parametrize("distribution", reference.DISTRIBUTIONS)


def make(queries, n, dtype):
    """Student, teacher, mask, gradient of the values, gradient of the permutation."""
    rng = np.random.default_rng((queries, n))
    student, teacher = (0.15 * rng.normal(size=(2, queries, n))).astype(dtype)
    mask = (rng.integers(0, 3, queries) / 2).astype(dtype)
    grads = rng.normal(size=(queries, n)), rng.normal(size=(queries, n, n))
    return student, teacher, mask, *(grad.astype(dtype) for grad in grads)


def run(native, register_bytes, arrays, steepness, network, distribution):
    student, teacher, mask, grad_values, grad_permutation = arrays
    settings = (register_bytes, steepness, network, distribution, ART_LAMBDA)
    results = [
        *native.soft_sort(student, *settings),
        native.soft_sort_backward(grad_values, grad_permutation, student, *settings),
        *native.cross_entropy(student, teacher, mask, *settings),
    ]
    return [torch.from_numpy(result) for result in results]


def run_reference(arrays, dtype, steepness, network, distribution):
    arrays = [torch.from_numpy(array).to(dtype) for array in arrays]
    student, teacher, mask, grad_values, grad_permutation = arrays
    settings = (steepness, network, distribution, ART_LAMBDA)
    return [
        *reference.soft_sort(student, *settings),
        reference.soft_sort_backward(grad_values, grad_permutation, student, *settings),
        *cross_entropy_reference.soft_sort_cross_entropy(
            student, teacher, mask, steepness, *settings, "none"
        ),
    ]


def bitwise_equal(a, b):
    return np.array_equal(a.numpy(), b.numpy(), equal_nan=True)


@every_distribution
@pytest.mark.parametrize("network", NETWORKS)
def test_agrees_with_the_reference(native, network, distribution):
    settings = (20.0, network, distribution)
    for queries, n in PROBLEMS:
        arrays = make(queries, n, np.float32)
        same_dtype = run_reference(arrays, torch.float32, *settings)
        exact = run_reference(arrays, torch.float64, *settings)
        doubles = [array.astype(np.float64) for array in arrays]
        for size in REGISTER_BYTES:
            actual = run(native, size, arrays, *settings)
            for index, compared in enumerate(zip(actual, same_dtype, exact, strict=True)):
                assert_parity(*compared, name=f"result {index} of {queries} × {n} at {size} bytes")
            for a, b in zip(run(native, size, doubles, *settings), exact, strict=True):
                # some 10⁴ roundings of 10⁻¹⁶, more where near ties magnify them
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_distribution
@pytest.mark.parametrize("network", NETWORKS)
def test_the_cuda_kernels_agree_with_the_reference(native, network, distribution):
    """Their algorithm, run by shuffled threads: what a GPU then adds is only its own arithmetic."""
    settings = (20.0, network, distribution)
    for queries, n in PROBLEMS:
        arrays = make(queries, n, np.float32)
        same_dtype = run_reference(arrays, torch.float32, *settings)
        exact = run_reference(arrays, torch.float64, *settings)
        for rows in {n, (n + 1) // 2, min(n, 5)}:
            found = native.by_block(*arrays, rows, 20.0, *settings, ART_LAMBDA, 0)
            *actual, only_losses = (torch.from_numpy(result) for result in found)
            assert bitwise_equal(actual[3], only_losses)
            for index, compared in enumerate(zip(actual, same_dtype, exact, strict=True)):
                assert_parity(*compared, name=f"result {index} of {queries} × {n}, {rows} rows")


def test_the_cuda_kernels_offsets_are_64_bit(native):
    arrays = make(3, 33, np.float32)
    settings = (17, 20.0, 20.0, "bitonic", "cauchy", ART_LAMBDA)
    for a, b in zip(
        native.by_block(*arrays, *settings, 0),
        native.by_block(*arrays, *settings, 2**31),
        strict=True,
    ):
        assert bitwise_equal(torch.from_numpy(a), torch.from_numpy(b))


@every_distribution
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_lane_count_does_not_matter(native, dtype, distribution):
    arrays = make(35, 17, dtype)
    settings = (20.0, "bitonic", distribution)
    narrow = run(native, 16, arrays, *settings)
    for size in (32, 64):
        for a, b in zip(run(native, size, arrays, *settings), narrow, strict=True):
            assert bitwise_equal(a, b)


@every_distribution
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_lanes_do_not_mix(native, register_bytes, distribution, bad):
    arrays = make(35, 9, np.float32)
    settings = (20.0, "odd_even_merge", distribution)
    clean = run(native, register_bytes, arrays, *settings)
    arrays[0][5, 3] = arrays[1][21, 0] = bad
    dirty = run(native, register_bytes, arrays, *settings)
    others = ~np.isin(np.arange(35), (5, 21))
    for a, b in zip(clean, dirty, strict=True):
        assert bitwise_equal(a[others], b[others])
    assert not dirty[1][5].isfinite().all()


def test_the_order_of_the_queries_does_not_matter(native, register_bytes):
    arrays = make(35, 9, np.float32)
    order = np.random.default_rng(0).permutation(35)
    settings = (20.0, "bitonic", "cauchy")
    results = run(native, register_bytes, arrays, *settings)
    moved = run(native, register_bytes, [a[order].copy() for a in arrays], *settings)
    for a, b in zip(results, moved, strict=True):
        assert bitwise_equal(a[order], b)


@every_distribution
def test_any_finite_scores_give_finite_results(native, distribution):
    value = st.floats(-LARGE, LARGE, width=32) | st.sampled_from([0.0, -0.0, 1e-10, 0.1, 0.1000001])
    rows = st.integers(1, 20).flatmap(lambda n: hnp.arrays(np.float32, (2, 5, n), elements=value))

    @given(
        rows,
        st.sampled_from(NETWORKS),
        st.sampled_from([0.0, 1e-30, 1.0, 100.0, 1e6]),
        st.sampled_from(REGISTER_BYTES),
    )
    def fuzz(rows, network, steepness, register_bytes):
        n = rows.shape[-1]
        assert sorts(network, n)
        ones = np.ones((5, n, n), np.float32)
        arrays = (*(row.copy() for row in rows), ones[:, 0, 0].copy(), ones[:, 0].copy(), ones)
        values, permutation, grad, losses, grad_student = run(
            native, register_bytes, arrays, steepness, network, distribution
        )
        for result in (permutation, losses, grad_student):
            assert result.isfinite().all()
        assert (permutation >= 0).all()
        for dim in (-1, -2):
            torch.testing.assert_close(permutation.sum(dim=dim), torch.ones(5, n))
        assert values.isfinite().all()
        assert grad.isfinite().all()
        assert (losses >= 0).all()

    fuzz()
