"""How gradients are projected on a GPU: pure functions of sizes.

What decides in which order numbers are added, the parts, depends on the layer alone; tiles of rows
may depend on the batch. Counted and compiled, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmkernels.ops.project_gradients.philox import GROUP

PARTS = 64
"""Of a sum, at most: with some tiles of results they occupy every multiprocessor."""

GROUP_PARTS = 16
"""Of PARTS, at most so many along a row of the matrix; it is better to have them along its columns,
because a program keeps its entries of the rows that are projected."""

PART_NUMBERS = 2**24
"""Numbers of parts that are in memory at a time, 64 MiB: this bounds the rows of a pass."""

WORD_BLOCKS = 32
"""Blocks of the sketch whose signs are in one word."""


@dataclass(frozen=True)
class Sketch:
    """The parts of a count sketch, and the tile of a program."""

    blocks: int
    words: int
    """Of 32 blocks, of a part."""
    parts: int
    narrow: bool
    """A block lies in two rows of the gradient at most."""
    pairs: int
    buckets: int = 128
    num_warps: int = 4


@dataclass(frozen=True)
class Signs:
    """The parts of a product with signs, and the tile of a program: always the same one, because
    the units that multiply tiles of other sizes may add in another order."""

    row_parts: int
    rows: int
    """Of a part."""
    group_parts: int
    groups: int
    """Of 128 columns, of a part."""
    outputs: int = 64
    pairs: int = 32
    num_warps: int = 4

    @property
    def parts(self) -> int:
        """Of the whole product."""
        return self.row_parts * self.group_parts


def limits(
    grad_output: Tensor,
    activation: Tensor,
    offsets: Tensor | None,
    rows: int,
    signs: Tensor | None,
    kind: str,
    dim: int,
    *_: Any,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    out_features, in_features = grad_output.shape[1], activation.shape[1]
    entries = out_features * (in_features + 1)
    largest = max(out_features + 5 * dim, in_features + dim + 1, entries // dim)
    return None if largest < 2**31 - 2**8 else "a layer whose sizes exceed 32 bits"


def sketch_plan(pairs: int, out_features: int, in_features: int, bias: bool, dim: int) -> Sketch:
    """For a gradient (out_features, in_features + bias)."""
    blocks = -(-out_features * (in_features + bias) // dim)
    all_words = -(-blocks // WORD_BLOCKS)
    words = -(-all_words // PARTS)
    narrow, tile = dim <= in_features, 1
    while tile < min(pairs, 8 if narrow else 4):  # 8 would have a stack on sm_80
        tile *= 2
    return Sketch(blocks, words, -(-all_words // words), narrow, tile)


def signs_plan(rows: int, width: int, parts: int = PARTS) -> Signs:
    """For a matrix that has ``rows`` times ``width`` signs for each number of the result."""
    all_groups = -(-width // GROUP)
    groups = -(-all_groups // min(GROUP_PARTS, parts, all_groups))
    group_parts = -(-all_groups // groups)
    part = -(-rows // min(rows, parts // group_parts))
    return Signs(-(-rows // part), part, group_parts, groups)


def pairs_of_a_pass(pairs: int, numbers: int) -> int:
    """Rows that are projected at a time, if each has so many numbers in all parts."""
    most = PART_NUMBERS // numbers
    whole = most - most % Signs.pairs  # tiles of them, if there is room for one
    return max(1, min(pairs, whole or most))
