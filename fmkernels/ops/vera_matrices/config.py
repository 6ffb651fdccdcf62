"""How the matrices are cut into tiles on a GPU, and which sizes are taken."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

LARGEST_SIZE = 2**31 - 2**10
"""Of a rank or a width: the numbers of rows and columns of a tile that ends there have 32 bits."""

COUNTERS = 256
"""Of a tile: two for each thread, eight entries."""


class Tile(NamedTuple):
    """The rows of a tile, and its groups of four columns."""

    rows: int
    groups: int
    num_warps: int = 4


def limits(seed: Tensor, rank: int, in_features: int, out_features: int, *_: Any) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    fits = max(rank, in_features, out_features) <= LARGEST_SIZE
    return None if fits else "a size that exceeds 32 bits"


def tile(columns: int) -> Tile:
    """As wide as the matrix, up to 256 columns: a row of 1 KB is written at once."""
    groups = 1
    while groups < min(64, columns / 4):
        groups *= 2
    return Tile(COUNTERS // groups, groups)
