"""VeRA's shared matrices in PyTorch: what is right.

**By position.** Entry (i, j) of a matrix is a function of the word j mod 4 of the counter

    (j div 4, i, 0, stream · 2²⁴),      key: seed mod 2³², seed div 2³²

where the stream is 7 for A and 8 for B (``fmkernels/ops/project_gradients/philox.py`` has the
generator). Neither the rank nor the width is in it. The upper 24 bits u of the word give

    k = 2 u + 1 − 2²⁴,      entry = k · c,      c = √3/2²⁴ in float32

k is odd, from −(2²⁴ − 1) to 2²⁴ − 1, and so exact in float32; the product is the only rounding. The
mean is 0, because −k is as likely as k; the mean of k² is (2⁴⁸ − 1)/3, so the variance is 1 up to
the rounding of c, and all entries are inside of (−√3, √3).

**In order.** PEFT's: ``torch.nn.init`` with one generator for A and then B. The gain is √2 and the
fan of a matrix the number of its columns, so the variance is 2/m for A and 2/r for B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmkernels.ops.project_gradients.philox import LAYERS, WORD, philox4x32

A_STREAM, B_STREAM = 7 * LAYERS, 8 * LAYERS

STEP = float.fromhex("0x1.bb67aep-24")
"""c: √3/2²⁴, rounded to float32."""

NUMBERS = 2**20
"""Whose words are in memory at a time."""


def uniform(words: Tensor) -> Tensor:
    """int64 words below 2³² -> entries, float32."""
    odd = (words >> 7 | 1) - 2**24
    return odd.float() * STEP


def part(seed: Tensor, stream: int, first: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) entries of the rows from ``first`` on, float32."""
    row = torch.arange(first, first + rows, device=seed.device).unsqueeze(1)
    group = torch.arange(-(-columns // 4), device=seed.device)
    counter = group, row, torch.zeros_like(group), torch.full_like(group, stream)
    words = philox4x32(counter, (seed & WORD, seed >> 32 & WORD))
    drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # (rows, groups, 4)
    return uniform(drawn.flatten(-2)[:, :columns])


def matrix(seed: Tensor, stream: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns), some rows at a time."""
    result = torch.empty(rows, columns, dtype=dtype, device=seed.device)
    step = max(1, NUMBERS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        result[first : first + count] = part(seed, stream, first, count, columns)
    return result


def vera_matrices(
    seed: Tensor, rank: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """() int64 -> (rank, in), (out, rank) by position."""
    A = matrix(seed, A_STREAM, rank, in_features, dtype)
    return A, matrix(seed, B_STREAM, out_features, rank, dtype)


def in_order(
    rank: int, in_features: int, out_features: int, init: str, seed: int
) -> tuple[Tensor, Tensor]:
    """(rank, in), (out, rank) of PyTorch's generator, float32 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    fill = nn.init.kaiming_uniform_ if init == "kaiming_uniform" else nn.init.kaiming_normal_
    A = torch.empty(rank, in_features, dtype=torch.float32, device="cpu")
    B = torch.empty(out_features, rank, dtype=torch.float32, device="cpu")
    return fill(A, generator=generator), fill(B, generator=generator)
