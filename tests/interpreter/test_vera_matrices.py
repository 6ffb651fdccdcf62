"""The Triton kernel of vera_matrices in Triton's interpreter: the reference's numbers, bit for bit."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fmkernels.ops.vera_matrices import reference, triton


def check(seed, *sizes, dtype=torch.float32):
    seed = torch.tensor(seed, dtype=torch.int64)
    found = triton.vera_matrices(seed, *sizes, dtype)
    expected = reference.vera_matrices(seed, *sizes, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(a.dtype == dtype for a in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", [0, 2**40 + 3, 2**63 - 1])
def test_is_the_reference(dtype, seed):
    """Every width of a tile, tiles that end outside of the matrix, several of them."""
    for sizes in [(1, 1, 1), (5, 20, 7), (3, 130, 65), (2, 300, 530)]:
        check(seed, *sizes, dtype=dtype)


@settings(max_examples=6)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_any_size(rank, into, out, seed):
    check(seed, rank, into, out)
