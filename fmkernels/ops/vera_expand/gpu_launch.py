"""How the kernels of ``triton.py`` are started: tensors in, tensors filled."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops.vera_expand.blocks import Blocks
from fmkernels.ops.vera_expand.gpu_config import Contraction
from fmkernels.ops.vera_expand.triton import (
    vera_contract_kernel,
    vera_expand_kernel,
    vera_grad_b_kernel,
    vera_grad_u_kernel,
)
from fmkernels.ops.vera_shrink.gpu_config import Tile


def expand(
    base: Tensor, u: Tensor, d: Tensor, b: Tensor, B: Tensor, ids: Tensor | None, tile: Tile
) -> Tensor:
    """(T, n), (T, r), (N, r), (N, n), (n, r), (T) or None -> Y (T, n)."""
    tokens, width = base.shape
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    programs = -(-tokens // tile.rows) * -(-width // tile.columns)
    vera_expand_kernel[(programs,)](
        base,
        u,
        d,
        b,
        B,
        u if ids is None else ids,
        y,
        tokens,
        width,
        u.shape[1],
        *base.stride(),
        *u.stride(),
        *B.stride(),
        GATHERED=ids is not None,
        BT=tile.rows,
        BN=tile.columns,
        BR=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return y


def grad_u(
    grad: Tensor,
    u: Tensor,
    d: Tensor,
    b: Tensor,
    B: Tensor,
    blocks: Blocks | None,
    tile: Tile,
    *,
    of_u: bool,
) -> tuple[Tensor, Tensor]:
    """dU (T, r), if asked for, and of blocks their parts of grad_d (blocks, r)."""
    tokens, rank = u.shape
    result = torch.empty(u.shape if of_u else (0,), dtype=u.dtype, device=u.device)
    count = -(-tokens // tile.rows) if blocks is None else len(blocks.group)
    shape = (0,) if blocks is None else (count, rank)
    parts = torch.empty(shape, dtype=torch.float32, device=u.device)
    vera_grad_u_kernel[(count * -(-rank // tile.columns),)](
        grad,
        u,
        d,
        b,
        B,
        *_arrays(blocks, u),
        result,
        parts,
        tokens,
        grad.shape[1],
        rank,
        0 if blocks is None else blocks.groups,
        *grad.stride(),
        *u.stride(),
        *B.stride(),
        GROUPED=blocks is not None,
        OF_U=of_u,
        OF_D=blocks is not None,
        BT=tile.rows,
        BR=tile.columns,
        BN=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return result, parts


def grad_b(grad: Tensor, u: Tensor, d: Tensor, B: Tensor, blocks: Blocks, tile: Tile) -> Tensor:
    """The blocks' parts of grad_b (blocks, n)."""
    tokens, width = grad.shape
    count = len(blocks.group)
    parts = torch.empty(count, width, dtype=torch.float32, device=u.device)
    vera_grad_b_kernel[(count * -(-width // tile.columns),)](
        grad,
        u,
        d,
        B,
        *_arrays(blocks, u),
        parts,
        tokens,
        width,
        u.shape[1],
        blocks.groups,
        *grad.stride(),
        *u.stride(),
        *B.stride(),
        BT=tile.rows,
        BN=tile.columns,
        BR=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return parts


def contract(
    grad: Tensor, u: Tensor, d: Tensor, b: Tensor, B: Tensor, plan: Contraction
) -> tuple[Tensor, Tensor]:
    """Parts of grad_d (…, r) and of grad_b (…, n), for one adapter."""
    (tokens, width), rank, tile = grad.shape, u.shape[1], plan.tile
    of_d = (plan.parts * -(-width // tile.rows), rank)
    of_b = (plan.parts * -(-rank // tile.columns), width)
    parts_d, parts_b = (
        torch.empty(shape, dtype=torch.float32, device=u.device) for shape in (of_d, of_b)
    )
    vera_contract_kernel[(plan.programs(width, rank),)](
        grad,
        u,
        d,
        b,
        B,
        parts_d,
        parts_b,
        tokens,
        width,
        rank,
        plan.tokens,
        *grad.stride(),
        *u.stride(),
        *B.stride(),
        BN=tile.rows,
        BR=tile.columns,
        BT=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return parts_d, parts_b


def _arrays(blocks: Blocks | None, unused: Tensor) -> tuple[Tensor, ...]:
    if blocks is None:
        return (unused,) * 4
    return blocks.order, blocks.group, blocks.start, blocks.first
