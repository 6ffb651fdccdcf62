"""The kernels of knn on NVIDIA GPUs, with Triton; ``gpu.py`` says in which order they run.

    prepare      rows -> their copy in low precision, norms, what the copy lacks
    candidates   the matrix product of queries and rows; which rows reach their query's threshold
    listing      what the product left, as row numbers
    score        the listed rows' scores, in float64 from the inputs themselves
    merge        the k best of those and of what was best before

**The product.** A program takes a tile of queries and, one after the other, tiles of consecutive
rows. The float32 scores of a tile stay in registers: they are compared with the queries'
thresholds, and of 32 consecutive rows (a bucket) one word of 32 bits is left, a bit for every row
that reaches the threshold. Words are nearly all zero; the others are appended, with the bucket's
number, to the query's buffer, in a slot that an atomic addition hands out. So no score goes to
memory, and what does is 8 bytes for about every candidate. In which order words arrive is left to
chance, but not the result: the rows are scored again and ordered by (score, row).

Rows are numbered in the order of the search, i = 0 … of a segment, and row ``first + (i // run) ·
stride + (i % run) · step`` of the tensor is meant (see ``gpu_config.Segment``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops.knn.gpu_config import BUCKET

WORD = tl.constexpr(BUCKET)
NONE = tl.constexpr(2**63 - 1)
"""Greater than every row."""
EXPONENT_OF_ONE = tl.constexpr(1023)
"""In the bits of a float64, above 52 of its fraction."""


@triton.jit
def row_of(i, first, run, stride, step):
    return tl.full((), 0, tl.int64) + first + (i // run).to(tl.int64) * stride + (i % run) * step


@triton.jit
def exponent_of(x):
    """e of x = m·2^e, 1 ≤ m < 2, for normal x > 0; 0 for zeros, infinities and NaN."""
    bits = ((x.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32)
    return tl.where((bits == 0) | (bits == 2047), 0, bits - EXPONENT_OF_ONE)


@triton.jit
def power_of_two(e):
    """2^e for −1022 ≤ e ≤ 1023."""
    return ((e + EXPONENT_OF_ONE).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def range_exponent(p_row, dim, dim_stride, m_row, R: tl.constexpr, BLOCK: tl.constexpr):
    """Of the largest entry of rows (R,), so that the squares of what is divided by it are finite.

    A row below the normal numbers is taken by 2^−1000.
    """
    largest = tl.zeros((R,), tl.float64)
    for i_dim in range(0, dim, BLOCK):
        o_dim = i_dim + tl.arange(0, BLOCK)
        m_tile = m_row[:, None] & (o_dim < dim)[None, :]
        x = tl.load(p_row[:, None] + o_dim[None, :].to(tl.int64) * dim_stride, mask=m_tile, other=0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float64)), axis=1))
    small = (largest > 0) & (largest < 2.0**-1000)
    return tl.where(small, -1000, tl.minimum(exponent_of(largest), 1022))


@triton.jit
def knn_prepare_kernel(
    p_rows, p_copy, p_squares, p_lost, p_exponent, count, dim, row_stride, dim_stride, pitch,
    first, run, stride, step, COPY: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row x = 2^e·w, 1 ≤ ‖w‖ < 2: e, ‖w‖² and, of a copy of w in low precision, ‖w − copy‖²."""
    i_row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_row = i_row < count
    p_row = p_rows + row_of(i_row, first, run, stride, step) * row_stride
    e = tl.zeros((R,), tl.int32)
    if WIDE:
        e = range_exponent(p_row, dim, dim_stride, m_row, R, BLOCK)
    squares = tl.zeros((R,), tl.float64)
    scale = power_of_two(-e)
    for i_dim in range(0, dim, BLOCK):
        o_dim = i_dim + tl.arange(0, BLOCK)
        m_tile = m_row[:, None] & (o_dim < dim)[None, :]
        x = tl.load(p_row[:, None] + o_dim[None, :].to(tl.int64) * dim_stride, mask=m_tile, other=0)
        x = x.to(tl.float64) * scale[:, None]
        squares += tl.sum(x * x, axis=1)
    half = exponent_of(squares) >> 1
    more = power_of_two(-half)
    tl.store(p_squares + i_row, squares * more * more, mask=m_row)
    tl.store(p_exponent + i_row, e + half, mask=m_row)
    if COPY:
        lost = tl.zeros((R,), tl.float64)
        for i_dim in range(0, pitch, BLOCK):
            o_dim = i_dim + tl.arange(0, BLOCK)
            o_dim = o_dim[None, :].to(tl.int64)
            m_tile = m_row[:, None] & (o_dim < dim)
            x = tl.load(p_row[:, None] + o_dim * dim_stride, mask=m_tile, other=0)
            x = x.to(tl.float64) * scale[:, None] * more[:, None]
            low = x.to(tl.float32).to(p_copy.dtype.element_ty)
            tl.store(p_copy + i_row[:, None] * pitch + o_dim, low, m_row[:, None] & (o_dim < pitch))
            rest = x - low.to(tl.float64)
            lost += tl.sum(rest * rest, axis=1)
        tl.store(p_lost + i_row, lost, mask=m_row)


