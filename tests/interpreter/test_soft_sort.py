"""The Triton kernels in Triton's interpreter, on the CPU. tests/test_lanes.py starts these."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fmkernels.ops.soft_sort import DISTRIBUTIONS, reference
from fmkernels.ops.soft_sort import triton as soft_sort
from fmkernels.ops.soft_sort.networks import NETWORKS, sorts
from fmkernels.ops.soft_sort_cross_entropy import reference as loss_reference
from fmkernels.ops.soft_sort_cross_entropy import triton as loss_kernel
from fmkernels.testing import assert_parity

SMALL = [
    *(("bitonic", 7, distribution) for distribution in DISTRIBUTIONS),
    *((network, 9, "cauchy") for network in NETWORKS),
    ("odd_even", 2, "reciprocal"),
    ("bitonic", 1, "cauchy"),
]
LARGE = [
    ("odd_even_merge", 22, "gaussian"),
    ("reflected_bitonic", 33, "logistic"),
    ("bitonic", 49, "cauchy"),
]
CASES = [(*case, torch.float32) for case in SMALL + LARGE]
CASES += [(*case, torch.float16) for case in SMALL]


def queries(n):
    """For small n one more than the programs of a launch: its scratch is used a second time."""
    return 5 if n < 20 else 2


def scores(count, n, dtype=torch.float32):
    return (0.15 * torch.randn(count, n)).to(dtype)


def sort_everything(module, x, grad_values, grad_permutation, *settings):
    values, permutation = module.soft_sort(x, *settings)
    grad = module.soft_sort_backward(grad_values, grad_permutation, x, *settings)
    return {"values": values, "permutation": permutation, "grad": grad}


def check(found, same_dtype, exact):
    for name, tensor in found.items():
        assert tensor.dtype == same_dtype[name].dtype
        assert_parity(tensor, same_dtype[name], exact[name], name=name)


@pytest.mark.parametrize(("network", "n", "distribution", "dtype"), CASES)
def test_sort_has_parity(network, n, distribution, dtype):
    arguments = (100.0, network, distribution, 0.25)
    x, grad_values = scores(queries(n), n, dtype), scores(queries(n), n, dtype)
    grad_permutation = torch.randn(queries(n), n, n).to(dtype)
    tensors = (x, grad_values, grad_permutation)
    found = sort_everything(soft_sort, *tensors, *arguments)
    same_dtype = sort_everything(reference, *tensors, *arguments)
    exact = sort_everything(reference, *(tensor.double() for tensor in tensors), *arguments)
    check(found, same_dtype, exact)


def loss_and_gradient(module, *arguments):
    loss, grad = module.soft_sort_cross_entropy(*arguments)
    return {"loss": loss, "grad": grad}


@pytest.mark.parametrize(("network", "n", "distribution", "dtype"), CASES)
def test_loss_has_parity(network, n, distribution, dtype):
    x, y = scores(queries(n), n, dtype), scores(queries(n), n, dtype)
    arguments = (None, 50.0, 100.0, network, distribution, 0.25, "mean")
    found = loss_and_gradient(loss_kernel, x, y, *arguments)
    same_dtype = loss_and_gradient(loss_reference, x, y, *arguments)
    exact = loss_and_gradient(loss_reference, x.double(), y.double(), *arguments)
    found["grad"] = found["grad"].to(same_dtype["grad"].dtype)
    check(found, same_dtype, exact)
    assert torch.equal(loss_kernel.soft_sort_cross_entropy_loss(x, y, *arguments), found["loss"])


@pytest.mark.parametrize("reduction", loss_reference.REDUCTIONS)
def test_masks_and_reductions(reduction):
    x, y = scores(6, 9).view(2, 3, 9), scores(6, 9).view(2, 3, 9)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]])
    for weights in (None, mask, torch.zeros(2, 3)):
        arguments = (weights, 100.0, None, "bitonic", "cauchy", 0.25, reduction)
        found = loss_and_gradient(loss_kernel, x, y, *arguments)
        same_dtype = loss_and_gradient(loss_reference, x, y, *arguments)
        check(
            found, same_dtype, loss_and_gradient(loss_reference, x.double(), y.double(), *arguments)
        )


def test_either_gradient_may_be_missing():
    x, grad_values, grad_permutation = scores(3, 7), scores(3, 7), torch.randn(3, 7, 7)
    both = soft_sort.soft_sort_backward(grad_values, grad_permutation, x)
    apart = soft_sort.soft_sort_backward(grad_values, None, x)
    apart = apart + soft_sort.soft_sort_backward(None, grad_permutation, x)
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_any_strides(layout):
    x = {
        "sliced": torch.randn(4, 14)[:, ::2],
        "transposed": torch.randn(7, 4).T,
        "expanded": torch.randn(7).expand(4, 7),
    }[layout]
    for found, expected in zip(
        soft_sort.soft_sort(x), soft_sort.soft_sort(x.contiguous()), strict=True
    ):
        assert torch.equal(found, expected)
    grad = x.unsqueeze(-1).expand(4, 7, 7)
    assert torch.equal(
        soft_sort.soft_sort_backward(x, grad, x),
        soft_sort.soft_sort_backward(x.contiguous(), grad.contiguous(), x.contiguous()),
    )


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_query_does_not_leak(bad):
    x, y = scores(6, 9), scores(6, 9)
    arguments = (None, 100.0, None, "bitonic", "cauchy", 0.25, "none")
    clean = loss_and_gradient(loss_kernel, x, y, *arguments)
    x[1, 4] = bad
    found = loss_and_gradient(loss_kernel, x, y, *arguments)
    others = [0, 2, 3, 4, 5]
    for name in found:
        assert torch.equal(found[name][others], clean[name][others])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's
def test_extreme_scores_are_finite(distribution):
    x = torch.cat([scale * torch.randn(1, 9) for scale in (1e-30, 1e-3, 1e10, 1e30)])
    for steepness in (0.0, 1e6):
        arguments = (None, steepness, None, "bitonic", distribution, 0.25, "none")
        found = loss_and_gradient(loss_kernel, x, x.flip(0), *arguments)
        assert all(tensor.isfinite().all() for tensor in found.values())


def test_empty_batches():
    x = torch.zeros(0, 7)
    assert soft_sort.soft_sort(x)[1].shape == (0, 7, 7)
    assert soft_sort.soft_sort_backward(x, None, x).shape == (0, 7)
    assert loss_kernel.soft_sort_cross_entropy(x, x, reduction="sum")[0] == 0


@settings(max_examples=10)
@given(st.integers(1, 20), st.sampled_from(NETWORKS), st.sampled_from(DISTRIBUTIONS))
def test_rows_of_the_permutation_sum_to_one(n, network, distribution):
    if not sorts(network, n):
        network = "odd_even"
    _, permutation = soft_sort.soft_sort(scores(2, n), 30.0, network, distribution)
    for dim in (-1, -2):
        torch.testing.assert_close(permutation.sum(dim), torch.ones(2, n), atol=1e-5, rtol=0)
