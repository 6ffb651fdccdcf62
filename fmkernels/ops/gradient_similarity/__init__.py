"""Exact inner products of per-sample gradients of a linear layer, which are never built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._autocast import product_dtype, without_autocast
from fmkernels.ops.project_gradients import check_shapes

LARGEST = 2040
"""Exponent of a result above which it is infinite in float64, whose range has half of it."""
TILE = 2**22
"""Products of rows that are in memory at a time."""


def gradient_similarity(
    grad_output: Tensor,
    activation: Tensor,
    other_grad_output: Tensor,
    other_activation: Tensor,
    *,
    bias: bool = True,
) -> Tensor:
    """Inner products of the gradients of two batches of samples, exactly.

    With G_b = Σ_s δ_bs [a_bs; 1]ᵀ the gradient of a linear layer for one sample,

        ⟨G_b, G'_c⟩ = Σ_s Σ_t (δ_bs · δ'_ct) (a_bs · a'_ct + 1)

    which is what the inner products of :func:`fmkernels.project_gradients` are on average. For
    gradients of rank 1 it is the product of two inner products.

    Args:
        grad_output: δ, the gradient of a loss at the layer's output: (B, S, out), or (B, out) for
            one row per sample; of any floating dtype and strides.
        activation: a, the layer's input: (B, S, in) or (B, in).
        other_grad_output: δ', (C, T, out) or (C, out); T may differ from S.
        other_activation: a', (C, T, in) or (C, in).
        bias: whether the gradient of the bias counts: with ``bias=False`` there is no + 1.

    Returns:
        (B, C), float32, or float64 if any input is; differentiable.

    Raises:
        TypeError: a tensor is not floating-point, or ``bias`` no truth value.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Inputs of less than float32 are computed in float32, without TF32 and untouched by
        autocast. Each sample's δ and a are first brought near 1 by powers of two, which are undone
        at the end and all at once, so that gradients of 1e-8 and less lose nothing.

    Source:
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024, whose features approximate it.

    Example:
        >>> import torch, fmkernels
        >>> delta, a = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])
        >>> fmkernels.gradient_similarity(delta, a, delta, a)  # (1 · 1) (2 · 2 + 3 · 3 + 1)
        tensor([[14.]])
    """
    op = "gradient_similarity"
    names = ("grad_output", "activation"), ("other_grad_output", "other_activation")
    first, other = (grad_output, activation), (other_grad_output, other_activation)
    for pair_names, pair in zip(names, (first, other), strict=True):
        check_shapes(op, pair_names, *pair)
    for name, mine, theirs in zip(names[1], first, other, strict=True):
        _checks.same_device(op, name, theirs, "grad_output", grad_output)
        if theirs.shape[-1] != mine.shape[-1]:
            raise ValueError(
                f"{op}: {name}: expected rows of {mine.shape[-1]} numbers, as "
                f"{name.removeprefix('other_')} has, got shape {_checks.shape(theirs)}"
            )
    if not isinstance(bias, bool):
        raise TypeError(f"{op}: bias: expected True or False, got {bias!r}")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in first + other) else torch.float32
    with without_autocast(grad_output):
        return _similarity(_Rows(*first, bias, dtype), _Rows(*other, bias, dtype))


class _Rows:
    """The rows of a batch, each sample near 1, and the power of two that it was divided by."""

    def __init__(self, grad_output: Tensor, activation: Tensor, bias: bool, dtype: Any) -> None:
        delta, a = (
            x.to(dtype) if x.ndim == 3 else x.to(dtype).unsqueeze(1)
            for x in (grad_output, activation)
        )
        of_delta, of_a = _exponent(delta, 0.0), _exponent(a, float(bias))
        self.delta = _times_power(delta, -of_delta)  # (B, S, out)
        self.a = _times_power(a, -of_a)  # (B, S, in)
        self.one = _times_power(a.new_full(of_a.shape, bias), -of_a).flatten()  # (B)
        self.exponent = (of_delta + of_a).flatten()  # (B)


def _exponent(values: Tensor, at_least: float) -> Tensor:
    """(B, 1, 1): that of the power of two just above a sample's largest entry, 0 without one."""
    values = values.detach()
    if not values.numel():
        return values.new_zeros(values.shape[0], 1, 1, dtype=torch.int32)
    largest = values.abs().amax(dim=(1, 2), keepdim=True).clamp(min=at_least)
    return torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0)


def _times_power(values: Tensor, exponents: Tensor) -> Tensor:
    """Times 2 to these integers, in two steps, because one power may leave the range."""
    half = exponents // 2
    for part in (half, exponents - half):
        values = values * part.to(values.dtype).exp2()
    return values


def _similarity(first: _Rows, other: _Rows) -> Tensor:
    (count, rows), (others, other_rows) = first.delta.shape[:2], other.delta.shape[:2]
    step = max(1, TILE // max(1, rows * others * other_rows))
    parts = [first.delta.new_zeros(0, others)]
    for start in range(0, count, step):
        part = slice(start, start + step)
        products = _products(first.delta[part], other.delta)
        inputs = _products(first.a[part], other.a)
        inputs = inputs + (first.one[part, None] * other.one)[:, None, :, None]
        sums = (products * inputs).sum(dim=(1, 3))  # (b, C)
        exponents = (first.exponent[part, None] + other.exponent).clamp(-LARGEST, LARGEST)
        parts.append(_times_power(sums.double(), exponents).to(sums.dtype))
    return torch.cat(parts)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """(B, S, D), (C, T, D) -> (B, S, C, T)."""
    dtype = product_dtype(x)
    products = (x.flatten(0, 1).to(dtype) @ y.flatten(0, 1).to(dtype).mT).to(x.dtype)
    return products.reshape(*x.shape[:2], *y.shape[:2])
