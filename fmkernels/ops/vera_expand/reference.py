"""VeRA's second half in PyTorch: what is right.

With U = X Aᵀ (T, r) from :func:`fmkernels.vera_shrink`, the vectors d (r) and b (n), and B (n, r),

    Z = (U ⊙ d) Bᵀ,        Y = base + b ⊙ Z

**Matrix form.** With B' = diag(b) B diag(d), made once, Y = base + U B'ᵀ is one product and no
tensor of T rows is scaled. Backward, for the gradient G at Y,

    dU = G B',      M = Gᵀ U (n, r),      grad_d = Σ_n b ⊙ (B ⊙ M),      grad_b = (B ⊙ M) d

because grad_b_i = Σ_t G_ti Z_ti = Σ_k B_ik d_k Σ_t G_ti U_tk. So Z is neither kept nor made again.
M stays in float32 at least, whatever the dtype of G and U: where these have a mean M is much larger
than what random signs leave of it.

**Vector form.** To make B' takes as long as to scale n r / (n + r) rows: for fewer rows, as in
decoding, and wherever each row has an adapter a_t of its own, the rows are scaled,

    Y = base + b_a ⊙ ((U ⊙ d_a) Bᵀ),     dV = (G ⊙ b_a) B,     dU = dV ⊙ d_a
    grad_d[a] = Σ_{t: a_t = a} U_t ⊙ dV_t,        grad_b[a] = Σ_{t: a_t = a} G_t ⊙ Z_t

with Z made once more. An adapter of −1 is none: its row of Y is the base's, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 2**22
"""Multiplications, of which nobody sees whether they are in float64."""


def vera_expand(
    base: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
) -> Tensor:
    """(T, n), (T, r), (N, r), (N, n), (≥ n, r), (T) -> (T, n) in base's dtype."""
    own = base.clone(memory_format=torch.contiguous_format) if by_matrix else base
    return add_update_(own, u, lambda_d, lambda_b, B, adapter_ids, by_matrix)


def add_update_(
    base: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
) -> Tensor:
    """The same; in the matrix form base may be written over."""
    B = B[: base.shape[1]].to(u.dtype)
    if by_matrix:
        scaled = scaled_matrix(B, lambda_d, lambda_b)
        if base.dtype == u.dtype:
            return base.addmm_(u, scaled.mT)
        return (base + u @ scaled.mT).to(base.dtype)
    z = scale_rows(u, lambda_d, adapter_ids) @ B.mT
    return add_scaled(base, z, lambda_b, adapter_ids)


def vera_expand_backward(
    grad: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
    of_u: bool,
    of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, lambda_d and lambda_b; empty tensors for what is not asked for."""
    B = B[: grad.shape[1]].to(u.dtype)
    grad = grad.to(u.dtype)
    grad_u, grad_d, grad_b = u.new_empty(0), lambda_d.new_empty(0), lambda_b.new_empty(0)
    if by_matrix:
        if of_u:
            grad_u = grad @ scaled_matrix(B, lambda_d, lambda_b)
        if of_vectors:
            grad_d, grad_b = contract(sum_of_outer(grad, u), B, lambda_d, lambda_b)
        return grad_u, grad_d, grad_b
    grad_v = scale_rows(grad, lambda_b, adapter_ids) @ B
    if of_u:
        grad_u = scale_rows(grad_v, lambda_d, adapter_ids)
    if of_vectors:
        z = scale_rows(u, lambda_d, adapter_ids) @ B.mT
        grad_d = sum_of_adapters(u, grad_v, lambda_d, adapter_ids)
        grad_b = sum_of_adapters(grad, z, lambda_b, adapter_ids)
    return grad_u, grad_d, grad_b


def scaled_matrix(B: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """diag(b) B diag(d) of (n, r), (1, r), (1, n), rounded once."""
    wide = wider(B.dtype)
    return (lambda_b.to(wide).mT * B * lambda_d.to(wide)).to(B.dtype)


def contract(M: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of d (1, r) and b (1, n) from M = Gᵀ U (n, r); terms of either sign may leave
    little, so they are added in float64."""
    both = B.double() * M
    grad_d = lambda_b.double() @ both
    grad_b = both @ lambda_d[0].double()
    return grad_d.to(lambda_d.dtype), grad_b.unsqueeze(0).to(lambda_b.dtype)


def sum_of_outer(grad: Tensor, u: Tensor) -> Tensor:
    """Gᵀ U (n, r) in float32 (float64 for float64, and wherever that takes no time)."""
    if grad.dtype in (torch.float16, torch.bfloat16) and grad.is_cuda:
        return torch.mm(grad.mT, u, out_dtype=torch.float32)
    few = grad.numel() * u.shape[1] <= FEW
    wide = torch.float64 if few else wider(grad.dtype)
    return grad.mT.to(wide) @ u.to(wide)


def product_of_rows(S: Tensor, A: Tensor) -> Tensor:
    """S Aᵀ (n, r) in S's dtype."""
    return S @ A.mT.to(S.dtype)


def wider(dtype: torch.dtype) -> torch.dtype:
    """In which vectors multiply and sums are made."""
    return torch.promote_types(dtype, torch.float32)


def scale_rows(x: Tensor, vectors: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """(T, w) times each row's own of (N, w), in x's dtype; zero where there is none."""
    wide = x.to(wider(x.dtype))
    if adapter_ids is None:
        return (wide * vectors).to(x.dtype)
    of_row = vectors[adapter_ids.clamp(min=0)]
    return torch.where((adapter_ids >= 0).unsqueeze(1), wide * of_row, 0).to(x.dtype)


def add_scaled(base: Tensor, z: Tensor, vectors: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """base + b_a ⊙ z in base's dtype, rounded once; base where there is no adapter."""
    wide = z.to(torch.promote_types(wider(z.dtype), wider(base.dtype)))
    if adapter_ids is None:
        return (base + wide * vectors).to(base.dtype)
    added = (base + wide * vectors[adapter_ids.clamp(min=0)]).to(base.dtype)
    return torch.where((adapter_ids >= 0).unsqueeze(1), added, base)


def sum_of_adapters(x: Tensor, y: Tensor, like: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """Σ x ⊙ y over each adapter's rows, (N, w) in the dtype of ``like``; rows in their order."""
    wide = wider(x.dtype)
    products = x.to(wide) * y
    if adapter_ids is None:
        return products.sum(dim=0, keepdim=True).to(like.dtype)
    sums = products.new_zeros(len(like) + 1, x.shape[1])
    rows = torch.where(adapter_ids >= 0, adapter_ids, len(like))
    # unlike index_add_, in one order on every device
    return sums.index_put_((rows,), products, accumulate=True)[:-1].to(like.dtype)
