"""Which product finds the candidates on a CPU, and in which tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

PRODUCTS = 2**20
"""In memory at a time: they should stay in the cache until they have been looked at."""
BUCKET = 256
"""Rows that the kernel looks at together: tiles are made of them."""
PART_NUMBERS = 2**23
"""Of the rows of a part that are cast: 16 MB in bfloat16."""
PREPARED_ROWS = 2**18
"""Of a part that is not."""
FEW_QUERIES = 4
"""For which the kernel has products of its own, of float32 with bfloat16 or float32."""
WORTH_A_CAST = 64
"""Queries from which on a product in bfloat16 is faster although the bank has to be cast."""


class CpuPlan(NamedTuple):
    """How a search goes over its queries and rows."""

    dtype: torch.dtype
    """Of the shadow of the bank: bfloat16, or float32."""
    product: torch.dtype
    """Of the queries that it is multiplied with, and of what the product returns."""
    queries: int
    """For which the bank is gone through once."""
    chunk: int
    """Queries whose products and candidates are in memory at a time."""
    rows: int
    """Of a part of the bank, whose candidates are scored together."""
    tile: int
    """Rows whose products are in memory at a time."""
    capacity: int
    """Candidates that a query may have in a part before it needs a better product."""


def cpu_plan(
    queries: int, dim: int, k: int, bank_dtype: torch.dtype, prepared: torch.dtype | None
) -> CpuPlan:
    """The plan of a search by ``queries`` of ``dim`` numbers.

    Args:
        queries: how many.
        dim: of a query, and of a row.
        k: neighbours.
        bank_dtype: of the rows as they are.
        prepared: the dtype of their shadow, if they have one.
    """
    at_hand = torch.bfloat16 in (bank_dtype, prepared)
    dtype = torch.float32
    if has_fast_bfloat16() and (at_hand or queries >= WORTH_A_CAST):
        dtype = torch.bfloat16
    chunk = min(max(queries, 1), 1024)
    few = chunk <= FEW_QUERIES
    tile = _in_buckets(PRODUCTS // chunk, 1, 64)
    is_cast = dtype not in (bank_dtype, prepared)
    part = _in_buckets(PART_NUMBERS // max(dim, 1) if is_cast else PREPARED_ROWS, 1, 1024)
    part = max(part // tile, 1) * tile
    return CpuPlan(
        dtype, torch.float32 if few else dtype, 16384, chunk, part, tile, 3 * k + 256
    )


def _in_buckets(rows: int, fewest: int, most: int) -> int:
    return BUCKET * min(max(rows // BUCKET, fewest), most)


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
