"""The form by two products through the rank, of a layer that is not trained, as one op.

    U = X Aᵀ,     Y = X W0ᵀ + bias,     Y += U B'ᵀ;          dX = G W0,     dX += dU A

The update is added in place, forward and backward, where two ops of autograd would write Y and dX
once more each. For many rows it is folded into the weight instead:

    U = X Aᵀ,     Y = X (W0 + B' A)ᵀ + bias;                 dX = G (W0 + B' A)

where both are the base layer's own products, of a matrix that is made for the call and not kept.
U is what the gradients of the vectors need (see ``vera_expand``). In half types Y is never folded
unasked: training must see updates below 2⁻⁹ of a weight. dX may be: rounded to its own dtype, it
has no room for them in either way.

What is not a stock product is ``expand``'s: a module with ``add_update_``, ``scaled_matrix`` and
``vera_expand_backward``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels._library import GpuKernel, Op
from fmkernels.ops.vera_expand import VERA_EXPAND_BACKWARD, cpp, reference
from fmkernels.ops.vera_shrink.gpu_config import limits


def forward_by(
    expand: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
    folds_y: bool,
    folds_x: bool,
) -> tuple[Tensor, Tensor]:
    """Y, and U."""
    u = F.linear(x, A[:, : x.shape[1]].to(x.dtype))
    adapter = A, B, lambda_d, lambda_b, adapter_ids
    return expanded_by(expand, x, weight, bias, u, *adapter, by_matrix, folds_y, folds_x), u


def expanded_by(
    expand: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
    folds_y: bool,
    folds_x: bool,
) -> Tensor:
    """Y, of a U that is known."""
    if folds_y:
        return F.linear(x, folded_by(expand, weight, A, B, lambda_d, lambda_b), bias)
    base = F.linear(x, weight, bias)
    y: Tensor = expand.add_update_(base, u, lambda_d, lambda_b, B, adapter_ids, by_matrix)
    return y


def backward_by(
    expand: ModuleType,
    grad: Tensor,
    weight: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
    folds_x: bool,
    of_x: bool,
    of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, lambda_d and lambda_b; empty tensors for what is not asked for."""
    of_u = of_x and not folds_x
    grad_u, grad_d, grad_b = expand.vera_expand_backward(
        grad, u, lambda_d, lambda_b, B, adapter_ids, by_matrix, of_u, of_vectors
    )
    grad_x = grad.new_empty(0)
    if of_u:
        own_A = A[:, : weight.shape[1]].to(grad.dtype)
        grad_x = (grad @ weight).addmm_(grad_u, own_A)
    elif of_x:
        grad_x = grad @ folded_by(expand, weight, A, B, lambda_d, lambda_b)
    return grad_x, grad_d, grad_b


def folded_by(
    expand: ModuleType, weight: Tensor, A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor
) -> Tensor:
    """W0 + B' A (n, m), rounded once."""
    n, m = weight.shape
    scaled = expand.scaled_matrix(B[:n].to(weight.dtype), lambda_d, lambda_b)
    return torch.addmm(weight, scaled, A[:, :m].to(weight.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, _, *adapter, by_matrix, _, ctx.folds_x = inputs
    ctx.by_matrix = by_matrix or ctx.folds_x  # which needs M, and B' anyway
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, u, *adapter)


def _backward(
    ctx: Any, on_reference: bool, grad: Tensor | None, _: None = None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,)
    of_x, of_d, of_b = (ctx.needs_input_grad[i] for i in (0, 5, 6))
    grad_x, *vectors = _gradients(ctx, on_reference, grad, of_x, of_d, of_b)
    return (grad_x, None, None, None, None, *vectors)


def _gradients(
    ctx: Any, on_reference: bool, grad: Tensor, of_x: bool, of_d: bool, of_b: bool
) -> tuple[Tensor | None, ...]:
    """Those of x, lambda_d and lambda_b: of x all of it."""
    grad_x, grad_d, grad_b = VERA_PRODUCTS_BACKWARD.run(
        on_reference, grad, *ctx.saved_tensors, ctx.by_matrix, ctx.folds_x, of_x, of_d or of_b
    )
    return grad_x if of_x else None, grad_d if of_d else None, grad_b if of_b else None


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], A.shape[0])


