"""How knn is searched on a GPU: pure functions of sizes and device.

**The order of the rows.** A row is a candidate if its score can reach the k-th best that is known,
so the best known should be good early. The head, a few rows spread evenly over the bank, is scored
in float64 outright; then come levels, after each of which GROWTH times as many rows have been seen
as before it, again spread evenly:

    head      rows 0, s, 2s, …                         s = GROWTH^n
    level     rows s/4, 2s/4, 3s/4, s + s/4, …         s = GROWTH^n, GROWTH^(n−1), … GROWTH

The k-th best of a quarter of the rows leaves about 4k of all of them, so a level has about 3k
candidates, wherever in the bank the neighbours lie. In the order of the bank it would be otherwise:
banks are often sorted by class or by image, and then all neighbours come at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_K = 2048
"""For more neighbours, the reference."""

BUCKET = 32
"""Consecutive rows whose candidates are one word."""

GROWTH = 4

SMALLEST_CAPACITY = 512

BUFFER_BYTES = 2**29
"""For the candidates of a block of queries, at most."""

CANDIDATE_BYTES = 24
"""Of one in the buffers: row, score, bucket and word."""

COPY_BYTES = 2**28
"""For the copy of a segment of rows in low precision, at most, but for those of 100,000 numbers."""

PITCH = 64
"""What the length of the product's rows is a multiple of: a copy is filled up with zeros."""

MAX_QUERIES = 16_384
"""Of a block."""

MAX_ROWS = 2**22
"""Of a segment."""

ALL_ROWS = 4096
"""Scored at a time where all rows are."""

PREPARED = 4
"""Rows that a program prepares at a time."""

SCORED = 8
"""Rows that a program scores at a time."""

MERGED = 32
"""That a program compares with as many others at a time."""


@dataclass(frozen=True)
class Product:
    """The tile of a program, and how it is pipelined."""

    queries: int
    rows: int
    dim: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """One search."""

    capacity: int
    """Candidates that a query may have in a segment."""
    queries: int
    """Of a block."""
    rows: int
    """Of a segment, at most."""


@dataclass(frozen=True)
class Segment:
    """``count`` rows: ``first + (i // run)·stride + (i % run)·step`` for i = 0 …"""

    first: int
    run: int
    stride: int
    step: int
    count: int

    def row(self, i: int) -> int:
        """The i-th."""
        return self.first + i // self.run * self.stride + i % self.run * self.step


@dataclass(frozen=True)
class Grid:
    """Programs, each with so many tiles of rows."""

    programs: int
    tiles: int


def limits(queries: Tensor, bank: Tensor, k: int, *_: Any) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if bank.shape[1] == 0:
        return "rows without numbers"
    return f"k of {k} exceeds {MAX_K}" if k > MAX_K else None


def low_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of this dtype are multiplied in.

    Half types as they are: nothing is rounded. Others in float16, with every row scaled to a norm
    in [1, 2): its three bits more than bfloat16's make the bound, and so the number of candidates,
    smaller, at the same speed.
    """
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def search_plan(queries: int, dim: int, k: int, low: torch.dtype) -> Plan:
    """The buffers of a search.

    A level is expected to have 3k candidates, and those that low precision cannot tell from them.

    Args:
        queries: rows of queries.
        dim: D.
        k: neighbours.
        low: the dtype of the product.
    """
    capacity = max(SMALLEST_CAPACITY, 1 << (8 * k - 1).bit_length())
    block = min(MAX_QUERIES, BUFFER_BYTES // (CANDIDATE_BYTES * capacity))
    fitting = COPY_BYTES // (-(-dim // PITCH) * PITCH * torch.finfo(low).bits // 8)
    return Plan(capacity, min(queries, block), min(MAX_ROWS, max(1024, fitting)))


def product(queries: int, low: torch.dtype, capability: str | None = None) -> Product:
    """The tile for so many queries. Counted and compiled, not measured.

    A tile of 128 queries and 256 rows does 85 operations for a byte that comes from the level-2
    cache, one of 128 × 128 does 64 (docs/kernels/triton.md). The larger one spills on compute
    capability 10, and before 9 with more than 32 numbers of a row at a time.

    Args:
        queries: of a block.
        low: the dtype of the product.
        capability: of the device, such as ``"9.0"``.
    """
    if low == torch.float32:  # outside of the tensor cores
        return Product(64 if queries > 16 else 16, 64, 32, 4, 2)
    if queries <= 16:
        return Product(16, 128, 64, 4, 4)
    if queries <= 64:
        return Product(64, 128, 64, 4, 4)
    large = {"9": Product(128, 256, 64, 8, 4), "10": Product(128, 128, 64, 8, 4)}
    return large.get((capability or "").partition(".")[0], Product(128, 256, 32, 8, 3))


def product_grid(queries: int, rows: int, multiprocessors: int, tile: Product) -> Grid:
    """Programs of a product: four for each multiprocessor, or more if there are more queries."""
    query_tiles = -(-queries // tile.queries)
    row_tiles = -(-rows // tile.rows)
    chunks = min(row_tiles, max(1, -(-4 * multiprocessors // query_tiles)))
    tiles = -(-row_tiles // chunks)
    return Grid(query_tiles * -(-row_tiles // tiles), tiles)


def score_programs(queries: int, capacity: int, multiprocessors: int) -> int:
    """Programs that score the candidates of one query: more of them where queries are few."""
    return max(1, min(-(-capacity // SCORED), 8 * multiprocessors // queries))


def head(rows: int, capacity: int) -> Segment:
    """The first rows, at most ``capacity`` and at least a GROWTH-th of that (or all)."""
    stride = 1
    while -(-rows // stride) > capacity:
        stride *= GROWTH
    return Segment(0, 1, stride, 0, -(-rows // stride))


def segments(rows: int, plan: Plan) -> Iterator[Segment]:
    """All other rows, level by level, in parts of at most ``plan.rows``."""
    run = GROWTH - 1
    part = max(1, plan.rows // run) * run
    stride = head(rows, plan.capacity).stride
    while stride > 1:
        step = stride // GROWTH
        full, rest = divmod(rows, stride)
        count = run * full + max(0, -(-rest // step) - 1)
        for start in range(0, count, part):
            first = step + start // run * stride
            yield Segment(first, run, stride, step, min(part, count - start))
        stride = step