@triton.jit
def knn_candidates_kernel(
    p_queries, p_rows, p_factor, p_addend, p_half, p_weight, p_threshold, p_count, p_buckets,
    p_words, queries, rows, dim, query_pitch, row_stride, first, run, stride, step, tiles, slots,
    SQUARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Words of the rows for which not (factor·(q·b) + addend − weight·half < threshold)."""
    query_tiles = tl.cdiv(queries, BM)
    i_program = tl.program_id(0)
    i_query = (i_program % query_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    i_chunk = i_program // query_tiles
    threshold = tl.load(p_threshold + i_query, mask=i_query < queries, other=float("nan"))
    wanted = threshold == threshold
    p_query = p_queries + tl.minimum(i_query, queries - 1) * query_pitch
    if SQUARED:
        weight = tl.load(p_weight + i_query, mask=i_query < queries, other=0.0)
    o_dim = tl.arange(0, BK)
    bit = tl.full((BN,), 1, tl.int32) << (tl.arange(0, BN) % WORD)
    for i_tile in range(i_chunk * tiles, tl.minimum((i_chunk + 1) * tiles, tl.cdiv(rows, BN))):
        i_row = i_tile * BN + tl.arange(0, BN)
        m_row = i_row < rows
        inside = tl.minimum(i_row, rows - 1)
        p_row = p_rows + row_of(inside, first, run, stride, step) * row_stride
        acc = tl.zeros((BM, BN), tl.float32)
        for i_dim in range(0, dim, BK):
            q = tl.load(p_query[:, None] + (i_dim + o_dim)[None, :])
            b = tl.load(p_row[:, None] + (i_dim + o_dim)[None, :])
            acc = tl.dot(q, tl.trans(b), acc, input_precision="ieee")
        factor = tl.load(p_factor + i_row, mask=m_row, other=0.0)
        addend = tl.load(p_addend + i_row, mask=m_row, other=0.0)
        upper = acc * factor[None, :] + addend[None, :]
        if SQUARED:
            half = tl.load(p_half + i_row, mask=m_row, other=0.0)
            upper -= weight[:, None] * half[None, :]
        # a NaN is a candidate, but not that of the last row where there are no more rows
        bits = tl.where(upper < threshold[:, None], 0, tl.where(m_row, bit, 0)[None, :])
        words = tl.sum(tl.reshape(bits, (BM, BN // WORD, WORD)), axis=2)
        some = (words != 0) & wanted[:, None]
        o_query = tl.broadcast_to(i_query[:, None], (BM, BN // WORD))
        slot = tl.atomic_add(p_count + o_query, 1, mask=some, sem="relaxed")
        some = some & (slot < slots)
        bucket = i_tile * (BN // WORD) + tl.arange(0, BN // WORD)
        o_slot = o_query * slots + slot
        tl.store(p_buckets + o_slot, tl.broadcast_to(bucket[None, :], (BM, BN // WORD)), mask=some)
        tl.store(p_words + o_slot, words, mask=some)


@triton.jit
def knn_listing_kernel(
    p_count, p_buckets, p_words, p_list, p_length, p_overflow, slots, capacity, first, run, stride,
    step, S: tl.constexpr,
):  # fmt: skip
    """Every bit of a query's words as a row; and whether there were more than there is room for."""
    i_query = tl.program_id(0).to(tl.int64)
    count = tl.load(p_count + i_query)
    length = 0
    o_bit = tl.arange(0, WORD)
    for i_slot in range(0, tl.minimum(count, slots), S):
        o_slot = i_slot + tl.arange(0, S)
        m_slot = o_slot < count
        m_slot = m_slot & (o_slot < slots)
        bucket = tl.load(p_buckets + i_query * slots + o_slot, mask=m_slot, other=0)
        word = tl.load(p_words + i_query * slots + o_slot, mask=m_slot, other=0)
        bits = tl.reshape((word[:, None] >> o_bit[None, :]) & 1, (S * WORD,))
        i_row = tl.reshape(bucket[:, None] * WORD + o_bit[None, :], (S * WORD,))
        place = length + tl.cumsum(bits, axis=0) - bits
        m_row = (bits == 1) & (place < capacity)
        row = row_of(i_row, first, run, stride, step)
        tl.store(p_list + i_query * capacity + place, row, mask=m_row)
        length += tl.sum(bits, axis=0)
    tl.store(p_length + i_query, tl.minimum(length, capacity))
    if (count > slots) | (length > capacity):
        tl.store(p_overflow + i_query, 1)
    tl.store(p_count + i_query, 0)


@triton.jit
def knn_score_kernel(
    p_queries, p_rows, p_list, p_length, p_scores, dim, query_stride, query_dim_stride, row_stride,
    dim_stride, capacity, missing, METRIC: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of the listed rows in float64. A NaN becomes −inf, of a row that is not there."""
    i_query = tl.program_id(0).to(tl.int64)
    length = tl.load(p_length + i_query)
    p_query = p_queries + i_query * query_stride
    for i_block in range(tl.program_id(1) * R, length, tl.num_programs(1) * R):
        o_list = i_block + tl.arange(0, R)
        m_row = o_list < length
        row = tl.load(p_list + i_query * capacity + o_list, mask=m_row, other=0)
        p_row = p_rows + row * row_stride
        scale = tl.full((R,), 1, tl.float64)
        if WIDE and METRIC == "cosine":
            e = range_exponent(p_row, dim, dim_stride, m_row, R, BLOCK)
            scale = power_of_two(-e)
        total = tl.zeros((R,), tl.float64)
        row_squares = tl.zeros((R,), tl.float64)
        query_squares = tl.zeros((R,), tl.float64)
        for i_dim in range(0, dim, BLOCK):
            o_dim = (i_dim + tl.arange(0, BLOCK)).to(tl.int64)
            m_dim = o_dim < dim
            q = tl.load(p_query + o_dim * query_dim_stride, mask=m_dim, other=0).to(tl.float64)
            p_tile = p_row[:, None] + o_dim[None, :] * dim_stride
            b = tl.load(p_tile, mask=m_row[:, None] & m_dim[None, :], other=0).to(tl.float64)
            if METRIC == "l2":
                difference = tl.where(m_row[:, None], q[None, :] - b, 0.0)
                total -= tl.sum(difference * difference, axis=1)
            else:
                if METRIC == "cosine":
                    b = b * scale[:, None]
                    query_squares += tl.sum(q * q, axis=0)
                    row_squares += tl.sum(b * b, axis=1)
                total += tl.sum(q[None, :] * b, axis=1)
        if METRIC == "cosine":
            norms = tl.sqrt(query_squares) * tl.sqrt(row_squares)
            total = total / tl.where(norms == 0, 1.0, norms)
        nan = total != total
        tl.store(
            p_scores + i_query * capacity + o_list, tl.where(nan, float("-inf"), total), mask=m_row
        )
        tl.store(p_list + i_query * capacity + o_list, missing + o_list, mask=m_row & nan)


@triton.jit
def ahead(score, row, other_score, other_row):
    """How many of the others are better: a larger score, or the same and a lower row."""
    better = other_score[None, :] > score[:, None]
    same = other_score[None, :] == score[:, None]
    return tl.sum((better | (same & (other_row[None, :] < row[:, None]))).to(tl.int32), axis=1)


@triton.jit
def knn_merge_kernel(
    p_scores, p_rows, p_new_scores, p_new_rows, p_length, p_merged_scores, p_merged_rows, k,
    capacity, B: tl.constexpr,
):  # fmt: skip
    """The k best of k sorted ones and ``length`` new ones: every one's place is counted."""
    i_query = tl.program_id(0).to(tl.int64)
    length = tl.load(p_length + i_query)
    o_new, o_best = i_query * capacity, i_query * k
    worst = tl.load(p_scores + o_best + k - 1)
    low = float("-inf")
    for i in range(0, k, B):
        o_i = i + tl.arange(0, B)
        score = tl.load(p_scores + o_best + o_i, mask=o_i < k, other=low)
        row = tl.load(p_rows + o_best + o_i, mask=o_i < k, other=NONE)
        place = o_i
        for j in range(0, length, B):
            o_j = j + tl.arange(0, B)
            other = tl.load(p_new_scores + o_new + o_j, mask=o_j < length, other=low)
            other_row = tl.load(p_new_rows + o_new + o_j, mask=o_j < length, other=NONE)
            place += ahead(score, row, other, other_row)
        m_place = (o_i < k) & (place < k)
        tl.store(p_merged_scores + o_best + place, score, mask=m_place)
        tl.store(p_merged_rows + o_best + place, row, mask=m_place)
    for i in range(0, length, B):
        o_i = i + tl.arange(0, B)
        score = tl.load(p_new_scores + o_new + o_i, mask=o_i < length, other=low)
        if tl.max(score, axis=0) >= worst:
            row = tl.load(p_new_rows + o_new + o_i, mask=o_i < length, other=NONE)
            place = tl.zeros((B,), tl.int32)
            for j in range(0, k, B):
                o_j = j + tl.arange(0, B)
                other = tl.load(p_scores + o_best + o_j, mask=o_j < k, other=low)
                other_row = tl.load(p_rows + o_best + o_j, mask=o_j < k, other=NONE)
                place += ahead(score, row, other, other_row)
            for j in range(0, length, B):
                o_j = j + tl.arange(0, B)
                other = tl.load(p_new_scores + o_new + o_j, mask=o_j < length, other=low)
                other_row = tl.load(p_new_rows + o_new + o_j, mask=o_j < length, other=NONE)
                place += ahead(score, row, other, other_row)
            m_place = (o_i < length) & (place < k)
            tl.store(p_merged_scores + o_best + place, score, mask=m_place)
            tl.store(p_merged_rows + o_best + place, row, mask=m_place)