def _fake_backward(
    grad: Tensor, weight: Tensor, u: Tensor, A: Tensor, B: Tensor, lambda_d: Tensor,
    lambda_b: Tensor, adapter_ids: Tensor | None, by_matrix: bool, folds_x: bool, of_x: bool,
    of_vectors: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    vectors = (v.new_empty(v.shape if of_vectors else 0) for v in (lambda_d, lambda_b))
    return grad.new_empty((grad.shape[0], weight.shape[1]) if of_x else 0), *vectors


def by(expand: ModuleType, function: Any) -> Any:
    """The function with what is not a stock product by one module, called as an op's kernel is."""
    return lambda *arguments: function(expand, *arguments)


_ADAPTER = (
    "Tensor A, Tensor B, Tensor lambda_d, Tensor lambda_b, Tensor? adapter_ids, bool by_matrix"
)
_FOLDS = "bool folds_y, bool folds_x"

GPU = (GpuKernel("triton", "fmkernels.ops.vera_linear.gpu", limits),)

VERA_PRODUCTS = Op(
    "vera_products",
    f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}, {_FOLDS}) -> (Tensor y, Tensor u)",
    reference=by(reference, forward_by),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    only_first=True,
    cpu=by(cpp, forward_by),
    gpu=GPU,
)
"""(T, m), (n, m), (n), (r, ≥ m), (≥ n, r), (N, r), (N, n), (T) int64 -> (T, n), (T, r)."""


def _setup_expanded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, u, *adapter, by_matrix, _, ctx.folds_x = inputs
    ctx.by_matrix = by_matrix or ctx.folds_x
    ctx.save_for_backward(weight, u, *adapter)


def _expanded_backward(ctx: Any, on_reference: bool, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_u, of_d, of_b = (ctx.needs_input_grad[i] for i in (0, 3, 6, 7))
    if not of_u:
        grad_x, *vectors = _gradients(ctx, on_reference, grad, of_x, of_d, of_b)
        return (grad_x, None, None, None, None, None, *vectors)
    weight, u, _, B, lambda_d, lambda_b, ids = ctx.saved_tensors
    grad_x = grad @ weight if of_x else None
    grad_u, grad_d, grad_b = VERA_EXPAND_BACKWARD.run(
        on_reference, grad, u, lambda_d, lambda_b, B, ids, ctx.by_matrix, of_u, of_d or of_b
    )
    of_vectors = (grad_d if of_d else None, grad_b if of_b else None)
    return (grad_x, None, None, grad_u, None, None, *of_vectors)


VERA_EXPANDED = Op(
    "vera_expanded",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor u, {_ADAPTER}, {_FOLDS}) -> Tensor",
    reference=by(reference, expanded_by),
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    setup_context=_setup_expanded,
    backward=_expanded_backward,
    cpu=by(cpp, expanded_by),
    gpu=GPU,
)
"""The same of a U (T, r) that is known, because another layer reads x, too: -> (T, n).

If U requires a gradient, the adapter's part of x's goes there; else x gets all of it.
"""

VERA_PRODUCTS_BACKWARD = Op(
    "vera_products_backward",
    f"(Tensor grad, Tensor weight, Tensor u, {_ADAPTER}, bool folds_x, bool of_x, bool of_vectors)"
    " -> (Tensor, Tensor, Tensor)",
    reference=by(reference, backward_by),
    fake=_fake_backward,
    cpu=by(cpp, backward_by),
    gpu=GPU,
)
"""Gradients of x, lambda_d and lambda_b; empty for what is not asked for."""
