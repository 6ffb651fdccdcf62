"""The kernel of vera_fused on NVIDIA GPUs, with Triton: base layer and adapter in one accumulator.

    acc = (U ⊙ d) Bᵀ;   acc = b ⊙ acc;   acc += X W0ᵀ;   Y = acc + bias

Y is rounded once and written once: the base layer's output is neither written nor read back, which
is all that the expansion moves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops.vera_expand.triton import adapter_of_rows, scale_of_tile, scaled_product


@triton.jit
def vera_fused_kernel(
    p_x, p_weight, p_bias, p_u, p_d, p_b, p_B, p_ids, p_y, tokens, width, features, rank, x_stride,
    x_step, weight_stride, weight_step, u_stride, u_step, B_stride, B_step, BIAS: tl.constexpr,
    GATHERED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A tile of Y. SIDE tiles of rows go through the columns together, for the level-2 cache."""
    i_program = tl.program_id(0).to(tl.int64)
    row_tiles, column_tiles = tl.cdiv(tokens, BT), tl.cdiv(width, BN)
    i_side = i_program // (SIDE * column_tiles)
    within = i_program % (SIDE * column_tiles)
    side = tl.minimum(row_tiles - i_side * SIDE, SIDE)
    i_row = (i_side * SIDE + within % side) * BT + tl.arange(0, BT)
    column = within // side * BN + tl.arange(0, BN)
    row, output = tl.minimum(i_row, tokens - 1), tl.minimum(column, width - 1)
    adapter = adapter_of_rows(p_ids, row, GATHERED)
    own = tl.maximum(adapter, 0)
    acc = scaled_product(
        p_u, p_d, p_B, row, own, output, rank, u_stride, u_step, B_stride, B_step, GATHERED, BT, BN,
        BR,
    )  # fmt: skip
    acc *= scale_of_tile(p_b, own, column, width, GATHERED)
    if GATHERED:  # 0 times what is not finite would not be 0
        acc = tl.where((adapter >= 0)[:, None], acc, 0.0)
    j = tl.arange(0, BM).to(tl.int64)
    p_rows = p_x + (row * x_stride)[:, None] + (j * x_step)[None, :]
    p_columns = p_weight + (output * weight_stride)[None, :] + (j * weight_step)[:, None]
    for i_feature in range(0, features, BM):
        m_j = j < features - i_feature
        x = tl.load(p_rows, m_j[None, :], 0.0)
        weight = tl.load(p_columns, m_j[:, None], 0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        p_rows += tl.cast(x_step, tl.int64) * BM
        p_columns += tl.cast(weight_step, tl.int64) * BM
    if BIAS:
        acc += tl.load(p_bias + column, column < width, 0.0).to(tl.float32)[None, :]
    m_tile = (i_row < tokens)[:, None] & (column < width)[None, :]
    tl.store(p_y + row[:, None] * width + column[None, :], acc.to(p_y.dtype.element_ty), m_tile)
