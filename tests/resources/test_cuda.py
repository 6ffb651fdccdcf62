"""The gate: every CUDA kernel of the built library, on every architecture, within its budget."""

import importlib.util
import shutil
import subprocess

import pytest

pytest.importorskip("triton")  # for its cuobjdump

from budgets import BUDGETS, violations
from resource_usage import resource_usage

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100", "sm_120"}
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


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.find_spec("fmkernels._cuda")
    if spec is None:
        pytest.skip("the CUDA library was not built")
    return resource_usage(spec.origin)


def test_every_kernel_is_there_for_every_architecture(kernels):
    for kernel in KERNELS:
        assert {arch for arch, name, _ in kernels if kernel in name} == ARCHITECTURES


def test_within_budget(kernels):
    found = []
    for architecture, mangled, used in kernels:
        found += violations(named(mangled), architecture, used)
    assert found == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_violation_names_kernel_architecture_and_numbers(tmp_path):
    (tmp_path / "kernel.cu").write_text(BREAKS_IT)
    command = ["nvcc", "-cubin", "-arch=sm_80", tmp_path / "kernel.cu", "-o", tmp_path / "kernel"]
    subprocess.run(command, check=True, capture_output=True)
    ((_, mangled, used),) = resource_usage(tmp_path / "kernel")
    assert used.stack_bytes >= 256
    found = violations(named(mangled), "sm_80", used)
    assert f"soft_sort_fwd_cuda on sm_80: stack_bytes: {used.stack_bytes} used, 0 allowed" in found
