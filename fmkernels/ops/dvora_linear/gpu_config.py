"""How DVoRA's magnitude is cut on a GPU: a pure function of sizes. Counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

PROGRAMS = 1056
"""Eight for each multiprocessor of an H200: what streams wants many loads in flight."""

LEAST_ROWS = 64
"""Of a part."""


@dataclass(frozen=True)
class Rows:
    """A tile, and how the rows of a sum are divided."""

    tokens: int
    """Of a part, a multiple of the tile's rows."""
    parts: int
    rows: int = 8
    columns: int = 256
    num_warps: int = 4


def rows_plan(tokens: int, width: int) -> Rows:
    """A function of sizes alone: on every device the numbers are added in the same order."""
    tiles = -(-width // Rows.columns)
    parts = max(1, min(PROGRAMS // tiles, tokens // LEAST_ROWS))
    part = -(-tokens // (parts * Rows.rows)) * Rows.rows
    return Rows(part, -(-tokens // part))
