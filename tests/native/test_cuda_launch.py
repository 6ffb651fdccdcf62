"""What Python hands to the CUDA library, without a GPU: the kernels' algorithm runs on the addresses."""

import ctypes
import functools
import math
import types

import numpy as np
import pytest
import torch

pytest.importorskip("fmkernels._cuda")

from fmkernels.ops.soft_sort import cuda, reference
from fmkernels.ops.soft_sort.config import BlockPlan
from fmkernels.ops.soft_sort_cross_entropy import cuda as cross_entropy
from fmkernels.ops.soft_sort_cross_entropy import reference as cross_entropy_reference

SETTINGS = (20.0, "odd_even_merge", "logistic", 0.25)
LAUNCH = BlockPlan(grid=6, threads=64, rows=4, shared_bytes=0, blocks_per_sm=1)


def array(address, *shape):
    numbers = (ctypes.c_float * math.prod(shape)).from_address(address)
    return np.ctypeslib.as_array(numbers).reshape(shape)


class OnTheCpu:
    """The CUDA library's launchers, by the native test module's threads."""

    plan = staticmethod(cuda._cuda.plan)

    def __init__(self, native):
        self.native = native

    def run(self, launch, table, sort, **arrays):
        n, comparators, tape, rows, *_ = launch
        queries, distribution, steepness, art_lambda, scores = sort
        plan = cuda.packed(SETTINGS[1], n)
        assert ctypes.string_at(table, len(plan)) == plan
        assert (comparators, tape) == cuda.sizes(SETTINGS[1], n)
        zeros = {
            "teacher": np.zeros((queries, n), np.float32),
            "weights": np.ones(queries, np.float32),
            "grad_values": np.zeros((queries, n), np.float32),
            "grad_permutation": np.zeros((queries, n, n), np.float32),
        }
        inputs = [arrays.get(name, zero) for name, zero in zeros.items()]
        name = reference.DISTRIBUTIONS[distribution]
        settings = (rows, steepness, SETTINGS[1], name, art_lambda, 0)
        return self.native.by_block(array(scores, queries, n), *inputs, *settings)

    def soft_sort(self, launch, table, sort, values, permutation):
        n, queries = launch[0], sort[0]
        found = self.run(launch, table, sort)
        array(values, queries, n)[:], array(permutation, queries, n, n)[:] = found[:2]

    def soft_sort_backward(self, launch, table, sort, grad_values, grad_permutation, grad_scores):
        n, queries = launch[0], sort[0]
        arrays = {}
        if grad_values:
            arrays["grad_values"] = array(grad_values, queries, n)
        if grad_permutation:
            arrays["grad_permutation"] = array(grad_permutation, queries, n, n)
        array(grad_scores, queries, n)[:] = self.run(launch, table, sort, **arrays)[2]

    def soft_sort_cross_entropy(
        self, launch, table, sort, teacher, teacher_steepness, weights, losses, grad
    ):
        n, queries = launch[0], sort[0]
        assert teacher_steepness == sort[2]  # all that by_block() has
        found = self.run(
            launch, table, sort, teacher=array(teacher, queries, n), weights=array(weights, queries)
        )
        array(losses, queries)[:] = found[3]
        if grad:
            array(grad, queries, n)[:] = found[4]


@pytest.fixture
def launched(monkeypatch):
    """Launches are planned and get a stream, on the CPU."""
    monkeypatch.setattr(cuda, "plan", lambda *_: LAUNCH)
    monkeypatch.setattr(cuda, "on_device", functools.cache(cuda.on_device))  # outlives the launch
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)


@pytest.fixture
def on_the_cpu(native, launched, monkeypatch):
    for module in (cuda, cross_entropy):
        monkeypatch.setattr(module, "_cuda", OnTheCpu(native))


def close(actual, expected):
    """The numbers are in their places; test_soft_sort.py holds them to the parity rule."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(6, 9), (2, 3, 9), (0, 9), (9,)])
def test_soft_sort(on_the_cpu, shape, dtype):
    scores = torch.rand(*shape, dtype=dtype)
    if scores.ndim > 1:
        scores = scores.mT.contiguous().mT
    close(cuda.soft_sort(scores, *SETTINGS), reference.soft_sort(scores, *SETTINGS))
    for grad_values in (torch.rand(shape, dtype=dtype), None):
        for grad_permutation in (torch.rand(*shape, 9, dtype=dtype).mT, None):
            args = (grad_values, grad_permutation, scores, *SETTINGS)
            if dtype == torch.float32:
                actual = cuda.soft_sort_backward(*args)
                close([actual], [reference.soft_sort_backward(*args)])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy(on_the_cpu, reduction, masked):
    student, teacher = torch.rand(2, 9, 3).mT.unbind()
    mask = torch.tensor([1.0, 0.0, 0.5]) if masked else None
    args = (student, teacher, mask, SETTINGS[0], None, *SETTINGS[1:], reduction)
    expected = cross_entropy_reference.soft_sort_cross_entropy(*args)
    close(cross_entropy.soft_sort_cross_entropy(*args), expected)
    close([cross_entropy.soft_sort_cross_entropy_loss(*args)], expected[:1])
    with pytest.raises(ValueError, match="teacher"):
        cross_entropy.soft_sort_cross_entropy(student, teacher[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch")
def test_the_library_takes_what_it_is_handed(launched):
    """Its own parsing; a machine without a driver then says so."""
    scores = torch.rand(6, 9)
    for call in (
        lambda: cuda.soft_sort(scores, *SETTINGS),
        lambda: cuda.soft_sort_backward(scores, None, scores, *SETTINGS),
        lambda: cross_entropy.soft_sort_cross_entropy(scores, scores),
        lambda: cross_entropy.soft_sort_cross_entropy_loss(scores, scores),
    ):
        with pytest.raises(RuntimeError, match="CUDA: "):
            call()
    with pytest.raises(RuntimeError, match="CUDA: "):
        cuda._cuda.shared_limits(0)
