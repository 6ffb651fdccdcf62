"""Which product finds the candidates on a CPU, and in which tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

PRODUCTS = 2**22
"""Products in memory at a time."""


class CpuPlan(NamedTuple):
    """How a search goes over its queries and rows."""

    dtype: torch.dtype
    """Of the product: bfloat16, or float32."""
    queries: int
    """For which the bank is gone through once."""
    chunk: int
    """Queries whose products are in memory at a time."""
    rows: int
    """Rows of a tile."""
    crowd: int
    """Candidates in a tile that are more than a query should have."""


def cpu_plan(queries: int, dim: int, rows: int, k: int) -> CpuPlan:
    """The plan of a search by ``queries`` of ``dim`` numbers in as many rows."""
    chunk = min(max(queries, 1), 1024)
    tile = min(max(4096, PRODUCTS // chunk), 65536)
    product = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    return CpuPlan(product, 16384, chunk, tile, 2 * k + 256)


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
