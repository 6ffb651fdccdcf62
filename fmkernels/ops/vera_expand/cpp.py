"""vera_expand on the CPU: the library's products, and between them one pass of the extension.

``reference.py`` has the formulas. The extension takes dense float32 and bfloat16; the reference
takes all others, and bfloat16 beside float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fmkernels._library import native, native_function
from fmkernels.ops.vera_expand import reference

_scale_rows = native_function(
    "vera_scale_rows", "(Tensor x, Tensor vectors, Tensor? ids) -> Tensor"
)
_add_scaled = native_function(
    "vera_add_scaled", "(Tensor base, Tensor z, Tensor vectors, Tensor? ids) -> Tensor"
)
_sum_rows = native_function(
    "vera_sum_rows", "(Tensor x, Tensor y, Tensor? ids, int adapters) -> Tensor"
)
_scale_matrix = native_function("vera_scale_matrix", "(Tensor B, Tensor d, Tensor b) -> Tensor")
_contract = native_function(
    "vera_contract", "(Tensor M, Tensor B, Tensor d, Tensor b) -> (Tensor, Tensor)"
)

_sum_of_outer = native_function("vera_sum_of_outer", "(Tensor g, Tensor u) -> Tensor")
_product_of_rows = native_function("vera_product_of_rows", "(Tensor s, Tensor a) -> Tensor")

TAKEN = (torch.float32, torch.bfloat16)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the extension has a product of bfloat16 with sums in float32 for this CPU."""
    supported = torch.cpu._is_avx512_bf16_supported()
    return supported and native is not None and native.cpu_isa() == "avx512"


def sum_of_outer(grad: Tensor, u: Tensor) -> Tensor:
    """Gᵀ U (n, r) in float32 or float64."""
    if grad.dtype == torch.bfloat16 and multiplies_bfloat16():
        found: Tensor = _sum_of_outer(grad.contiguous(), u.contiguous())
        return found[: grad.shape[1], : u.shape[1]]
    return reference.sum_of_outer(grad, u)


def product_of_rows(S: Tensor, A: Tensor) -> Tensor:
    """S Aᵀ (n, r) in S's dtype; for A in bfloat16, S is multiplied as two numbers of bfloat16."""
    if A.dtype == torch.bfloat16 and multiplies_bfloat16():
        found: Tensor = _product_of_rows(S.contiguous(), A.contiguous())
        return found[: len(S), : len(A)]
    return reference.product_of_rows(S, A)


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
    if u.dtype not in TAKEN or base.dtype != u.dtype:
        return reference.add_update_(base, u, lambda_d, lambda_b, B, adapter_ids, by_matrix)
    d, b, own_B, ids = _dense(u, lambda_d, lambda_b, B[: base.shape[1]], adapter_ids)
    if by_matrix:
        return base.addmm_(u, _scale_matrix(own_B, d, b).mT)
    z = _scale_rows(u.contiguous(), d, ids) @ own_B.mT
    added: Tensor = _add_scaled(base.contiguous(), z, b, ids)
    return added


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
    if u.dtype not in TAKEN:
        return reference.vera_expand_backward(
            grad, u, lambda_d, lambda_b, B, adapter_ids, by_matrix, of_u, of_vectors
        )
    d, b, own_B, ids = _dense(u, lambda_d, lambda_b, B[: grad.shape[1]], adapter_ids)
    grad, u = grad.to(u.dtype).contiguous(), u.contiguous()
    grad_u, grad_d, grad_b = u.new_empty(0), lambda_d.new_empty(0), lambda_b.new_empty(0)
    if by_matrix:
        if of_u:
            grad_u = grad @ _scale_matrix(own_B, d, b)
        if of_vectors:
            grad_d, grad_b = contract(sum_of_outer(grad, u), own_B, lambda_d, lambda_b)
        return grad_u, grad_d, grad_b
    grad_v = _scale_rows(grad, b, ids) @ own_B
    if of_u:
        grad_u = _scale_rows(grad_v, d, ids)
    if of_vectors:
        z = _scale_rows(u, d, ids) @ own_B.mT
        grad_d = _sum_rows(u, grad_v, ids, len(d)).to(lambda_d.dtype)
        grad_b = _sum_rows(grad, z, ids, len(b)).to(lambda_b.dtype)
    return grad_u, grad_d, grad_b


def scaled_matrix(B: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """diag(b) B diag(d) of (n, r), (1, r), (1, n)."""
    if B.dtype not in TAKEN:
        return reference.scaled_matrix(B, lambda_d, lambda_b)
    d, b = lambda_d.float().contiguous(), lambda_b.float().contiguous()
    scaled: Tensor = _scale_matrix(B.contiguous(), d, b)
    return scaled


def contract(M: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of d (1, r) and b (1, n) from M = Gᵀ U (n, r)."""
    if B.dtype not in TAKEN:
        return reference.contract(M, B, lambda_d, lambda_b)
    d, b = lambda_d.float().contiguous(), lambda_b.float().contiguous()
    grad_d, grad_b = _contract(M.float().contiguous(), B.contiguous(), d, b)
    return (
        grad_d.unsqueeze(0).to(lambda_d.dtype),
        grad_b.unsqueeze(0).to(lambda_b.dtype),
    )


def _dense(
    u: Tensor, lambda_d: Tensor, lambda_b: Tensor, B: Tensor, adapter_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Vectors in float32, B in u's dtype, ids; all without gaps."""
    ids = None if adapter_ids is None else adapter_ids.contiguous()
    return (
        lambda_d.float().contiguous(),
        lambda_b.float().contiguous(),
        B.to(u.dtype).contiguous(),
        ids,
    )
