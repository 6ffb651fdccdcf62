"""The gate of project_gradients' Triton kernels: within their budgets, with matrix instructions."""

import re

import pytest
import torch

pytest.importorskip("triton")

from budgets import SHARED, matrix_violations, violations
from triton_aot import resources
from triton_projection import BY_NAME, POINTERS, compile_for

CAPABILITIES = (80, 90, 100)
CASES = {
    "project_gradients_prepare_kernel": [
        *({"dtype": dtype} for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        {"pairs": 1, "bias": False},
        {"offsets": True, "width": 385},
    ],
    "project_gradients_sketch_kernel": [
        *({"pairs": pairs} for pairs in (1, 4, 64)),
        {"width": 384, "dim": 1000, "bias": False, "repeats": 3},
    ],
    "project_gradients_signs_kernel": [
        {"packed": packed, "weighted": weighted, "pairs": pairs}
        for packed, weighted in ((True, True), (False, True), (False, False))
        for pairs in (1, 64)
    ],
    "project_gradients_finish_kernel": [
        {"offsets": offsets, "factored": factored}
        for offsets in (False, True)
        for factored in (False, True)
    ],
}
SIGNS, SKETCH = "project_gradients_signs_kernel", "project_gradients_sketch_kernel"

MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05.mma"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BY_NAME)
def test_within_budget(name, capability):
    found = []
    wanted = (MATRIX[capability],) if name == SIGNS else ()
    for case in CASES[name]:
        kernel, where = compile_for(name, capability, **case), f"sm_{capability}, {case}"
        found += violations(name, where, resources(kernel))
        found += matrix_violations(name, where, kernel.asm["ptx"], wanted)
    assert found == []


@pytest.mark.parametrize("architecture", SHARED)
def test_a_block_of_the_product_fits(architecture):
    used = compile_for(SIGNS, int(re.sub(r"\D", "", architecture)))
    assert used.metadata.shared <= SHARED[architecture].of_a_block


@pytest.mark.parametrize("name", BY_NAME)
def test_compiles_with_every_integer_at_one(name):
    compile_for(name, 90, width=1, dim=1, pairs=1, bias=False, parts=1)


@pytest.mark.parametrize("name", BY_NAME)
def test_offsets_into_tensors_are_64_bit(name):
    """Of everything that is added to a pointer."""
    checked = set()
    pointers = {*POINTERS[BY_NAME[name]].split()}
    for factored in (False, True):
        ir = compile_for(name, 90, factored=factored, packed=True, offsets=True).asm["ttir"]
        splats = dict(re.findall(r"%(\w+) = tt\.splat %(\w+) : !tt\.ptr", ir))
        for base, width in re.findall(
            r"tt\.addptr %(\w+), %[\w#]+ : [^,]*, (?:tensor<[\dx]*)?(i\d+)", ir
        ):
            pointer = splats.get(base, base)
            if pointer in pointers:
                checked.add(pointer)
                assert width == "i64", pointer
    assert checked == pointers


@pytest.mark.parametrize("packed", [False, True])
def test_signs_are_made_in_registers_and_numbers_are_shared_once(packed):
    """On sm_90: what is drawn does not go through shared memory, nor do its numbers anew."""
    ir = compile_for(SIGNS, 90, packed=packed).asm["ttgir"]
    groups, rows = [place.start() for place in re.finditer(r"scf\.for", ir)][:2]
    inner = ir[rows : ir.index("scf.yield", rows)]
    assert "local_alloc" in ir[groups:rows]
    assert "local_alloc" not in inner
    assert inner.count("warp_group_dot %") == 1
    (product,) = re.findall(r"warp_group_dot %.* : tensor<64x128xf16, #ttg\.(\w+)", inner)
    assert product == "dot_op"


@pytest.mark.parametrize("pairs", [1, 2, 4, 64])
def test_neighbouring_threads_load_neighbouring_buckets(pairs):
    ir = compile_for(SKETCH, 90, pairs=pairs).asm["ttgir"]
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{(.*)\}>", ir))
    tile = f"{128 * min(pairs, 8)}x!tt.ptr<f32>"
    loads = re.findall(rf"tt\.load .* : tensor<{re.escape(tile)}, (#\w+)>", ir)
    assert len(loads) == 8
    for layout in {*loads}:
        assert "sizePerThread = [1], threadsPerWarp = [32]" in layouts[layout]
