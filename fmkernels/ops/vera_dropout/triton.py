"""The kernel of vera_dropout on NVIDIA GPUs, with Triton; ``reference.py`` has the layout.

One pass, and it stands alone. In the load of X Aᵀ it would draw again in every program that has
other ranks of the same rows; a number costs about 20 instructions, as long as it takes to write and
to read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops.vera_dropout import reference

STREAM = tl.constexpr(reference.STREAM)


@triton.jit
def vera_dropout_kernel(
    p_x, p_seed, p_y, tokens, width, stride, step, threshold, scale, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """A tile: its numbers times ``scale``, or 0 where a word is below the threshold."""
    i_program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(width, BN)
    row = i_program // column_tiles * BT + tl.arange(0, BT)
    first = i_program % column_tiles * BN
    column = first + tl.arange(0, BN)
    none = tl.zeros((BT, BN // 4), tl.int32)
    group = none + (first // 4 + tl.arange(0, BN // 4)).to(tl.int32)[None, :]
    low, high = (row & 0xFFFFFFFF).to(tl.int32), (row >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(p_seed), group, none + low[:, None], none + high[:, None], none + STREAM
    )
    # (BT, BN / 4, 2, 2), of which the last two dimensions are the bits of the word's number
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BT, BN))
    m_tile = (row < tokens)[:, None] & (column < width)[None, :]
    place = (row * stride)[:, None] + (column * step)[None, :]
    x = tl.load(p_x + place, m_tile, 0.0)
    y = tl.where(words.to(tl.int64) >= threshold, x.to(tl.float32) * scale, 0.0).to(x.dtype)
    tl.store(p_y + row[:, None] * width + column[None, :], y, m_tile)
