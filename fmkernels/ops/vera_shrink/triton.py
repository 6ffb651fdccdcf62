"""The kernels of vera_shrink on NVIDIA GPUs, with Triton, for the few rows of decoding.

shrink   a part of X Aᵀ: A is read once, by as many programs as there are multiprocessors, among
         which the inputs are divided
sum      the parts of a sum, in their order; also those of ``vera_expand`` and ``dvora_linear``
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vera_shrink_kernel(
    p_x, p_A, p_parts, tokens, features, rank, features_of_a_part, x_stride, x_step, A_stride,
    A_step, BT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(T, m), (r, m) -> (parts, T, r): X Aᵀ over a part of the inputs."""
    i_program = tl.program_id(0).to(tl.int64)
    rank_tiles, token_tiles = tl.cdiv(rank, BR), tl.cdiv(tokens, BT)
    i_rank, i_rest = i_program % rank_tiles, i_program // rank_tiles
    i_token, i_part = i_rest % token_tiles, i_rest // token_tiles
    row, k = i_token * BT + tl.arange(0, BT), i_rank * BR + tl.arange(0, BR)
    # past the end, the last again, which is not stored
    p_row = p_x + tl.minimum(row, tokens - 1) * x_stride
    p_column = p_A + tl.minimum(k, rank - 1) * A_stride
    u = tl.zeros((BT, BR), tl.float32)
    for i_feature in range(0, features_of_a_part, BM):
        j = i_part * features_of_a_part + i_feature + tl.arange(0, BM)
        m_j = j < features
        x = tl.load(p_row[:, None] + (j * x_step)[None, :], m_j[None, :], 0.0)
        A = tl.load(p_column[None, :] + (j * A_step)[:, None], m_j[:, None], 0.0)
        u = tl.dot(x, A, u, input_precision="ieee")
    p_part = p_parts + (i_part * tokens + row[:, None]) * rank
    tl.store(p_part + k[None, :], u, (row < tokens)[:, None] & (k < rank)[None, :])


@triton.jit
def vera_sum_kernel(
    p_parts, p_first, p_sums, columns, parts, GROUPED: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """(parts, columns) -> (groups, columns): a group has the parts from its first to the next's."""
    i_program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(columns, C)
    i_group = i_program // column_tiles
    column = i_program % column_tiles * C + tl.arange(0, C)
    m_column = column < columns
    first, last = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64) + parts
    if GROUPED:
        first, last = tl.load(p_first + i_group), tl.load(p_first + i_group + 1)
    sums = tl.zeros((R, C), tl.float32)
    for i_part in range(first, last, R):
        part = i_part + tl.arange(0, R)
        m_tile = (part < last)[:, None] & m_column[None, :]
        sums += tl.load(p_parts + part[:, None] * columns + column[None, :], m_tile, 0.0)
    total = tl.sum(sums, axis=0).to(p_sums.dtype.element_ty)
    tl.store(p_sums + i_group * columns + column, total, m_column)
