"""Dropout by Philox in PyTorch: what is right.

The number at (t, j) stays if word j mod 4 of the counter

    (j div 4, t mod 2³², t div 2³², 6 · 2²⁴),      key: seed mod 2³², seed div 2³²

is at least p · 2³² (``fmkernels/ops/project_gradients/philox.py`` has the generator).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops.project_gradients.philox import LAYERS, WORD, philox4x32

STREAM = 6 * LAYERS
NUMBERS = 2**20
"""Whose words are in memory at a time."""


def threshold(p: float) -> int:
    """Words below it drop their number."""
    return round(p * 2**32)


def kept(seed: Tensor, first: int, rows: int, columns: int, p: float) -> Tensor:
    """(rows, columns) truth values for the rows from ``first`` on."""
    row = torch.arange(first, first + rows, device=seed.device).unsqueeze(1)
    group = torch.arange(-(-columns // 4), device=seed.device)
    stream = torch.full_like(group, STREAM)
    words = philox4x32((group, row & WORD, row >> 32, stream), (seed & WORD, seed >> 32 & WORD))
    drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[:, :columns]
    return drawn >= threshold(p)


def vera_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """(T, m), () -> (T, m) in x's dtype."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = 1 / (1 - p) if p < 1 else 0.0
    step = max(1, NUMBERS // x.shape[1])
    for first in range(0, len(x), step):
        some = x[first : first + step]
        stays = kept(seed, first, len(some), x.shape[1], p)
        result[first : first + step] = torch.where(stays, some * scale, 0)
    return result
