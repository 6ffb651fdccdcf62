"""How vera_expand is cut on a GPU: pure functions of sizes and dtype.

Counted and compiled, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fmkernels.ops.vera_shrink.gpu_config import FEW, PROGRAMS, Tile, fit, tile_of

LEAST_ROWS = 512
"""Of a part of M: fewer take less time than what follows, the contraction with B."""


@dataclass(frozen=True)
class Contraction:
    """Tiles of M (outputs × ranks), and how the rows are divided."""

    tile: Tile
    tokens: int
    """Of a part, a multiple of the tile's inner size."""
    parts: int

    def programs(self, width: int, rank: int) -> int:
        """One for each tile of each part."""
        return self.parts * -(-width // self.tile.rows) * -(-rank // self.tile.columns)


def is_stock(dtype: torch.dtype, by_matrix: bool) -> bool:
    """Whether the library's products are as good, or better.

    In float32, outside of the matrix units, they are: with many rows and one adapter, what is left
    to save is a pass over B, of n r numbers. In a half type it is six launches for that pass, and
    M in memory.
    """
    return by_matrix and dtype == torch.float32


def grad_u_tile(tokens: int, width: int, rank: int, dtype: torch.dtype) -> Tile:
    """For dU of one adapter.

    128 × 256 does 85 operations for a byte of the level-2 cache, 128 × 128 does 64, but it must not
    leave multiprocessors idle. ``expand`` has base beside its sums, and would spill.
    """
    tile = tile_of(tokens, rank, width, dtype)
    programs = -(-tokens // 128) * -(-rank // 256)
    if tile.columns < 128 or 2 * programs < PROGRAMS:
        return tile
    return Tile(128, 256, tile.inner // 2, 8, 4)


def contraction(tokens: int, width: int, rank: int, dtype: torch.dtype) -> Contraction:
    """Of M = Gᵀ U (width, rank) over the rows."""
    half = dtype != torch.float32
    rows, columns = fit(width, 128 if half else 64), fit(rank, 256 if half else 64)
    inner = fit(tokens, 64 if half and rows * columns <= 128 * 128 else 32)
    warps = 8 if rows * columns >= 128 * 128 else 4
    tile = Tile(rows, columns, inner, warps, (4 if inner < 64 else 3) if half else 2)
    tiles = -(-width // rows) * -(-rank // columns)
    parts = max(1, min(PROGRAMS // tiles, tokens // LEAST_ROWS))
    part = -(-tokens // (parts * inner)) * inner
    return Contraction(tile, part, -(-tokens // part))


def rows_of_a_block(tokens: int, adapters: int, dtype: torch.dtype) -> int:
    """So that an adapter fills a block, on average: what is not filled multiplies zeros."""
    return fit(-(-tokens // min(adapters + 1, tokens)), 64 if dtype == torch.float32 else 128)


def most_blocks(tokens: int, adapters: int, rows: int) -> int:
    """However the rows are divided among the adapters, and none: ceil is at most one more."""
    return tokens // rows + min(adapters + 1, tokens)


def block_tile(rows: int, columns: int, inner: int, dtype: torch.dtype) -> Tile:
    """For blocks of so many rows."""
    tile = tile_of(FEW + 1, columns, inner, dtype)
    small = rows < 64
    width = fit(columns, 32) if small and dtype == torch.float32 else tile.columns
    warps = 4 if small else tile.num_warps
    return Tile(rows, width, tile.inner, warps, tile.num_stages)
