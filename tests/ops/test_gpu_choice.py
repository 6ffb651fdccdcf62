"""Which kernel runs for a CUDA tensor, without a GPU: the kernels say their names."""

import contextlib
import functools
import re
import sys
import types

import pytest
import torch

import fmkernels
from fmkernels import _library, info

SOFT_SORT = _library.OPS["soft_sort"]
SCORES = torch.rand(2, 7)
CUDA_ERROR = _library.cuda_error


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
    monkeypatch.setattr(_library, "cuda_error", lambda _: None)
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


@pytest.fixture
def gpu(kernels, monkeypatch):
    """A GPU whose capability can be set, and the CUDA library beside it."""
    facts = types.SimpleNamespace(capability=(9, 0), library=types.ModuleType("_cuda"))
    facts.library.shared_limits = lambda _: (232_448, 233_472)
    monkeypatch.setattr(_library, "cuda_error", functools.cache(CUDA_ERROR.__wrapped__))
    monkeypatch.setitem(sys.modules, "fmkernels._cuda", facts.library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: facts.capability)
    return facts


def old_driver(_):
    raise RuntimeError("CUDA: CUDA driver version is insufficient for CUDA runtime version")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"capability": (7, 5)}, "needs compute capability 8.0 or later, not 11; this GPU has 7.5"),
        ({"library": None}, "the CUDA library does not load: "),
        ({"probe": old_driver}, "does not run on this GPU: CUDA: CUDA driver version is insuff"),
    ],
    ids=["old GPU", "does not load", "old driver"],
)
def test_a_gpu_that_the_library_does_not_run_on(gpu, monkeypatch, broken, reason):
    assert SOFT_SORT._run_gpu(SCORES) == "cuda"
    assert SOFT_SORT.why_not("cuda") is None
    _library.cuda_error.cache_clear()
    gpu.capability = broken.get("capability", gpu.capability)
    gpu.library.shared_limits = broken.get("probe", gpu.library.shared_limits)
    if "library" in broken:
        monkeypatch.setitem(sys.modules, "fmkernels._cuda", None)  # importing it fails
    assert SOFT_SORT._run_gpu(SCORES) == "triton"
    assert reason in info.collect()["ops"]["soft_sort"]["cuda"]
    monkeypatch.setitem(_library.DEVICE_OF, "cuda", "cpu")
    with fmkernels.backend("cuda"), pytest.raises(RuntimeError, match=re.escape(reason)):
        fmkernels.soft_sort(SCORES)


def test_the_driver_is_asked_once(gpu):
    asked = []
    gpu.library.shared_limits = asked.append
    for _ in range(3):
        SOFT_SORT._run_gpu(SCORES)
    assert len(asked) == 1


def test_a_build_without_nvcc_says_so(monkeypatch):
    if _library.native is None:
        pytest.skip("the whole extension is missing, and that is what is said")
    record = types.ModuleType("fmkernels._build_info")
    record.cuda_reason = "no CUDA compiler ('nvcc' not found) when it was installed"
    monkeypatch.setitem(sys.modules, record.__name__, record)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: None)
    assert _library._why_no_cuda() == record.cuda_reason


def test_a_forced_kernel_that_does_not_take_the_call_is_refused_where_it_runs(kernels):
    kernels["cuda"] = "too long"
    with fmkernels.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot run this"):
        SOFT_SORT._run_gpu(SCORES)


def test_a_forced_kernel_is_compiled_without_asking_the_gpu(kernels, monkeypatch):
    monkeypatch.setattr(_library.Op, "_why_not_anywhere", lambda *_: None)
    monkeypatch.setattr(_library, "cuda_error", lambda _: pytest.fail("it was asked"))
    torch._dynamo.reset()
    compiled = torch.compile(fmkernels.soft_sort, fullgraph=True, backend="eager")
    with fmkernels.backend("cuda"):
        values, _ = compiled(SCORES)
    assert torch.equal(values, fmkernels.soft_sort(SCORES)[0])
