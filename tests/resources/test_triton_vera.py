"""The gate of VeRA's Triton kernels: within their budgets, with matrix instructions; no GPU needed."""

import re

import pytest
import torch

pytest.importorskip("triton")

from budgets import SHARED, matrix_violations, violations
from triton_aot import resources
from triton_vera import BY_NAME, POINTERS, compile_for, rows_of_a_tile

CAPABILITIES = (80, 90, 100)

FEW, MANY = {"tokens": 64}, {"tokens": 2048}
FLOAT32 = {"tokens": 2048, "dtype": torch.float32}
SEVERAL = [{"tokens": tokens, "adapters": 8} for tokens in (64, 256, 2048)]
SEVERAL_FLOAT32 = [case | {"dtype": torch.float32} for case in SEVERAL]
LARGE = {"tokens": 8192, "rank": 1024}
NARROW = {"tokens": 2048, "rank": 16}
CASES = {
    "vera_shrink_kernel": [{"tokens": 3}, FEW, FEW | {"dtype": torch.float32, "features": 1001}],
    "vera_sum_kernel": [{}, {"adapters": 8}],
    "vera_expand_kernel": [
        {"tokens": 3},
        FEW,
        MANY,
        NARROW,
        FLOAT32,
        FEW | {"dtype": torch.float32},
        SEVERAL[0],
        SEVERAL[2],
        SEVERAL_FLOAT32[2],
    ],
    "vera_grad_u_kernel": [FEW, MANY, LARGE, FLOAT32, *SEVERAL, *SEVERAL_FLOAT32],
    "vera_grad_b_kernel": [*SEVERAL, *SEVERAL_FLOAT32],
    "vera_contract_kernel": [
        MANY,
        LARGE,
        {"tokens": 2048, "rank": 128},
        NARROW,
        {"tokens": 3},
        FLOAT32,
    ],
    "vera_fused_kernel": [{"tokens": 3}, FEW, MANY, SEVERAL[0], SEVERAL[2]],
    "vera_dropout_kernel": [{}, {"dtype": torch.float32, "features": 1001}],
    "dvora_scale_kernel": [{}, {"dtype": torch.float32, "width": 1001}],
    "dvora_scale_backward_kernel": [{}, {"dtype": torch.float32, "width": 1001}],
}

PRODUCTS = [name for name in BY_NAME if not re.search("sum|dropout|scale", name)]
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05.mma"}
"""Of a product of half types; a tile of fewer than 64 rows is too small for the newer ones."""


def wanted(name, capability, **case):
    if name not in PRODUCTS or case.get("dtype") == torch.float32:
        return ()
    return (MATRIX[capability if rows_of_a_tile(name, **case) >= 64 else 80],)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BY_NAME)
def test_within_budget(name, capability):
    found = []
    for case in CASES[name]:
        kernel, where = compile_for(name, capability, **case), f"sm_{capability}, {case}"
        found += violations(name, where, resources(kernel))
        expected = wanted(name, capability, **case)
        found += matrix_violations(name, where, kernel.asm["ptx"], expected)
    assert found == []


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_block_fits(name, architecture):
    capability = int(re.sub(r"\D", "", architecture))
    for case in CASES[name]:
        used = compile_for(name, capability, **case).metadata.shared
        assert used <= SHARED[architecture].of_a_block


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("adapters", [0, 1])
def test_compiles_with_every_integer_at_one(name, adapters):
    compile_for(name, 90, tokens=1, width=1, features=1, rank=1, adapters=adapters)


@pytest.mark.parametrize("name", BY_NAME)
def test_offsets_into_tensors_are_64_bit(name):
    """Of what is added first to a pointer, in tensors of any strides."""
    ir = compile_for(name, 90, tokens=48, adapters=3, strided=True).asm["ttir"]
    pointers = {*POINTERS[BY_NAME[name]].split()}
    splats = dict(re.findall(r"%(\w+) = tt\.splat %(\w+) : !tt\.ptr", ir))
    checked = set()
    for base, width in re.findall(r"tt\.addptr %(\w+), %\w+ : [^,]*, (?:tensor<[\dx]*)?(i\d+)", ir):
        pointer = splats.get(base, base)
        if pointer in pointers:
            checked.add(pointer)
            assert width == "i64", pointer
    assert checked == pointers


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_float32_are_not_rounded(name):
    ptx = compile_for(name, 90, dtype=torch.float32, adapters=3).asm["ptx"]
    assert "fma.rn.f32" in ptx
    assert "tf32" not in ptx
