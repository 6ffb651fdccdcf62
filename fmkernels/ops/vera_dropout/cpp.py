"""vera_dropout on the CPU, for dense float32 and bfloat16; the reference takes the others."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._library import native_function
from fmkernels.ops.vera_dropout import reference

_drop = native_function("vera_drop", "(Tensor x, Tensor seed, float p) -> Tensor")


def vera_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """(T, m), () -> (T, m) in x's dtype."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return reference.vera_dropout(x, seed, p)
    dropped: Tensor = _drop(x.contiguous(), seed, p)
    return dropped
