"""The kernels of vera_expand on NVIDIA GPUs, with Triton; ``gpu.py`` says in which order they run.

    expand     Y = base + b ⊙ Z, Z = (U ⊙ d) Bᵀ: one pass over base, which is all of the traffic
    grad_u     dU = dV ⊙ d, dV = (G ⊙ b) B; of blocks also Σ U ⊙ dV, their part of grad_d
    grad_b     of blocks: Σ G ⊙ Z, with Z made once more, in registers
    contract   of one adapter: M = Gᵀ U, of which only Σ b ⊙ B ⊙ M and (B ⊙ M) d leave a program

``reference.py`` has the formulas. U ⊙ d and G ⊙ b are made where they are multiplied, in float32,
and rounded once to U's dtype; sums are in float32. So no tensor of T rows but the results is
written.

**Adapters of rows.** ``expand`` takes the rows as they come, each with its own d and b: nothing is
sorted. For the gradients of the vectors, rows are taken in the order of their adapters, in *blocks*
that have one adapter each (``blocks.py``): a block leaves one row of each sum, and
``vera_sum_kernel`` adds those of an adapter. What is added in which order is a function of the ids
alone.

**Past the end** of the rows a program reads the last of them again and stores nothing: masks of
whole tiles would take the registers of a second program beside it. What is summed over is masked,
and what lies side by side in memory, of which the compiler must see that it does.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_product(
    p_u, p_d, p_B, row, adapter, column, rank, u_stride, u_step, B_stride, B_step,
    GATHERED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Z (BT, BN) in float32 of rows and columns that exist; adapter: of each row, or of all."""
    z = tl.zeros((BT, BN), tl.float32)
    p_row_u = p_u + row * u_stride
    p_row_d = p_d + adapter * rank
    p_row_B = p_B + column * B_stride
    for i_rank in range(0, rank, BR):
        k = (i_rank + tl.arange(0, BR)).to(tl.int64)
        m_k = k < rank
        u = tl.load(p_row_u[:, None] + (k * u_step)[None, :], m_k[None, :], 0.0)
        if GATHERED:
            d = tl.load(p_row_d[:, None] + k[None, :], m_k[None, :], 0.0)
        else:
            d = tl.load(p_row_d + k, m_k, 0.0)[None, :]
        v = (u.to(tl.float32) * d.to(tl.float32)).to(p_B.dtype.element_ty)
        B = tl.load(p_row_B[None, :] + (k * B_step)[:, None], m_k[:, None], 0.0)
        z = tl.dot(v, B, z, input_precision="ieee")
    return z


@triton.jit
def adapter_of_rows(p_ids, row, GATHERED: tl.constexpr):
    """The adapter of each row, −1 for none; without ids, all have the first."""
    adapter = tl.full((), 0, tl.int64)
    if GATHERED:
        adapter = tl.load(p_ids + row).to(tl.int64)
    return adapter


@triton.jit
def scale_of_tile(p_b, adapter, column, width, GATHERED: tl.constexpr):
    """b of a tile, (1, BN) or (BT, BN), in float32."""
    p_row_b = p_b + adapter * width
    m_column = column < width
    if GATHERED:
        b = tl.load(p_row_b[:, None] + column[None, :], m_column[None, :], 0.0)
    else:
        b = tl.load(p_row_b + column, m_column, 0.0)[None, :]
    return b.to(tl.float32)


