"""How VeRA's products are cut on a GPU: pure functions of sizes and dtype.

Counted and compiled, not measured. A tile of 128 × 128 does 64 operations for a byte that comes
from the level-2 cache; U, A and B stay there, and what streams is X, base, Y and G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEW = 64
"""Rows of decoding: what takes time is to read the matrices, so that many programs should."""

PROGRAMS = 264
"""Of a sum over rows: two for each multiprocessor of an H200; on any device, so that the numbers
are added in the same order on all."""

LEAST_FEATURES = 256
"""Of a part: two steps of its loop."""

SUMMED_PARTS, SUMMED_COLUMNS = 8, 128
"""That a program of ``sum`` has at a time."""

TAKEN = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """Of a program: what it accumulates, how far it goes at a time, how it is pipelined."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Shrink:
    """Tiles of U (rows × ranks), and how the inputs are divided."""

    tile: Tile
    features: int
    """Of a part, a multiple of the tile's inner size."""
    parts: int

    def programs(self, tokens: int, rank: int) -> int:
        """One for each tile of each part."""
        return self.parts * -(-tokens // self.tile.rows) * -(-rank // self.tile.columns)


def limits(*args: Any) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    for tensor in args:
        if isinstance(tensor, Tensor):
            if tensor.is_floating_point() and tensor.dtype not in TAKEN:
                return f"computes in float32, got {str(tensor.dtype).removeprefix('torch.')}"
            if max(tensor.shape, default=0) >= 2**31 - 2**8:
                return "a size that exceeds 32 bits"
    return None


def tile_of(
    rows: int, columns: int, inner: int, dtype: torch.dtype, *, gathered: bool = False
) -> Tile:
    """For a product (rows, inner) (inner, columns) in this dtype.

    A tile that is larger than what there is would multiply zeros; 16 is the least that the matrix
    units take. 8 warps hold 128 × 128 numbers of float32 in 64 registers each.

    Args:
        rows: of the left factor.
        columns: of the right factor.
        inner: what is summed over.
        dtype: of the factors.
        gathered: each row has a scale of its own, of float32, for every inner number: that is twice
            the left factor's bytes beside it in shared memory.
    """
    half = dtype != torch.float32
    if rows <= FEW and half:  # 24 to 32 kB of the right factor are on their way at a time
        least, deepest, stages = fit(rows, FEW), 64, 6
        if gathered:
            deepest, stages = 32, 3
        elif least == FEW:
            deepest, stages = 128, 4
        return Tile(least, fit(columns, 32), fit(inner, deepest), 4, stages)
    if rows <= FEW:
        return Tile(fit(rows, FEW), fit(columns, 16), fit(inner, 16), 4, 2)
    if not half:
        return Tile(64, fit(columns, 64), fit(inner, 16), 8, 2)
    width = fit(columns, 128)
    depth = fit(inner, 32 if gathered else 64)
    return Tile(128, width, depth, 8 if width == 128 else 4, 3)


def shrink_plan(tokens: int, features: int, rank: int, dtype: torch.dtype) -> Shrink | None:
    """None for many rows: that is one product, and the library's is as good.

    Few rows are a matter of reading A with the whole device. 4096 × 256 in a half type is 2.1 MB,
    0.4 µs from the level-2 cache for 128 programs, and 6 µs for the 8 that tiles of U alone are.
    """
    if tokens > FEW:
        return None
    tile = tile_of(tokens, rank, features, dtype)
    tiles = -(-rank // tile.columns)
    parts = max(1, min(PROGRAMS // 2 // tiles, features // LEAST_FEATURES))
    part = max(1, -(-features // (parts * tile.inner))) * tile.inner
    return Shrink(tile, part, max(1, -(-features // part)))


def fit(size: int, most: int) -> int:
    """The least power of two from 16 on that is not below the size, but at most ``most``."""
    return min(most, max(16, 1 << (size - 1).bit_length()))
