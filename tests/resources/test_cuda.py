"""The gate: every CUDA kernel of the built library, on every architecture, within its budget."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")  # for its cuobjdump

from budgets import BLOCKS, BUDGETS, SHARED, matrix_violations, violations
from resource_usage import CUOBJDUMP, resource_usage

from fmkernels.ops.soft_sort.config import MAX_CUDA_SIZE, RESERVED_BYTES
from fmkernels.ops.soft_sort.networks import NETWORKS, sorts
from fmkernels.ops.soft_sort.reference import DISTRIBUTIONS

ROOT = Path(__file__).parents[2]
KERNELS = {name for name in BUDGETS if name.endswith("_cuda")}

BREAKS_IT = """
extern "C" __global__ void soft_sort_fwd_cuda(float* x, int i) {
  float local[64];
  for (int k = 0; k < 64; ++k) local[k * i % 64] = x[k];
  x[0] = local[i];
}
"""


def named(mangled):
    """The budget's name in a mangled one."""
    (name,) = (kernel for kernel in KERNELS if kernel in mangled)
    return name


def library():
    """The path of the CUDA library, which is there wherever it can be built."""
    spec = importlib.util.find_spec("fmkernels._cuda")
    if spec is not None:
        return spec.origin
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        pytest.skip("needs nvcc, and there is none")
    pytest.fail("there is nvcc, but no CUDA library: python setup.py build_ext --inplace")


@pytest.fixture(scope="module")
def kernels():
    return resource_usage(library())


@pytest.fixture(scope="module")
def cuda():
    """What surrounds a launch."""
    library()
    return importlib.import_module("fmkernels.ops.soft_sort.cuda")


@pytest.mark.parametrize(
    ("nvcc", "outcome"), [(None, pytest.skip.Exception), ("/bin/nvcc", pytest.fail.Exception)]
)
def test_a_library_that_is_missing_is_a_failure_where_there_is_nvcc(monkeypatch, nvcc, outcome):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: nvcc)
    with pytest.raises(outcome):
        library()


def test_every_kernel_is_there_for_every_architecture(kernels):
    for kernel in KERNELS:
        assert {arch for arch, name, _ in kernels if kernel in name} == {*SHARED}


def test_within_budget(kernels):
    found = []
    for architecture, mangled, used in kernels:
        found += violations(named(mangled), architecture, used)
    assert found == []


@pytest.fixture(scope="module")
def entries():
    """The PTX of every kernel."""
    command = [CUOBJDUMP, "--dump-ptx", library()]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ptx.split(".entry ")[1:]


def test_matrix_instructions(entries):
    found = []
    for entry in entries:
        found += matrix_violations(named(entry), "compute_120", entry)
    assert found == []


def test_the_shift_of_a_comparator_is_a_product_of_its_own(entries):
    """``mul.rn`` is never fused with an addition; what is only ``mul`` may be."""
    assert {name for name in KERNELS for entry in entries if name in entry} == KERNELS
    for entry in entries:
        assert entry.count("mul.rn.f32") >= len(DISTRIBUTIONS)


def test_a_launch_reports_its_own_error():
    """The last error may be that of a call before it."""
    for source in (ROOT / "csrc" / "cuda").iterdir():
        assert not {"<<<", "cudaGetLastError"} & set(re.findall(r"<<<|\w+", source.read_text()))


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("kernel", BLOCKS)
def test_shared_memory_of_a_launch(cuda, kernel, architecture):
    has, allowed = SHARED[architecture], BLOCKS[kernel][architecture]
    loss, forward = "cross_entropy" in kernel, "fwd" in kernel
    plan = cuda.plan_within(has, 31_360, 49, "bitonic", loss, not forward)
    assert (plan.shared_bytes, plan.blocks_per_sm) == allowed
    assert plan.shared_bytes <= has.of_a_block
    assert plan.blocks_per_sm * (plan.shared_bytes + RESERVED_BYTES) <= has.of_a_multiprocessor


def test_every_cuda_kernel_has_a_block():
    assert BLOCKS.keys() == KERNELS


GPUS = {
    "A100": "sm_80",
    "H100, H200": "sm_90a",
    "B200": "sm_100",
    "RTX 50": "sm_120",
}


def largest(cuda, architecture, network):
    """Up to how many values a block holds a query of the loss with its gradient."""
    fits = {
        n: cuda.plan_within(SHARED[architecture], 1, n, network, True, True) is not None
        for n in range(1, MAX_CUDA_SIZE + 1)
        if sorts(network, n)
    }
    most = max(n for n, yes in fits.items() if yes)
    assert all(yes for n, yes in fits.items() if n <= most)
    return most


def test_the_documented_limits_are_those_of_the_blocks(cuda):
    documented = (ROOT / "docs" / "backends.md").read_text()
    for name, architecture in GPUS.items():
        sizes = (str(largest(cuda, architecture, network)) for network in NETWORKS)
        kilobytes = SHARED[architecture].of_a_block // 1024
        assert f"| {name} | {kilobytes} KB | {' | '.join(sizes)} |" in documented


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_violation_names_kernel_architecture_and_numbers(tmp_path):
    (tmp_path / "kernel.cu").write_text(BREAKS_IT)
    command = ["nvcc", "-cubin", "-arch=sm_80", tmp_path / "kernel.cu", "-o", tmp_path / "kernel"]
    subprocess.run(command, check=True, capture_output=True)
    ((_, mangled, used),) = resource_usage(tmp_path / "kernel")
    assert used.stack_bytes >= 256
    found = violations(named(mangled), "sm_80", used)
    assert f"soft_sort_fwd_cuda on sm_80: stack_bytes: {used.stack_bytes} used, 0 allowed" in found
