"""The dense forms: the update of the weight is built, once a call, and kept for backward.

    ΔW = B' A (n, m),   B' = diag(b) B diag(d)

    apart     Y = X W0ᵀ + bias + X ΔWᵀ
    merged    Y = X (W0 + ΔW)ᵀ + bias            and in both    dX = G (W0 + ΔW)

Backward needs X, and no U: with S = Gᵀ X (n, m) and M = S Aᵀ (n, r), in float32 at least,

    grad_d = Σ_n b ⊙ (B ⊙ M),      grad_b = (B ⊙ M) d

Apart is as exact as any other form. Merged rounds W0 + ΔW to the base's dtype for Y, too: exact
enough in float32, but in bfloat16 an update below 2⁻⁹ of a weight is lost.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels._library import Op
from fmkernels.ops.vera_expand import cpp, reference
from fmkernels.ops.vera_linear.products import by, folded_by


def forward_by(
    expand: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    merged: bool,
) -> tuple[Tensor, Tensor]:
    """Y, and ΔW or W0 + ΔW."""
    if merged:
        update = folded_by(expand, weight, A, B, lambda_d, lambda_b)
        return F.linear(x, update, bias), update
    n, m = weight.shape
    scaled = expand.scaled_matrix(B[:n].to(x.dtype), lambda_d, lambda_b)
    update = scaled @ A[:, :m].to(x.dtype)
    return F.linear(x, weight, bias).addmm_(x, update.mT), update


def backward_by(
    expand: ModuleType,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    update: Tensor,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    merged: bool,
    of_x: bool,
    of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, lambda_d and lambda_b; empty tensors for what is not asked for."""
    grad_x, grad_d, grad_b = x.new_empty(0), lambda_d.new_empty(0), lambda_b.new_empty(0)
    if of_x:
        grad_x = grad @ (update if merged else weight + update)
    if of_vectors:
        n, m = weight.shape
        S = expand.sum_of_outer(grad, x).to(reference.wider(x.dtype))
        M = expand.product_of_rows(S, A[:, :m].to(x.dtype))
        grad_d, grad_b = expand.contract(M, B[:n].to(x.dtype), lambda_d, lambda_b)
    return grad_x, grad_d, grad_b


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, lambda_d, lambda_b, merged = inputs
    update = output[1]
    ctx.mark_non_differentiable(update)
    ctx.set_materialize_grads(False)
    ctx.merged = merged
    ctx.save_for_backward(x, weight, update, A, B, lambda_d, lambda_b)


def _backward(
    ctx: Any, on_reference: bool, grad: Tensor | None, _: None = None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,)
    of_x, of_d, of_b = (ctx.needs_input_grad[i] for i in (0, 5, 6))
    grad_x, grad_d, grad_b = VERA_DENSE_BACKWARD.run(
        on_reference, grad, *ctx.saved_tensors, ctx.merged, of_x, of_d or of_b
    )
    of_vectors = (grad_d if of_d else None, grad_b if of_b else None)
    return (grad_x if of_x else None, None, None, None, None, *of_vectors)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), weight.new_empty(weight.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, update: Tensor, A: Tensor, B: Tensor,
    lambda_d: Tensor, lambda_b: Tensor, merged: bool, of_x: bool, of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    vectors = (torch.empty_like(v) if of_vectors else v.new_empty(0) for v in (lambda_d, lambda_b))
    return x.new_empty(x.shape if of_x else 0), *vectors  # type: ignore[return-value]


_LAYER = "Tensor A, Tensor B, Tensor lambda_d, Tensor lambda_b, bool merged"

VERA_DENSE = Op(
    "vera_dense",
    f"(Tensor x, Tensor weight, Tensor? bias, {_LAYER}) -> (Tensor y, Tensor update)",
    reference=by(reference, forward_by),
    cpu=by(cpp, forward_by),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    only_first=True,
)
"""(T, m), (n, m), (n), (r, ≥ m), (≥ n, r), (1, r), (1, n) -> (T, n), and ΔW or W0 + ΔW."""

VERA_DENSE_BACKWARD = Op(
    "vera_dense_backward",
    f"(Tensor grad, Tensor x, Tensor weight, Tensor update, {_LAYER}, bool of_x, bool of_vectors)"
    " -> (Tensor, Tensor, Tensor)",
    reference=by(reference, backward_by),
    cpu=by(cpp, backward_by),
    fake=_fake_backward,
)
"""Gradients of x, lambda_d and lambda_b; empty for what is not asked for."""
