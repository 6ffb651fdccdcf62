"""A linear layer with a DVoRA adapter: VeRA's update, and a magnitude for every output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.dvora_linear import reference
from fmkernels.ops.dvora_linear.norms import DvoraNorms, built_norms
from fmkernels.ops.vera_expand import check_vectors
from fmkernels.ops.vera_linear import check_bias, check_layer, vera_linear
from fmkernels.ops.vera_shrink import check_frozen
from fmkernels.ops.vera_shrink.gpu_config import limits

__all__ = ["DvoraNorms", "dvora_linear"]

NAME = "dvora_linear"


def dvora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    magnitude: Tensor,
    *,
    cache: DvoraNorms | None = None,
) -> Tensor:
    """A linear layer whose weight is adapted by VeRA in direction and by a vector in magnitude.

        Y = c ⊙ (X W0ᵀ + b ⊙ (((X Aᵀ) ⊙ d) Bᵀ)) + bias,     c = magnitude / ‖rows of W0 + ΔW‖

    The norms count as constants in backward, as in DoRA.

    Args:
        x: (…, m), of any floating dtype and strides.
        weight: W0, (n, m).
        bias: (n), or None.
        A: (r, ≥ m), frozen; the first m columns count.
        B: (≥ n, r), frozen; the first n rows count.
        lambda_d: d, (r), of any floating dtype.
        lambda_b: b, (n).
        magnitude: (n); the norms of W0's rows to begin with.
        cache: the norms of this layer, kept between calls: they are computed again only when a
            vector or a matrix has changed. Without it they are computed in each call.

    Returns:
        Y, (…, n), in x's dtype, or in that of autocast where it is on. It is differentiable in x,
        weight, bias, both vectors and the magnitude.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Norms and c in float32 (float64 for float64). Backward keeps the output before it is scaled,
        (…, n), and what :func:`fmkernels.vera_linear` keeps.

    Source:
        Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, ICML 2024; Kopiczko, Blankevoort,
        Asano, *VeRA*, ICLR 2024, where the two are combined.

    Example:
        >>> import torch, fmkernels
        >>> x, weight = torch.randn(5, 12), torch.randn(8, 12)
        >>> A, B, d, b = torch.randn(4, 12), torch.randn(8, 4), torch.randn(4), torch.zeros(8)
        >>> y = fmkernels.dvora_linear(x, weight, None, A, B, d, b, 2 * weight.norm(dim=1))
        >>> torch.allclose(y, 2 * x @ weight.mT, atol=1e-4)  # b is 0: the direction is W0's
        True
    """
    _checks.at_call(_check, (), x, weight, A, B, lambda_d, lambda_b, magnitude)
    check_bias(NAME, bias, weight)
    check_frozen(NAME, "A", A)
    check_frozen(NAME, "B", B)
    _check_cache(cache, weight, A, B)
    if cache is None:
        fixed = built_norms(weight, A, B, lambda_d, lambda_b)
    else:
        fixed = cache(lambda_d, lambda_b)
    before = vera_linear(x, weight, None, A, B, lambda_d, lambda_b)
    y: Tensor = DVORA_SCALE(before.reshape(-1, before.shape[-1]), magnitude, fixed, bias)
    return y.reshape(before.shape)


def _check_cache(cache: Any, weight: Tensor, A: Tensor, B: Tensor) -> None:
    """None, or that of this layer."""
    if cache is None:
        return
    if not isinstance(cache, DvoraNorms):
        raise TypeError(f"{NAME}: cache: expected DvoraNorms or None, got {type(cache).__name__}")
    if any(a is not b for a, b in zip(cache.matrices, (weight, A, B), strict=True)):
        raise ValueError(
            f"{NAME}: cache: expected the norms of this weight, A and B, got those of others (or "
            "these were moved, cast or replaced); make a new one, DvoraNorms(weight, A, B)"
        )


def _check(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor,
    magnitude: Tensor,
) -> bool:  # fmt: skip
    check_layer(NAME, x, weight, A, B)
    check_vectors(NAME, lambda_d, lambda_b, A.shape[0], weight.shape[0], x, None)
    _checks.floating_tensor(NAME, "magnitude", magnitude)
    _checks.same_device(NAME, "magnitude", magnitude, "x", x)
    if _checks.shape(magnitude) != (weight.shape[0],):
        raise ValueError(
            f"{NAME}: magnitude: expected shape ({weight.shape[0]},), one for each output, "
            f"got {_checks.shape(magnitude)}"
        )
    return True


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    before, magnitude, norms, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(before, magnitude, norms)


def _backward(ctx: Any, on_reference: bool, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, magnitude, norms = ctx.saved_tensors
    grad_before, grad_magnitude, grad_bias = DVORA_SCALE_BACKWARD.run(
        on_reference, grad, before, magnitude, norms
    )
    if ctx.bias_dtype is None or not ctx.needs_input_grad[3]:
        return grad_before, grad_magnitude
    return grad_before, grad_magnitude, None, grad_bias.to(ctx.bias_dtype)


_GPU = (GpuKernel("triton", "fmkernels.ops.dvora_linear.gpu", limits),)

DVORA_SCALE = Op(
    "dvora_scale",
    "(Tensor before, Tensor magnitude, Tensor norms, Tensor? bias) -> Tensor",
    reference=reference.dvora_scale,
    fake=lambda before, *_: torch.empty_like(before, memory_format=torch.contiguous_format),
    setup_context=_setup_context,
    backward=_backward,
    gpu=_GPU,
)
"""(T, n), (n), (n), (n) -> (T, n)."""

DVORA_SCALE_BACKWARD = Op(
    "dvora_scale_backward",
    "(Tensor grad, Tensor before, Tensor magnitude, Tensor norms) -> (Tensor, Tensor, Tensor)",
    reference=reference.dvora_scale_backward,
    fake=lambda grad, before, magnitude, norms: (
        torch.empty_like(before, memory_format=torch.contiguous_format),
        torch.empty_like(magnitude),
        torch.empty_like(norms),
    ),
    gpu=_GPU,
)
"""Gradients of what is scaled, of the magnitude, and of the bias."""
