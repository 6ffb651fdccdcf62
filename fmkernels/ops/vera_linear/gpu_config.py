"""When a GPU computes base layer and adapter together, and how: pure functions of sizes and device.

Counted and compiled, not measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.vera_shrink.gpu_config import FEW, Tile, limits, tile_of

WIDEST = 512
"""Inputs of a layer whose product a Triton kernel may do in the library's place.

For each output of a row, together saves a number of a half type written and read back: 4 bytes, at
4.3 TB/s 0.93 ps. If the level-2 cache gives 5.5 TB/s, its tile does 470 TFLOP/s where the library
does 770 on an H200: 2 m operations take 1.66 m fs longer, which is as much at m = 560. A tile that
reached 0.8 of the library's rate would pay up to m = 1,430.
"""

RANKS = 32
"""At a time: U ⊙ d goes to the matrix units from registers, of which the accumulator has most."""

SIDE = 8
"""Tiles of rows that go through the columns together."""


def fused_limits(x: Tensor, *rest: Any) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if x.dtype == torch.float32:
        return "the library's products of float32 are faster"
    return limits(x, *rest)


def fuses(dtype: torch.dtype, tokens: int, in_features: int) -> bool:
    """Whether base layer and adapter are one launch.

    Few rows are a matter of reading W0, which any kernel does equally well, and save a launch.

    Args:
        dtype: of the product; in float32 the library's products are the faster ones.
        tokens: rows.
        in_features: m.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return half and (tokens <= FEW or in_features <= WIDEST)


def fused_tile(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, capability: str | None,
    *, gathered: bool,
) -> Tile:  # fmt: skip
    """The tile for such a layer.

    128 × 256 does 85 operations for a byte that comes from the level-2 cache, 128 × 128 does 64.
    The larger one spills on compute capability 10, with rows that have adapters of their own, and
    before 9 with more than 32 inputs at a time.
    """
    tile = tile_of(tokens, out_features, in_features, dtype, gathered=gathered)
    large = tile.columns == 128 and out_features >= 256 and not gathered
    if not large or (capability or "").startswith("10."):
        return tile
    return Tile(128, 256, 64 if (capability or "").startswith("9.") else 32, 8, 3)
