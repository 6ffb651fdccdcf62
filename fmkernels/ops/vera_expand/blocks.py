"""Rows in the order of their adapters, cut into blocks of one adapter; all on the device.

The host knows how many blocks there may be, not how many there are: those past the last are empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops.vera_expand.gpu_config import most_blocks


class Blocks(NamedTuple):
    """Group 0 has the rows of no adapter, group a + 1 those of adapter a; all int64."""

    rows: int
    """Of a block, at most."""
    order: Tensor
    """(T): rows, those of a group in the order in which they came."""
    start: Tensor
    """(groups + 1): where in ``order`` a group begins."""
    first: Tensor
    """(groups + 1): its first block."""
    group: Tensor
    """(blocks): that of each block; past the last, how many groups there are."""

    @property
    def groups(self) -> int:
        """Adapters, and none."""
        return len(self.start) - 1


def blocks_of(adapter_ids: Tensor, adapters: int, rows: int) -> Blocks:
    """(T) integers from −1 on."""
    device = adapter_ids.device
    ids, order = adapter_ids.sort(stable=True)
    start = torch.searchsorted(ids, torch.arange(-1, adapters + 1, device=device))
    first = torch.zeros_like(start)
    torch.cumsum((start.diff() + rows - 1).div(rows, rounding_mode="floor"), 0, out=first[1:])
    count = most_blocks(len(ids), adapters, rows)
    group = torch.searchsorted(first, torch.arange(count, device=device), right=True) - 1
    return Blocks(rows, order, start, first, group)
