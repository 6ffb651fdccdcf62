"""VeRA's first half: what all layers that read the same input have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmkernels import _checks
from fmkernels._autocast import lower_precision
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.vera_shrink import reference
from fmkernels.ops.vera_shrink.gpu_config import limits

NAME = "vera_shrink"


def vera_shrink(x: Tensor, A: Tensor) -> Tensor:
    """Multiply by the shared random matrix A: U = X Aᵀ.

    Layers that read the same input, as query, key and value do, need it once. In backward the
    gradients of U that their :func:`fmkernels.vera_expand` give are added, and one product makes
    X's of them.

    Args:
        x: (…, m), of any floating dtype and strides.
        A: (r, ≥ m), frozen: a layer of m inputs takes the first m columns.

    Returns:
        U, (…, r), in x's dtype, or in that of autocast where it is on.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: A is too narrow, on another device, or requires a gradient.

    Numerics:
        One product in the dtype of the result. Backward keeps A alone.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import torch, fmkernels
        >>> x, A = torch.randn(2, 5, 12), torch.randn(4, 16)
        >>> fmkernels.vera_shrink(x, A).shape
        torch.Size([2, 5, 4])
    """
    _checks.at_call(_check, (), x, A)
    check_frozen(NAME, "A", A)
    x = lower_precision(x)
    u: Tensor = VERA_SHRINK(x.reshape(-1, x.shape[-1]), A)
    return u.reshape(*x.shape[:-1], u.shape[1])


def check_frozen(op: str, name: str, matrix: Tensor) -> None:
    """Refuse to leave out a gradient without a word."""
    if matrix.requires_grad:
        raise ValueError(
            f"{op}: {name}: expected a frozen matrix, got one that requires a gradient; "
            f"use {name}.detach(), or {name}.requires_grad_(False)"
        )


def check_shared(op: str, name: str, matrix: Any, x: Tensor, width: int, dim: int) -> None:
    """A shared matrix, of which ``width`` columns (dim 1) or rows (dim 0) are wanted."""
    _checks.floating_tensor(op, name, matrix)
    _checks.same_device(op, name, matrix, "x" if dim else "base", x)
    layout = f"(r, >= {width})" if dim else f"(>= {width}, r)"
    if matrix.ndim != 2 or matrix.shape[dim] < width or not matrix.shape[1 - dim]:
        raise ValueError(
            f"{op}: {name}: expected shape {layout} with r >= 1, got {_checks.shape(matrix)}"
        )


def _check(x: Tensor, A: Tensor) -> bool:
    _checks.floating_tensor(NAME, "x", x)
    check_shared(NAME, "A", A, x, x.shape[-1], dim=1)
    return True


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(A)


def _backward(ctx: Any, on_reference: bool, grad: Tensor) -> Tensor:
    (A,) = ctx.saved_tensors
    grad_x: Tensor = VERA_SHRINK_BACKWARD.run(on_reference, grad, A, ctx.in_features)
    return grad_x


VERA_SHRINK = Op(
    NAME,
    "(Tensor x, Tensor A) -> Tensor",
    reference=reference.vera_shrink,
    fake=lambda x, A: x.new_empty(x.shape[0], A.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
    gpu=(GpuKernel("triton", "fmkernels.ops.vera_shrink.gpu", limits),),
)
"""(T, m), (r, ≥ m) -> (T, r)."""

VERA_SHRINK_BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad, Tensor A, SymInt in_features) -> Tensor",
    reference=reference.vera_shrink_backward,
    fake=lambda grad, A, in_features: grad.new_empty(grad.shape[0], in_features),
)
"""(T, r), (r, ≥ m) -> (T, m)."""
