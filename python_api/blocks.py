"""Rows that arrive in blocks and are read as one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import checksum

SAMPLED = 8
"""Rows of a block that tell whether it was written to: a buffer that is used again was, in all."""
CHECKED = 2**16
"""Rows that are looked through at a time."""


class Blocks:
    """Blocks (M_i, D) that become one when they are asked for; each row is then copied once.

    A block that needs no conversion is not copied, and read where its owner has it.

    Example:
        >>> blocks = Blocks(torch.empty(0, 2))
        >>> blocks.append(torch.zeros(1, 2))
        >>> blocks.append(torch.ones(1, 2))
        >>> blocks.whole()
        tensor([[0., 0.],
                [1., 1.]])
    """

    def __init__(self, empty: Tensor) -> None:
        self.empty = empty
        """(0, D), with the dtype and device of all blocks."""
        self._blocks: list[tuple[Tensor, str | None]] = []

    def __len__(self) -> int:
        return sum(len(block) for block, _ in self._blocks)

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return len(self) * self.empty.shape[1] * self.empty.element_size()

    def append(self, rows: Tensor) -> None:
        """Add rows (M, D) at the end."""
        block = rows.to(self.empty.device, self.empty.dtype).contiguous()
        _check_range(rows, block)
        if len(block):
            shared = block.data_ptr() == rows.data_ptr()
            self._blocks.append((block, _sample(block) if shared else None))

    def replace(self, rows: Tensor) -> None:
        """Have these rows (M, D), which nobody else writes to, and no others."""
        self._blocks = [(rows, None)] if len(rows) else []

    def to(self, device: torch.device | str) -> None:
        """Move all rows."""
        self.check()
        self.empty = self.empty.to(device)
        self._blocks = [
            (block, sample) if block.device == self.empty.device else (block.to(device), None)
            for block, sample in self._blocks
        ]

    def whole(self) -> Tensor:
        """All rows (M, D)."""
        self.check()
        blocks = self._blocks
        if len(blocks) <= 1:
            return blocks[0][0] if blocks else self.empty
        total = len(self)
        rows = self.empty.new_empty(total, self.empty.shape[1])
        try:
            while blocks:  # one at a time, each then set free: never twice the bank in memory
                block = blocks[0][0]
                start = total - len(self)
                rows[start : start + len(block)] = block
                del blocks[0]
        finally:  # also when interrupted no row is lost
            done = total - len(self)
            self._blocks[:0] = [(rows[:done], None)] if done else []
        return rows

    def check(self) -> None:
        """Refuse in words if a block was written to: 8 rows of each are compared."""
        for block, sample in self._blocks:
            if sample is not None and _sample(block) != sample:
                raise ValueError(
                    "PatchIndex.add: features: expected an array that is not written to after it "
                    f"was added, got one of shape {tuple(block.shape)} that changed; add a copy of "
                    "a buffer that is used again (.clone() or .copy())"
                )


def _sample(block: Tensor) -> str:
    return checksum(block[:: -(-len(block) // SAMPLED)])


def _check_range(rows: Tensor, block: Tensor) -> None:
    """Refuse finite numbers that the dtype of the block does not have."""
    if torch.finfo(block.dtype).max >= torch.finfo(rows.dtype).max:
        return
    for part, converted in zip(rows.split(CHECKED), block.split(CHECKED), strict=True):
        lost = converted.isinf() & part.isfinite().to(converted.device)
        if lost.any():
            largest = float(part.abs().nan_to_num(posinf=0).max())
            raise ValueError(
                f"PatchIndex.add: features: expected numbers that {block.dtype} has, up to "
                f"{torch.finfo(block.dtype).max:g}, got {largest:g}; choose another dtype, or "
                "divide by the norms for the cosine"
            )
