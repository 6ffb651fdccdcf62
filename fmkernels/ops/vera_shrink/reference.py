"""VeRA's first half in PyTorch: U = X Aᵀ, and backward dX = dU A."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def vera_shrink(x: Tensor, A: Tensor) -> Tensor:
    """(T, m), (r, ≥ m) -> (T, r) in x's dtype."""
    return F.linear(x, A[:, : x.shape[1]].to(x.dtype))


def vera_shrink_backward(grad: Tensor, A: Tensor, in_features: int) -> Tensor:
    """(T, r), (r, ≥ m) -> (T, m) in grad's dtype."""
    return grad @ A[:, :in_features].to(grad.dtype)
