"""The gate: every Triton kernel compiled for every architecture, within its budget; no GPU needed."""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton_knn
import triton_projection
import triton_vera
import triton_vera_matrices
from budgets import BUDGETS, matrix_violations, violations
from resource_usage import Resources
from triton_aot import resources
from triton_sort import BY_NAME, POINTERS, compile_for

from fmkernels import _library
from fmkernels.ops.soft_sort import DISTRIBUTIONS, reference
from fmkernels.ops.soft_sort.config import MAX_TRITON_SIZE, Config

CAPABILITIES = (80, 90, 100)

CASES = [{"n": n} for n in (16, 32, 49, 128, 256)]
CASES += [{"n": 49, "distribution": name} for name in DISTRIBUTIONS if name != "cauchy"]
CASES += [{"n": 49, "dtype": dtype} for dtype in (torch.float16, torch.bfloat16)]
CASES += [{"n": 49, "queries": 7}, *({"n": n, "queries": 7, "aligned": False} for n in (64, 255))]
"""Multiples of 16 and others, of what a launch tells the compiler."""


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BY_NAME)
def test_within_budget(name, capability):
    found = []
    for case in CASES:
        kernel, where = compile_for(name, capability, **case), f"sm_{capability}, {case}"
        found += violations(name, where, resources(kernel))
        found += matrix_violations(name, where, kernel.asm["ptx"])
    assert found == []


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("n", [1, 2])
def test_compiles_with_every_integer_at_one(name, n):
    compile_for(name, 90, n, queries=1)  # of two values the network has one layer


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_compiled_is_what_is_launched(name):
    def multiples_of_16(**case):
        ir = compile_for(name, 90, **case).asm["ttir"]
        return set(re.findall(r"%(\w+): \S+ \{tt.divisibility = 16 : i32\}", ir))

    inputs = {"p_scores", "p_student", "p_teacher", "p_grad_values", "p_grad_permutation"}
    pointers = {*POINTERS[BY_NAME[name]].split(), "p_network", "p_workspace"}
    assert multiples_of_16(n=64) == pointers | {"queries", "n", "slot"}
    assert multiples_of_16(n=49, queries=7) == pointers | {"slot"}
    assert multiples_of_16(n=64, queries=7, aligned=False) == pointers - inputs | {"n", "slot"}


def test_matrix_instructions_are_found_and_missed(monkeypatch):
    name = "soft_sort_fwd_kernel"
    wgmma = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1;"
    told = f"{name} on sm_90: matrix instructions: wgmma found, none wanted"
    assert matrix_violations(name, "sm_90", wgmma) == [told]
    budget = BUDGETS[name]._replace(matrix_instructions=("mma",))
    monkeypatch.setitem(BUDGETS, name, budget)
    assert matrix_violations(name, "sm_80", "mma.sync.aligned.m16n8k16") == []
    told = f"{name} on sm_80: matrix instructions: none found, mma wanted"
    assert matrix_violations(name, "sm_80", "fma.rn.f32 %f1") == [told]


def test_every_kernel_has_a_budget():
    kernels = BY_NAME.keys() | triton_knn.BY_NAME.keys() | triton_projection.BY_NAME.keys()
    kernels |= triton_vera.BY_NAME.keys() | {triton_vera_matrices.NAME}
    assert kernels == {name for name in BUDGETS if name.endswith("_kernel")}


def test_a_violation_names_kernel_architecture_and_numbers():
    name = "soft_sort_cross_entropy_kernel"
    too_large = Config(rows=16, num_warps=4, programs_per_sm=4)
    used = resources(compile_for(name, 90, 256, config=too_large))
    assert used.stack_bytes > 0
    found = violations(name, "sm_90", used)
    assert f"{name} on sm_90: stack_bytes: {used.stack_bytes} used, 0 allowed" in found
    spilled = Resources(64, 8, 16, 0)
    assert violations(name, "sm_80", spilled) == [
        f"{name} on sm_80: stack_bytes: 8 used, 0 allowed",
        f"{name} on sm_80: local_bytes: 16 used, 0 allowed",
    ]


@pytest.mark.parametrize("name", BY_NAME)
def test_offsets_into_tensors_are_64_bit(name):
    """Of what is added first to a pointer to the user's data, or to the workspace."""
    ir = compile_for(name, 90, 49).asm["ttir"]
    pointers = {*POINTERS[BY_NAME[name]].split(), "p_workspace"}
    added = re.findall(r"tt\.addptr %(\w+), %\w+ : .*?, (?:tensor<\w+x)?(i\d+)", ir)
    checked = {pointer for pointer, _ in added} & pointers
    wide = {(pointer, width) for pointer, width in added if pointer in pointers}
    assert wide == {(pointer, "i64") for pointer in checked}
    splats = dict(re.findall(r"%(\w+) = tt\.splat %(\w+) : !tt\.ptr", ir))
    for splat, pointer in splats.items():
        widths = re.findall(rf"tt\.addptr %{splat}, %\w+ : [^,]*, tensor<[\dx]*(i\d+)>", ir)
        if pointer in pointers:
            checked.add(pointer)
            assert widths == ["i64"] * len(widths), pointer
    assert checked == pointers


@pytest.mark.parametrize("name", [name for name in BY_NAME if "fwd" not in name])
def test_no_warp_stores_a_gradient_that_another_has_yet_to_load(name):
    """A barrier lies between every sum over rows of X and the store that follows."""
    ir = compile_for(name, 90, 49).asm["ttir"]
    (after_the_sum,) = re.findall(r"\(tensor<8x64xf32>\) -> tensor<64xf32>(.*?tt\.store)", ir, re.S)
    assert ".barrier" in after_the_sum


@pytest.mark.parametrize("name", [name for name, op in _library.OPS.items() if op.gpu_kernels])
def test_is_registered_for_cuda_tensors(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fmkernels::{name}", "CUDA")


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    op = _library.OPS["soft_sort"]
    wide = torch.randn(2, 7, dtype=torch.float64)
    long = torch.randn(1, MAX_TRITON_SIZE + 1)
    assert op.limits["triton"](wide) == "computes in float32, got float64"
    assert op.limits["triton"](long) == "rows of 257 values exceed 256"
    for scores, network in ((wide, "bitonic"), (long, "reflected_bitonic")):
        found = op._run_gpu(scores, 100.0, network)
        for tensor, expected in zip(
            found, reference.soft_sort(scores, 100.0, network), strict=True
        ):
            assert torch.equal(tensor, expected)
