"""vera_matrices on the CPU: float32 from the extension, rounded to the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._library import native_function
from fmkernels.ops.vera_matrices.reference import A_STREAM, B_STREAM

_uniform = native_function(
    "vera_uniform", "(Tensor seed, int stream, int rows, int columns) -> Tensor"
)


def vera_matrices(
    seed: Tensor, rank: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """() int64 -> (rank, in), (out, rank) by position."""
    A = _uniform(seed, A_STREAM, rank, in_features)
    B = _uniform(seed, B_STREAM, out_features, rank)
    return A.to(dtype), B.to(dtype)
