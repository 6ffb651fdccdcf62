"""vera_shrink on NVIDIA GPUs: the kernel for few rows, the library's product for many.

Backward, dX = dU A, is the library's product, too, and has no kernel here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops.vera_shrink import reference
from fmkernels.ops.vera_shrink.gpu_config import (
    SUMMED_COLUMNS,
    SUMMED_PARTS,
    Shrink,
    shrink_plan,
)
from fmkernels.ops.vera_shrink.triton import vera_shrink_kernel, vera_sum_kernel


def vera_shrink(x: Tensor, A: Tensor) -> Tensor:
    """(T, m), (r, ≥ m) -> (T, r) in x's dtype."""
    plan = shrink_plan(len(x), x.shape[1], len(A), x.dtype)
    if plan is None or not len(x):
        return reference.vera_shrink(x, A)
    parts = shrink(x, A[:, : x.shape[1]].to(x.dtype), plan)
    return sums(parts.flatten(1), x.dtype).view(len(x), len(A))


def shrink(x: Tensor, A: Tensor, plan: Shrink) -> Tensor:
    """(T, m), (r, m) -> (parts, T, r) in float32."""
    (tokens, features), rank, tile = x.shape, len(A), plan.tile
    parts = torch.empty(plan.parts, tokens, rank, dtype=torch.float32, device=x.device)
    vera_shrink_kernel[(plan.programs(tokens, rank),)](
        x,
        A,
        parts,
        tokens,
        features,
        rank,
        plan.features,
        *x.stride(),
        *A.stride(),
        BT=tile.rows,
        BR=tile.columns,
        BM=tile.inner,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return parts


def sums(parts: Tensor, dtype: torch.dtype, first: Tensor | None = None) -> Tensor:
    """(parts, columns) -> (1, columns); or (groups, columns), if ``first`` has groups + 1 parts."""
    count, columns = parts.shape
    groups = 1 if first is None else len(first) - 1
    result = torch.empty(groups, columns, dtype=dtype, device=parts.device)
    vera_sum_kernel[(groups * -(-columns // SUMMED_COLUMNS),)](
        parts,
        parts if first is None else first,
        result,
        columns,
        count,
        GROUPED=first is not None,
        R=SUMMED_PARTS,
        C=SUMMED_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return result