@triton.jit
def vera_expand_kernel(
    p_base, p_u, p_d, p_b, p_B, p_ids, p_y, tokens, width, rank, base_stride, base_step, u_stride,
    u_step, B_stride, B_step, GATHERED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """A tile of Y; tiles of the same rows follow each other."""
    i_program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(width, BN)
    i_row = i_program // column_tiles * BT + tl.arange(0, BT)
    column = i_program % column_tiles * BN + tl.arange(0, BN)
    row, m_column = tl.minimum(i_row, tokens - 1), column < width
    adapter = adapter_of_rows(p_ids, row, GATHERED)
    own = tl.maximum(adapter, 0)
    z = scaled_product(
        p_u, p_d, p_B, row, own, tl.minimum(column, width - 1), rank, u_stride, u_step, B_stride,
        B_step, GATHERED, BT, BN, BR,
    )  # fmt: skip
    z *= scale_of_tile(p_b, own, column, width, GATHERED)
    p_tile = p_base + (row * base_stride)[:, None] + (column * base_step)[None, :]
    base = tl.load(p_tile, m_column[None, :], 0.0)
    y = (base.to(tl.float32) + z).to(base.dtype)
    if GATHERED:
        y = tl.where((adapter >= 0)[:, None], y, base)
    m_tile = (i_row < tokens)[:, None] & m_column[None, :]
    tl.store(p_y + row[:, None] * width + column[None, :], y, m_tile)


@triton.jit
def rows_of_block(
    p_order, p_group, p_start, p_first, i_block, groups, tokens, GROUPED: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Which rows a block has, those that are there, and its adapter, −1 for none.

    Without groups, all have the first.
    """
    position = i_block * BT + tl.arange(0, BT)
    last = tl.full((), 0, tl.int64) + tokens
    adapter = tl.full((), 0, tl.int64)
    row = tl.minimum(position, tokens - 1)
    if GROUPED:
        group = tl.load(p_group + i_block)
        within = i_block - tl.load(p_first + group)
        position = tl.load(p_start + group) + within * BT + tl.arange(0, BT)
        last = tl.load(p_start + tl.minimum(group + 1, groups))
        adapter = tl.where(group < groups, group - 1, -1)  # a block past the last has none
        row = tl.load(p_order + position, position < last, 0)
    return row, position < last, adapter


@triton.jit
def vera_grad_u_kernel(
    p_grad, p_u, p_d, p_b, p_B, p_order, p_group, p_start, p_first, p_grad_u, p_parts, tokens,
    width, rank, groups, grad_stride, grad_step, u_stride, u_step, B_stride, B_step,
    GROUPED: tl.constexpr, OF_U: tl.constexpr, OF_D: tl.constexpr, BT: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A block's dU, and its part of grad_d, for BR of the ranks."""
    i_program = tl.program_id(0).to(tl.int64)
    rank_tiles = tl.cdiv(rank, BR)
    i_block = i_program // rank_tiles
    k = i_program % rank_tiles * BR + tl.arange(0, BR)
    m_k = k < rank
    row, m_row, adapter = rows_of_block(
        p_order, p_group, p_start, p_first, i_block, groups, tokens, GROUPED, BT
    )
    p_row_grad, p_row_B = p_grad + row * grad_stride, p_B + k * B_step
    own = tl.maximum(adapter, 0)
    grad_v = tl.zeros((BT, BR), tl.float32)
    for i_column in range(0, tl.where(adapter < 0, 0, width), BN):
        column = (i_column + tl.arange(0, BN)).to(tl.int64)
        m_column = column < width
        g = tl.load(p_row_grad[:, None] + (column * grad_step)[None, :], m_column[None, :], 0.0)
        b = tl.load(p_b + own * width + column, m_column, 0.0)
        scaled = (g.to(tl.float32) * b.to(tl.float32)[None, :]).to(p_B.dtype.element_ty)
        p_tile = p_row_B[None, :] + (column * B_stride)[:, None]
        B = tl.load(p_tile, m_column[:, None] & m_k[None, :], 0.0)
        grad_v = tl.dot(scaled, B, grad_v, input_precision="ieee")
    if OF_D:
        p_tile = p_u + (row * u_stride)[:, None] + (k * u_step)[None, :]
        u = tl.load(p_tile, m_k[None, :], 0.0).to(tl.float32)
        of_d = tl.sum(tl.where(m_row[:, None], u * grad_v, 0.0), axis=0)
        tl.store(p_parts + i_block * rank + k, of_d, m_k)
    if OF_U:
        d = tl.load(p_d + own * rank + k, m_k, 0.0).to(tl.float32)
        grad_u = (grad_v * d[None, :]).to(p_grad_u.dtype.element_ty)
        tl.store(p_grad_u + row[:, None] * rank + k[None, :], grad_u, m_row[:, None] & m_k[None, :])


@triton.jit
def vera_grad_b_kernel(
    p_grad, p_u, p_d, p_B, p_order, p_group, p_start, p_first, p_parts, tokens, width, rank, groups,
    grad_stride, grad_step, u_stride, u_step, B_stride, B_step, BT: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """A block's part of grad_b, for BN of the outputs."""
    i_program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(width, BN)
    i_block = i_program // column_tiles
    column = i_program % column_tiles * BN + tl.arange(0, BN)
    m_column = column < width
    row, m_row, adapter = rows_of_block(
        p_order, p_group, p_start, p_first, i_block, groups, tokens, True, BT
    )
    z = scaled_product(
        p_u, p_d, p_B, row, tl.maximum(adapter, 0), tl.minimum(column, width - 1),
        tl.where(adapter < 0, 0, rank), u_stride, u_step, B_stride, B_step, False, BT, BN, BR,
    )  # fmt: skip
    p_tile = p_grad + (row * grad_stride)[:, None] + (column * grad_step)[None, :]
    g = tl.load(p_tile, m_column[None, :], 0.0)
    of_b = tl.sum(tl.where(m_row[:, None], g.to(tl.float32) * z, 0.0), axis=0)
    tl.store(p_parts + i_block * width + column, of_b, m_column)


@triton.jit
def vera_contract_kernel(
    p_grad, p_u, p_d, p_b, p_B, p_parts_d, p_parts_b, tokens, width, rank, tokens_of_a_part,
    grad_stride, grad_step, u_stride, u_step, B_stride, B_step, BN: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """A tile of M over a part of the rows; of it, row sums and column sums of B ⊙ M leave.

    grad_d has a part for each part of the rows and each tile of outputs, grad_b one for each part
    of the rows and each tile of ranks.
    """
    i_program = tl.program_id(0).to(tl.int64)
    rank_tiles, column_tiles = tl.cdiv(rank, BR), tl.cdiv(width, BN)
    i_rank, i_rest = i_program % rank_tiles, i_program // rank_tiles
    i_column, i_part = i_rest % column_tiles, i_rest // column_tiles
    column, k = i_column * BN + tl.arange(0, BN), i_rank * BR + tl.arange(0, BR)
    m_column, m_k = column < width, k < rank
    p_column, p_rank = p_grad + column * grad_step, p_u + k * u_step
    M = tl.zeros((BN, BR), tl.float32)
    for i_token in range(0, tokens_of_a_part, BT):
        row = i_part * tokens_of_a_part + i_token + tl.arange(0, BT)
        m_row = row < tokens
        p_tile = p_column[None, :] + (row * grad_stride)[:, None]
        g = tl.load(p_tile, m_row[:, None] & m_column[None, :], 0.0)
        p_tile = p_rank[None, :] + (row * u_stride)[:, None]
        u = tl.load(p_tile, m_row[:, None] & m_k[None, :], 0.0)
        M = tl.dot(tl.trans(g.to(u.dtype)), u, M, input_precision="ieee")
    p_tile = p_B + (column * B_stride)[:, None] + (k * B_step)[None, :]
    both = tl.load(p_tile, m_column[:, None] & m_k[None, :], 0.0).to(tl.float32) * M
    b = tl.load(p_b + column, m_column, 0.0).to(tl.float32)
    of_d = tl.sum(both * b[:, None], axis=0)
    tl.store(p_parts_d + (i_part * column_tiles + i_column) * rank + k, of_d, m_k)
    d = tl.load(p_d + k, m_k, 0.0).to(tl.float32)
    of_b = tl.sum(both * d[None, :], axis=1)
    tl.store(p_parts_b + (i_part * rank_tiles + i_rank) * width + column, of_b, m_column)
