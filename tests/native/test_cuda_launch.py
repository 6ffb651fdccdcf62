"""What Python hands to the CUDA library, without a GPU: the kernels' algorithm runs on the addresses."""

import ctypes
import functools
import math
import types

import numpy as np
import pytest
import torch

pytest.importorskip("fmkernels._cuda")

from cases import tuple_of

from fmkernels.ops.soft_sort import cuda, reference
from fmkernels.ops.soft_sort.config import BlockPlan
from fmkernels.ops.soft_sort_cross_entropy import cuda as cross_entropy
from fmkernels.ops.soft_sort_cross_entropy import reference as cross_entropy_reference
from fmkernels.testing import assert_parity

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

    def run(self, launch, table, sort, teacher_steepness=0.0, **arrays):
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
        settings = (rows, steepness, teacher_steepness, SETTINGS[1], name, art_lambda, 0)
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
        arrays = {"teacher": array(teacher, queries, n), "weights": array(weights, queries)}
        found = self.run(launch, table, sort, teacher_steepness, **arrays)
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


def check(function, reference, *args):
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    results = (function(*args), reference(*args), reference(*wide))
    for actual, same_dtype, exact in zip(*map(tuple_of, results), strict=True):
        assert actual.dtype == same_dtype.dtype
        assert_parity(actual, same_dtype, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(600, 9), (2, 300, 9)])
def test_soft_sort(on_the_cpu, shape, dtype):
    scores = torch.rand(*shape, dtype=dtype).mT.contiguous().mT
    check(cuda.soft_sort, reference.soft_sort, scores, *SETTINGS)
    for grad_values in (torch.rand(shape, dtype=dtype), None):
        for grad_permutation in (torch.rand(*shape, 9, dtype=dtype).mT, None):
            grads = (grad_values, grad_permutation)
            check(cuda.soft_sort_backward, reference.soft_sort_backward, *grads, scores, *SETTINGS)


def test_no_row_and_a_row_alone(on_the_cpu):
    scores = torch.rand(1, 9)
    runs = (cuda.soft_sort(x, *SETTINGS) for x in (scores, scores[0]))
    for whole, alone in zip(*runs, strict=True):
        assert torch.equal(whole[0], alone)
    assert [x.shape for x in cuda.soft_sort(scores[:0])] == [(0, 9), (0, 9, 9)]
    assert cuda.soft_sort_backward(None, None, scores[:0]).shape == (0, 9)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("teacher_steepness", [None, 50.0])
def test_cross_entropy(on_the_cpu, teacher_steepness, masked, reduction):
    student, teacher = torch.rand(2, 9, 600).mT.unbind()
    mask = torch.tensor([1.0, 0.0, 0.5]).repeat(200) if masked else None
    settings = (SETTINGS[0], teacher_steepness, *SETTINGS[1:], reduction)
    for name in ("soft_sort_cross_entropy", "soft_sort_cross_entropy_loss"):
        functions = (getattr(module, name) for module in (cross_entropy, cross_entropy_reference))
        check(*functions, student, teacher, mask, *settings)
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
