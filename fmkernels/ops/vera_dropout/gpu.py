"""vera_dropout on NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops.vera_dropout import reference
from fmkernels.ops.vera_dropout.triton import vera_dropout_kernel

ROWS, COLUMNS = 4, 512
"""That a program has: 16 numbers for each of 128 threads."""


def vera_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """(T, m), () -> (T, m) in x's dtype."""
    tokens, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    vera_dropout_kernel[(-(-tokens // ROWS) * -(-width // COLUMNS),)](
        x,
        seed,
        y,
        tokens,
        width,
        *x.stride(),
        reference.threshold(p),
        1 / (1 - p) if p < 1 else 0.0,
        BT=ROWS,
        BN=COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y
