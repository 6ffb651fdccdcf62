"""The gate of knn's Triton kernels: within their budgets, with matrix instructions; no GPU needed."""

import re

import pytest
import torch

pytest.importorskip("triton")

from budgets import SHARED, matrix_violations, violations
from triton_aot import resources
from triton_knn import BY_NAME, POINTERS, compile_for

from fmkernels.ops.knn.gpu_config import MAX_K, MAX_QUERIES, search_plan
from fmkernels.ops.knn.reference import METRICS

CAPABILITIES = (80, 90, 100)
HALF = (torch.float16, torch.bfloat16)

PRODUCTS = [
    {"low": low, "queries": queries, "metric": metric, "copied": low == torch.float16}
    for low in HALF
    for queries in (MAX_QUERIES, 64, 16)
    for metric in ("cosine", "l2")
]
FLOAT32 = [
    {"low": torch.float32, "queries": queries, "metric": metric}
    for queries in (MAX_QUERIES, 16)
    for metric in ("cosine", "l2")
]
LARGE = {"k": MAX_K, "capacity": search_plan(1, 384, MAX_K, torch.float16).capacity}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CASES = {
    "knn_prepare_kernel": [
        *({"dtype": dtype, "low": low} for dtype in DTYPES for low in (*HALF, torch.float32)),
        {"copied": False, "dtype": torch.bfloat16, "dim": 100},
    ],
    "knn_candidates_kernel": PRODUCTS + FLOAT32,
    "knn_listing_kernel": [{}, LARGE],
    "knn_score_kernel": [
        {"metric": metric, "dtype": dtype, "dim": dim}
        for metric in METRICS
        for dtype in DTYPES
        for dim in (384, 99)
    ],
    "knn_merge_kernel": [{}, LARGE, {"k": 1}],
}

MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05.mma"}
"""Of a product of half types; a tile of 16 queries is too small for the newer ones."""


def wanted(name, capability, low=torch.float16, queries=MAX_QUERIES, **_):
    if name != "knn_candidates_kernel" or low not in HALF:
        return ()
    return (MATRIX[capability if queries > 16 else 80],)


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
def test_a_block_of_the_product_fits(architecture):
    capability = int(re.sub(r"\D", "", architecture))
    for case in PRODUCTS + FLOAT32:
        used = compile_for("knn_candidates_kernel", capability, **case).metadata.shared
        assert used <= SHARED[architecture].of_a_block


@pytest.mark.parametrize("name", BY_NAME)
def test_compiles_with_every_integer_at_one(name):
    compile_for(name, 90, dim=1, k=1, capacity=1)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("metric", METRICS)
def test_offsets_into_tensors_are_64_bit(name, metric):
    """Of everything that is added to a pointer."""
    ir = compile_for(name, 90, metric=metric).asm["ttir"]
    pointers = {*POINTERS[BY_NAME[name]].split()}
    if name == "knn_candidates_kernel" and metric != "l2":
        pointers -= {"p_half", "p_weight"}
    splats = dict(re.findall(r"%(\w+) = tt\.splat %(\w+) : !tt\.ptr", ir))
    checked = set()
    for base, widths in re.findall(
        r"tt\.addptr %(\w+), %\w+ : [^,]*, (?:tensor<[\dx]*)?(i\d+)", ir
    ):
        pointer = splats.get(base, base)
        if pointer in pointers:
            checked.add(pointer)
            small = pointer in ("p_factor", "p_addend", "p_half")  # of a segment, below 2^22
            assert widths == ("i32" if small else "i64"), pointer
    assert checked == pointers


def test_products_of_float32_are_not_rounded():
    ptx = compile_for("knn_candidates_kernel", 90, low=torch.float32).asm["ptx"]
    assert "fma.rn.f32" in ptx
    assert "tf32" not in ptx
