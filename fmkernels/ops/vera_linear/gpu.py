"""The form by two products on NVIDIA GPUs: base layer and adapter in one launch where it pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels._tuned import capability
from fmkernels.ops.vera_expand import gpu as expand
from fmkernels.ops.vera_linear import products
from fmkernels.ops.vera_linear.gpu_config import RANKS, SIDE, fused_tile, fuses
from fmkernels.ops.vera_linear.triton import vera_fused_kernel
from fmkernels.ops.vera_shrink.gpu import vera_shrink


def vera_products(
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
    """(T, m), (n, m), (n), (r, ≥ m), (≥ n, r), (N, r), (N, n), (T) -> (T, n), (T, r)."""
    u = vera_shrink(x, A)
    adapter = A, B, lambda_d, lambda_b, adapter_ids
    return vera_expanded(x, weight, bias, u, *adapter, by_matrix, folds_y, folds_x), u


def vera_expanded(
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
    """(T, m), (n, m), (n), (T, r), (r, ≥ m), (≥ n, r), (N, r), (N, n), (T) -> (T, n)."""
    if folds_y:
        return F.linear(x, products.folded_by(expand, weight, A, B, lambda_d, lambda_b), bias)
    adapter = u, lambda_d, lambda_b, B, adapter_ids
    if fuses(x.dtype, *x.shape):
        return vera_fused(x, weight, bias, *adapter)
    y: Tensor = expand.vera_expand(F.linear(x, weight, bias), *adapter, by_matrix)
    return y


def vera_products_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The library's products in place, as on a CPU, around the kernels of ``vera_expand``."""
    return products.backward_by(expand, *arguments)


def vera_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
) -> Tensor:
    """(T, m), (n, m), (n), (T, r), (N, r), (N, n), (≥ n, r), (T) -> (T, n) in x's dtype."""
    (tokens, features), width = x.shape, len(weight)
    y = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    d, b, own_B, ids = expand.operands(width, u, lambda_d, lambda_b, B, adapter_ids)
    gathered = ids is not None
    device = capability(x.device)
    tile = fused_tile(tokens, width, features, x.dtype, device, gathered=gathered)
    vera_fused_kernel[(-(-tokens // tile.rows) * -(-width // tile.columns),)](
        x,
        weight,
        x if bias is None else bias.contiguous(),
        u,
        d,
        b,
        own_B,
        u if ids is None else ids,
        y,
        tokens,
        width,
        features,
        u.shape[1],
        *x.stride(),
        *weight.stride(),
        *u.stride(),
        *own_B.stride(),
        BIAS=bias is not None,
        GATHERED=gathered,
        BT=tile.rows,
        BN=tile.columns,
        BM=tile.inner,
        BR=min(tile.inner, RANKS),
        SIDE=SIDE,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return y
