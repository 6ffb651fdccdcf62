"""VeRA's dense forms in PyTorch: the update of the weight is built, once a call.

    ΔW = B' A (n, m),   B' = diag(b) B diag(d)

    apart     Y = X W0ᵀ + bias + X ΔWᵀ
    merged    Y = X (W0 + ΔW)ᵀ + bias            and in both    dX = G (W0 + ΔW)

Backward needs X, and no U: with S = Gᵀ X (n, m) and M = S Aᵀ (n, r), in float32 at least,

    grad_d = Σ_n b ⊙ (B ⊙ M),      grad_b = (B ⊙ M) d

Apart is as exact as any other form. Merged rounds W0 + ΔW to the base's dtype for Y, too: exact
enough in float32, but in bfloat16 an update below 2⁻⁹ of a weight is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels.ops.vera_expand.reference import contract, scaled_matrix, sum_of_outer


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
    scaled = scaled_matrix(B[: len(weight)].to(x.dtype), lambda_d, lambda_b)
    return output_and_update(x, weight, bias, scaled, A, merged)


def output_and_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, scaled: Tensor, A: Tensor, merged: bool
) -> tuple[Tensor, Tensor]:
    """Y, and ΔW or W0 + ΔW, from B' (n, r)."""
    own_A = A[:, : x.shape[1]].to(x.dtype)
    if merged:
        update = torch.addmm(weight, scaled, own_A)
        return F.linear(x, update, bias), update
    update = scaled @ own_A
    return F.linear(x, weight, bias).addmm_(x, update.mT), update


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
    grad_x, grad_d, grad_b = x.new_empty(0), lambda_d.new_empty(0), lambda_b.new_empty(0)
    if of_x:
        grad_x = gradient_of_x(grad, weight, update, merged)
    if of_vectors:
        M = product_of_rows(sum_of_outer(grad, x), A[:, : x.shape[1]])
        grad_d, grad_b = contract(M, B[: len(weight)].to(x.dtype), lambda_d, lambda_b)
    return grad_x, grad_d, grad_b


def gradient_of_x(grad: Tensor, weight: Tensor, update: Tensor, merged: bool) -> Tensor:
    """dX (T, m)."""
    return grad @ (update if merged else weight + update)


def product_of_rows(S: Tensor, A: Tensor) -> Tensor:
    """S Aᵀ (n, r) in S's dtype."""
    return S @ A.mT.to(S.dtype)
