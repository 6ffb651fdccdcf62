"""The form by two products through the rank, of a layer that is not trained, as one op.

    U = X Aᵀ,     Y = X W0ᵀ + bias,     Y += U B'ᵀ;          dX = G W0,     dX += dU A

The update is added in place, forward and backward, where two ops of autograd would write Y and dX
once more each. What lies between the products is ``expand``'s: a module with ``add_update_`` and
``vera_expand_backward``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

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
) -> tuple[Tensor, Tensor]:
    """Y, and U."""
    u = F.linear(x, A[:, : x.shape[1]].to(x.dtype))
    return expanded_by(expand, x, weight, bias, u, B, lambda_d, lambda_b, adapter_ids, by_matrix), u


def expanded_by(
    expand: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
) -> Tensor:
    """Y, of a U that is known."""
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
    of_x: bool,
    of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, lambda_d and lambda_b; empty tensors for what is not asked for."""
    grad_u, grad_d, grad_b = expand.vera_expand_backward(
        grad, u, lambda_d, lambda_b, B, adapter_ids, by_matrix, of_x, of_vectors
    )
    grad_x = grad.new_empty(0)
    if of_x:
        own_A = A[:, : weight.shape[1]].to(grad.dtype)
        grad_x = (grad @ weight).addmm_(grad_u, own_A)
    return grad_x, grad_d, grad_b


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, _, A, B, lambda_d, lambda_b, adapter_ids, by_matrix = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.by_matrix = by_matrix
    ctx.save_for_backward(weight, u, A, B, lambda_d, lambda_b, adapter_ids)


def _backward(
    ctx: Any, on_reference: bool, grad: Tensor | None, _: None = None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,)
    of_x, of_d, of_b = (ctx.needs_input_grad[i] for i in (0, 5, 6))
    grad_x, grad_d, grad_b = VERA_PRODUCTS_BACKWARD.run(
        on_reference, grad, *ctx.saved_tensors, ctx.by_matrix, of_x, of_d or of_b
    )
    of_vectors = (grad_d if of_d else None, grad_b if of_b else None)
    return (grad_x if of_x else None, None, None, None, None, *of_vectors)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], A.shape[0])


def _fake_backward(
    grad: Tensor, weight: Tensor, u: Tensor, A: Tensor, B: Tensor, lambda_d: Tensor,
    lambda_b: Tensor, adapter_ids: Tensor | None, by_matrix: bool, of_x: bool, of_vectors: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    vectors = (v.new_empty(v.shape if of_vectors else 0) for v in (lambda_d, lambda_b))
    return grad.new_empty((grad.shape[0], weight.shape[1]) if of_x else 0), *vectors


def _by(function: Any, expand: ModuleType) -> Any:
    """The function with the products' other half by one module, called as an op's kernel is."""
    return lambda *arguments: function(expand, *arguments)


_ADAPTER = (
    "Tensor A, Tensor B, Tensor lambda_d, Tensor lambda_b, Tensor? adapter_ids, bool by_matrix"
)

GPU = (GpuKernel("triton", "fmkernels.ops.vera_linear.gpu", limits),)

VERA_PRODUCTS = Op(
    "vera_products",
    f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTER}) -> (Tensor y, Tensor u)",
    reference=_by(forward_by, reference),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    only_first=True,
    cpu=_by(forward_by, cpp),
    gpu=GPU,
)
"""(T, m), (n, m), (n), (r, ≥ m), (≥ n, r), (N, r), (N, n), (T) int64 -> (T, n), (T, r)."""


def _setup_expanded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, u, B, lambda_d, lambda_b, adapter_ids, ctx.by_matrix = inputs
    ctx.save_for_backward(weight, u, lambda_d, lambda_b, B, adapter_ids)


def _expanded_backward(ctx: Any, on_reference: bool, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_u, of_d, of_b = (ctx.needs_input_grad[i] for i in (0, 3, 5, 6))
    weight, *adapter = ctx.saved_tensors
    grad_x = grad @ weight if of_x else None
    grad_u, grad_d, grad_b = VERA_EXPAND_BACKWARD.run(
        on_reference, grad, *adapter, ctx.by_matrix, of_u, of_d or of_b
    )
    of_vectors = (grad_d if of_d else None, grad_b if of_b else None)
    return (grad_x, None, None, grad_u if of_u else None, None, *of_vectors)


VERA_EXPANDED = Op(
    "vera_expanded",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor B, Tensor lambda_d, Tensor lambda_b,"
    " Tensor? adapter_ids, bool by_matrix) -> Tensor",
    reference=_by(expanded_by, reference),
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    setup_context=_setup_expanded,
    backward=_expanded_backward,
    cpu=_by(expanded_by, cpp),
    gpu=GPU,
)
"""The same of a U (T, r) that is known, because another layer reads x, too: -> (T, n)."""

VERA_PRODUCTS_BACKWARD = Op(
    "vera_products_backward",
    f"(Tensor grad, Tensor weight, Tensor u, {_ADAPTER}, bool of_x, bool of_vectors)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_by(backward_by, reference),
    fake=_fake_backward,
    cpu=_by(backward_by, cpp),
    gpu=GPU,
)
"""Gradients of x, lambda_d and lambda_b; empty for what is not asked for."""
