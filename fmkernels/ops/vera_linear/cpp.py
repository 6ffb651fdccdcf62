"""VeRA's dense forms on the CPU: the reference's products, and the extension between them."""

from __future__ import annotations

from torch import Tensor

from fmkernels.ops.vera_expand.cpp import (
    TAKEN,
    contract,
    product_of_rows,
    scaled_matrix,
    sum_of_outer,
)
from fmkernels.ops.vera_linear import reference


def vera_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    merged: bool,
) -> tuple[Tensor, Tensor]:
    """(T, m), (n, m), (n), (r, ≥ m), (≥ n, r), (1, r), (1, n) -> (T, n), and ΔW or W0 + ΔW."""
    if x.dtype not in TAKEN:
        return reference.vera_dense(x, weight, bias, A, B, lambda_d, lambda_b, merged)
    scaled = scaled_matrix(B[: len(weight)].to(x.dtype), lambda_d, lambda_b)
    return reference.output_and_update(x, weight, bias, scaled, A, merged)


def vera_dense_backward(
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
    if x.dtype not in TAKEN:
        return reference.vera_dense_backward(
            grad, x, weight, update, A, B, lambda_d, lambda_b, merged, of_x, of_vectors
        )
    grad_x, grad_d, grad_b = x.new_empty(0), lambda_d.new_empty(0), lambda_b.new_empty(0)
    if of_x:
        grad_x = reference.gradient_of_x(grad, weight, update, merged)
    if of_vectors:
        own_A = A[:, : x.shape[1]].to(x.dtype)
        M = product_of_rows(sum_of_outer(grad, x), own_A)
        own_B = B[: len(weight)].to(x.dtype).contiguous()
        grad_d, grad_b = contract(M, own_B, lambda_d, lambda_b)
    return grad_x, grad_d, grad_b
