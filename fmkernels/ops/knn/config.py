"""Which product finds the candidates on a CPU, and in which tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fmkernels import _library

PRODUCTS = 2**20
"""In memory at a time: they should stay in the cache until they have been looked at."""
BUCKET = 256
"""Rows that the kernel looks at together: tiles are made of them."""
PART_NUMBERS = 2**24
"""Of the rows of a part that are cast: 32 MB in bfloat16."""
PREPARED_ROWS = 2**18
"""Of a part that is not."""
POOLED = 2**21
"""Candidates in memory at a time, of 16 bytes each."""
CHUNK = 1024
"""Queries that are searched for together: their products fit, and packed ones stay in the cache."""
GROUP = 64
"""Queries that the kernel multiplies a row with at most."""
LANES = {"avx2": 8, "avx512": 16}
"""Queries in a register, where the kernel's own products are as fast as oneDNN's."""
MOST_VECTORS = 4
"""Registers of queries that the kernel multiplies a row with, or fewer where it has fewer."""
FEW_QUERIES = 4
"""For which the kernel multiplies in float32, with rows in whatever dtype there are."""
WORTH_A_CAST = 64
"""Queries from which on a product in low precision is faster although the bank has to be cast."""
ROWS_PER_NEIGHBOR = 400
"""From which on it pays that int8 takes half the time of bfloat16, although it leaves more
candidates: their number grows with k, the product with the rows."""
INT8_DIMS = range(16, 2**17)
"""int32 holds the sum of as many products; and of rows of one number torch._int_mm is wrong."""


class Level(NamedTuple):
    """A product that tells candidates from the rest."""

    shadow: torch.dtype
    """Of the bank: int8, bfloat16 or float32."""
    product: torch.dtype
    """Of the queries; the same, or float32 where the kernel multiplies a few queries itself."""
    vectors: int = 0
    """Registers of queries whose products are compared as they are made; 0 for products that
    oneDNN makes first."""


class CpuPlan(NamedTuple):
    """How a search goes over its queries and rows."""

    levels: tuple[Level, ...]
    """The first product, and what follows for queries that it leaves too many candidates."""
    queries: int
    """For which the bank is gone through once."""
    chunk: int
    """Queries whose products and candidates are in memory at a time."""
    rows: int
    """Of a part of the bank, whose last candidates are scored together."""
    tile: int
    """Rows whose products are in memory at a time."""
    capacity: int
    """Candidates of a query in memory at a time."""
    crowd: int
    """A query should have fewer candidates than one in so many rows: to score a row in float64
    takes that many times as long as a product in float32."""


def cpu_plan(
    queries: int,
    dim: int,
    rows: int,
    k: int,
    bank: torch.dtype,
    prepared: torch.dtype | None,
    copied: bool = False,
) -> CpuPlan:
    """The plan of a search by ``queries`` of ``dim`` numbers in ``rows`` rows.

    Args:
        queries: how many.
        dim: of a query, and of a row.
        rows: how many.
        k: neighbours.
        bank: the dtype of the rows as they are.
        prepared: the dtype of their shadow, if they have one.
        copied: whether the rows of a part have to be copied to be scored in float64.
    """
    capacity = 3 * k + 256
    chunk = _chunk(queries, max(1, min(CHUNK, POOLED // capacity)))
    tile = _in_buckets(PRODUCTS // chunk, 1, 64)
    levels = _few_levels(bank, prepared) if queries <= FEW_QUERIES else ()
    levels = levels or _levels(queries, dim, rows, k, bank, prepared)
    is_cast = copied or levels[0].shadow not in (bank, prepared)
    part = _in_buckets(PART_NUMBERS // max(dim, 1) if is_cast else PREPARED_ROWS, 1, 1024)
    part = max(part // tile, 1) * tile
    levels = tuple(level._replace(vectors=vectors(level, chunk)) for level in levels)
    return CpuPlan(levels, 16384, chunk, part, tile, capacity, 16)


def _chunk(queries: int, most: int) -> int:
    """Chunks of nearly the same size, of whole groups of the kernel where ``most`` allows it."""
    chunks = -(-queries // most)
    if chunks <= 1:
        return max(queries, 1)
    even = -(-queries // chunks)
    return min(most, -(-even // GROUP) * GROUP)


def vectors(level: Level, queries: int) -> int:
    """For how many registers of queries the kernel compares a level's products as it makes them.

    It shares out whole groups of registers to the threads, so that the busiest decides; with fewer
    queries than one register for every thread, oneDNN's products are faster.
    """
    if level.product != level.shadow or queries <= FEW_QUERIES or not _is_fused(level.product):
        return 0
    lanes, threads = LANES[_instruction_set()], torch.get_num_threads()
    if queries < lanes * threads:
        return 0

    def busiest(count: int) -> tuple[int, int]:
        groups = -(-queries // (count * lanes))
        return -(-groups // threads) * count, -count

    return min(range(1, MOST_VECTORS + 1), key=busiest)


def _is_fused(product: torch.dtype) -> bool:
    """Whether the kernel has products of its own of this dtype, and nothing faster is there."""
    if product == torch.int8:
        has_it = torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()
        return has_it and _instruction_set() == "avx512"
    return product == torch.float32 and _instruction_set() in LANES


@functools.cache
def _instruction_set() -> str:
    return "none" if _library.native is None else _library.native.cpu_isa()


def _few_levels(bank: torch.dtype, prepared: torch.dtype | None) -> tuple[Level, ...]:
    """The kernel reads what there is, float32 before what it would have to widen."""
    at_hand = [low for low in (torch.int8, torch.bfloat16) if low in (bank, prepared)]
    if bank == torch.float32:
        at_hand = []
    last = Level(torch.float32, torch.float32)
    return (*(Level(low, torch.float32) for low in at_hand[:1]), last)


def _levels(
    queries: int, dim: int, rows: int, k: int, bank: torch.dtype, prepared: torch.dtype | None
) -> tuple[Level, ...]:
    worth = queries >= WORTH_A_CAST
    levels = []
    int8_pays = rows >= ROWS_PER_NEIGHBOR * k if worth else prepared == torch.int8
    if has_fast_int8() and dim in INT8_DIMS and int8_pays:
        levels.append(torch.int8)
    if has_fast_bfloat16() and (worth or torch.bfloat16 in (bank, prepared)):
        levels.append(torch.bfloat16)
    return tuple(Level(low, low) for low in (*levels, torch.float32))


def _in_buckets(rows: int, fewest: int, most: int) -> int:
    return BUCKET * min(max(rows // BUCKET, fewest), most)


def lowest_dtype(dim: int) -> torch.dtype:
    """What a bank of rows of ``dim`` numbers is cast to that is searched again and again."""
    if has_fast_int8() and dim in INT8_DIMS:
        return torch.int8
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def has_fast_int8() -> bool:
    """Whether this CPU multiplies int8 in hardware, and exactly: AVX512-VNNI or AMX."""
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
