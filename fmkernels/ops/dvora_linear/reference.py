"""DVoRA's magnitude in PyTorch, with the norms ν as constants.

    c = magnitude / ν,     Y = c ⊙ P + bias,     P the output of the layer with VeRA's update
    dP = c ⊙ G,            grad_magnitude = Σ_t G ⊙ P / ν,             grad_bias = Σ_t G

P is kept: to divide Y by c would fail where c is 0. Some rows at a time, because P may be large and
of a half type while c, products and sums are of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = 2**20
"""In float32 at a time."""


def dvora_scale(before: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """(T, n), (n), (n), (n) -> (T, n) in the dtype of ``before``."""
    c = magnitude.to(norms.dtype) / norms
    y = torch.empty_like(before, memory_format=torch.contiguous_format)
    for part, rows in zip(_parts(y), _parts(before), strict=True):
        scaled = rows.to(norms.dtype) * c
        part.copy_(scaled if bias is None else scaled + bias)
    return y


def dvora_scale_backward(
    grad: Tensor, before: Tensor, magnitude: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``before``, of the magnitude, and of the bias in float32."""
    c = magnitude.to(norms.dtype) / norms
    grad_before = torch.empty_like(before, memory_format=torch.contiguous_format)
    of_c, of_bias = torch.zeros_like(norms), torch.zeros_like(norms)
    for part, g, rows in zip(_parts(grad_before), _parts(grad), _parts(before), strict=True):
        wide = g.to(norms.dtype).contiguous()  # a sum of other strides has another order
        part.copy_(wide * c)
        of_c += (wide * rows).sum(dim=0)
        of_bias += wide.sum(dim=0)
    return grad_before, (of_c / norms).to(magnitude.dtype), of_bias


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = rows.split(max(1, NUMBERS // rows.shape[1]))
    return parts
