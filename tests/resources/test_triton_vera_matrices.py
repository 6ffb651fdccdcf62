"""The gate of vera_matrices' Triton kernel: within its budget, without matrix instructions."""

import re

import pytest
import torch

pytest.importorskip("triton")

from budgets import matrix_violations, violations
from triton_aot import resources
from triton_vera_matrices import NAME, POINTERS, compile_for

CASES = [
    *({"dtype": dtype} for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    {"columns": 4},
    {"columns": 65, "dtype": torch.float16},
    {"rows": 1, "columns": 1},
]
"""Every dtype, wide and narrow tiles, integers at one."""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_within_budget(capability):
    found = []
    for case in CASES:
        kernel, where = compile_for(capability, **case), f"sm_{capability}, {case}"
        found += violations(NAME, where, resources(kernel))
        found += matrix_violations(NAME, where, kernel.asm["ptx"])
    assert found == []


def test_offsets_into_tensors_are_64_bit():
    """Of the matrix; the seed is where its pointer is."""
    ir = compile_for(90).asm["ttir"]
    splats = dict(re.findall(r"%(\w+) = tt\.splat %(\w+) : !tt\.ptr", ir))
    offsets = re.findall(r"tt\.addptr %(\w+), %\w+ : [^,]*, (?:tensor<[\dx]*)?(i\d+)", ir)
    assert {splats.get(base, base) for base, _ in offsets} == {POINTERS[1]}
    assert {width for _, width in offsets} == {"i64"}


def test_the_widest_stores():
    """16 bytes, four numbers of float32 side by side, in code for any GPU."""
    assert "st.global.v4" in compile_for(90).asm["ptx"]
