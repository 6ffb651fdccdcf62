"""The kernels of DVoRA's magnitude on NVIDIA GPUs, with Triton: one pass forward, one backward.

``reference.py`` has the formulas. Backward, a program goes through a part of the rows of some
columns, so that a sum leaves it once; ``vera_sum_kernel`` adds the parts in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude_over_norm(p_magnitude, p_norms, column, m_column):
    """c (1, BN) in float32."""
    magnitude = tl.load(p_magnitude + column, m_column, 0.0).to(tl.float32)
    return tl.div_rn(magnitude, tl.load(p_norms + column, m_column, 1.0))[None, :]


@triton.jit
def dvora_scale_kernel(
    p_before, p_magnitude, p_norms, p_bias, p_y, tokens, width, stride, step, BIAS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of Y = c ⊙ P + bias."""
    i_program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(width, BN)
    row = i_program // column_tiles * BT + tl.arange(0, BT)
    column = i_program % column_tiles * BN + tl.arange(0, BN)
    m_column = column < width
    m_tile = (row < tokens)[:, None] & m_column[None, :]
    place = (row * stride)[:, None] + (column * step)[None, :]
    y = tl.load(p_before + place, m_tile, 0.0).to(tl.float32)
    y = y * magnitude_over_norm(p_magnitude, p_norms, column, m_column)
    if BIAS:
        y += tl.load(p_bias + column, m_column, 0.0).to(tl.float32)[None, :]
    p_tile = p_y + row[:, None] * width + column[None, :]
    tl.store(p_tile, y.to(p_y.dtype.element_ty), m_tile)


@triton.jit
def dvora_scale_backward_kernel(
    p_grad, p_before, p_magnitude, p_norms, p_result, p_parts, tokens, width, tokens_of_a_part,
    grad_stride, grad_step, stride, step, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """c ⊙ G, and of a part of the rows Σ G ⊙ P and Σ G, side by side."""
    i_program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(width, BN)
    i_part = i_program // column_tiles
    column = i_program % column_tiles * BN + tl.arange(0, BN)
    m_column = column < width
    c = magnitude_over_norm(p_magnitude, p_norms, column, m_column)
    of_c, of_bias = tl.zeros((BT, BN), tl.float32), tl.zeros((BT, BN), tl.float32)
    for i_token in range(0, tokens_of_a_part, BT):
        row = i_part * tokens_of_a_part + i_token + tl.arange(0, BT)
        m_tile = (row < tokens)[:, None] & m_column[None, :]
        place = (row * grad_stride)[:, None] + (column * grad_step)[None, :]
        g = tl.load(p_grad + place, m_tile, 0.0).to(tl.float32)
        place = (row * stride)[:, None] + (column * step)[None, :]
        before = tl.load(p_before + place, m_tile, 0.0).to(tl.float32)
        p_tile = p_result + row[:, None] * width + column[None, :]
        tl.store(p_tile, (g * c).to(p_result.dtype.element_ty), m_tile)
        of_c += g * before
        of_bias += g
    part = i_part * 2 * width + column
    tl.store(p_parts + part, tl.sum(of_c, axis=0), m_column)
    tl.store(p_parts + part + width, tl.sum(of_bias, axis=0), m_column)
