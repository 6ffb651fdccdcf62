"""Which kernel runs for a CUDA tensor, without a GPU: the kernels say their names."""

import contextlib
import sys
import types

import pytest
import torch

import fmkernels
from fmkernels import _library

SOFT_SORT = _library.OPS["soft_sort"]
SCORES = torch.rand(2, 7)


@pytest.fixture
def kernels(monkeypatch):
    """A CUDA and a Triton kernel that are there; their limits can be set."""
    limits = dict.fromkeys(("cuda", "triton"))
    found = []
    for name in limits:
        module = types.ModuleType(f"{name}_kernel")
        module.soft_sort = lambda *_, name=name: name
        monkeypatch.setitem(sys.modules, module.__name__, module)
        limit = lambda *_, name=name: limits[name]  # noqa: E731
        found.append(_library.GpuKernel(name, module.__name__, limit))
    monkeypatch.setattr(SOFT_SORT, "gpu", found)
    monkeypatch.setattr(_library, "GPU_ERRORS", dict.fromkeys(limits))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return limits


def test_the_order_is_that_of_the_record():
    for op in _library.OPS.values():
        assert [name for name in _library.GPU_ORDER if name in op.gpu_kernels] == [*op.gpu_kernels]


@pytest.mark.parametrize(
    ("backend", "chosen"),
    [("auto", "cuda"), ("cuda", "cuda"), ("triton", "triton"), ("cpp", "cuda")],
)
def test_a_forced_kernel_runs_and_any_other_choice_means_the_fastest(kernels, backend, chosen):
    with fmkernels.backend(backend):
        assert SOFT_SORT._run_gpu(SCORES) == chosen


def test_what_one_kernel_does_not_take_goes_to_the_next(kernels):
    kernels["cuda"] = "too long"
    assert SOFT_SORT._run_gpu(SCORES) == "triton"
    kernels["triton"] = "too long"
    values, permutation = SOFT_SORT._run_gpu(SCORES)
    assert torch.equal(values, torch.ops.fmkernels.soft_sort_reference(SCORES)[0])
    assert permutation.shape == (2, 7, 7)


def test_a_kernel_that_is_missing_is_passed_over(kernels):
    _library.GPU_ERRORS["cuda"] = "not built"
    assert SOFT_SORT._run_gpu(SCORES) == "triton"


def test_a_build_without_nvcc_says_so(monkeypatch):
    if _library.native is None:
        pytest.skip("the whole extension is missing, and that is what is said")
    record = types.ModuleType("fmkernels._build_info")
    record.cuda_reason = "no CUDA compiler ('nvcc' not found) when it was installed"
    monkeypatch.setitem(sys.modules, record.__name__, record)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    assert _library._why_no_cuda() == record.cuda_reason
