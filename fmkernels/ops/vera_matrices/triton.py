"""VeRA's shared matrices on NVIDIA GPUs, with Triton.

A program has a tile of entries: one counter gives four that lie side by side, and every entry is
written once, in the dtype that is asked for. Nothing is read but the seed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops.vera_matrices import reference
from fmkernels.ops.vera_matrices.config import tile

STEP = tl.constexpr(reference.STEP)


@triton.jit
def vera_matrices_kernel(
    p_seed, p_matrix, rows, columns, stream, R: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """() -> R rows and 4 G columns of (rows, columns)."""
    column_tiles = tl.cdiv(columns, 4 * G)
    i_tile = tl.program_id(0)
    i_row = i_tile // column_tiles * R + tl.arange(0, R)[:, None]
    first_group = i_tile % column_tiles * G
    none = tl.zeros((R, G), tl.int32)
    i_group = none + first_group + tl.arange(0, G)[None, :]
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), i_group, none + i_row, none, none + stream)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, 4 * G))
    odd = (words >> 7 | 1).to(tl.int32, bitcast=True) - 2**24
    i_column = first_group * 4 + tl.arange(0, 4 * G)[None, :]
    place = i_row.to(tl.int64) * columns + i_column.to(tl.int64)
    entries = (odd.to(tl.float32) * STEP).to(p_matrix.dtype.element_ty)
    tl.store(p_matrix + place, entries, (i_row < rows) & (i_column < columns))


def matrix(seed: Tensor, stream: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns)."""
    result = torch.empty(rows, columns, dtype=dtype, device=seed.device)
    plan = tile(columns)
    tiles = triton.cdiv(rows, plan.rows) * triton.cdiv(columns, 4 * plan.groups)
    vera_matrices_kernel[(tiles,)](
        seed,
        result,
        rows,
        columns,
        stream,
        R=plan.rows,
        G=plan.groups,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    return result


def vera_matrices(
    seed: Tensor, rank: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """() int64 -> (rank, in), (out, rank) by position."""
    A = matrix(seed, reference.A_STREAM, rank, in_features, dtype)
    return A, matrix(seed, reference.B_STREAM, out_features, rank, dtype)
