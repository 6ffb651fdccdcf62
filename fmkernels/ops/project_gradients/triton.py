"""The kernels of project_gradients on NVIDIA GPUs, with Triton; ``gpu.py`` says in which order.

    prepare   rows -> the same in float32, each sample near 1, and the exponents that are taken out
    sketch    the count sketch of every row
    signs     products of rows with random signs: Rademacher's, and the factors of the others
    finish    the sums of parts and of a sample's rows, in float64, times what was taken out

A *row* is a pair (δ, a) of the reference. Sums are made in parts, so that one sample occupies a
whole GPU. How they are cut, and the order within a part, are functions of the layer alone: whatever
the batch, a sample's numbers are added in the same order.

**The sketch.** A program has some buckets of some rows and goes through its part of the blocks.
Where a bucket's entry of a block lies, and its sign, are the same for all rows. An entry is read
from δ and from a as it is needed: the gradient does not exist. Behind δ is a 0, for the buckets of
the last block that get nothing, and behind a the bias's 1.

**The signs.** A program has the product of 128 entries of some rows with K × 128 signs, for each i
of its part, on the matrix units. The signs are made in the registers that those units read, of 1
bit each or by Philox. They are exact in float16; the entries, which are at most 1, become two
numbers of float16 that have 22 bits together, side by side in one product, and are added in
float32. A sum over 128 entries is multiplied by δ_i in float32:

    p_k = Σ_i δ_i ( Σ_j R_kij hi_j  +  2⁻¹¹ Σ_j R_kij lo_j )
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops.project_gradients import philox

SKETCH = tl.constexpr(philox.SKETCH * philox.LAYERS)
SHIFT = tl.constexpr(philox.SHIFT * philox.LAYERS)
GROUP = tl.constexpr(philox.GROUP)
WORD = tl.constexpr(32)
TILED_OUTPUTS = tl.constexpr(16)
"""Whose packed words lie side by side."""
NOT_FINITE = tl.constexpr(2**20)
"""The exponent of a sample with a number that is not finite."""
LOW = tl.constexpr(2.0**11)
"""What float16 rounds off is multiplied by, so that it does not become subnormal."""
TWO_SIGNS = tl.constexpr(0x80008000 - 2**32)
"""The sign bits of two numbers of float16 side by side."""
TWO_ONES = tl.constexpr(0x3C003C00)
UNROLLED = tl.constexpr(8)


@triton.jit
def power_of_two(e):
    """2^e in float64, for −1022 ≤ e ≤ 1023."""
    return ((e + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(x):
    """e for 2^(e − 1) ≤ x < 2^e, of a float64; 0 for 0."""
    small = x < 2.0**-1022
    bits = (x * tl.where(small, 2.0**54, 1.0)).to(tl.int64, bitcast=True)
    return tl.where(x == 0, 0, (bits >> 52).to(tl.int32) - tl.where(small, 1076, 1022))


@triton.jit
def bits_of_size(x):
    """The bits of |x| in its own dtype or in float32, as an integer: they are in the same order."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & (2**63 - 1)
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True) & (2**31 - 1)
    return bits


@triton.jit
def rows_of(p_offsets, i_sample, rows, OFFSETS: tl.constexpr):
    if OFFSETS:
        first, last = tl.load(p_offsets + i_sample), tl.load(p_offsets + i_sample + 1)
    else:
        first, last = i_sample * rows, (i_sample + 1) * rows
    return first, last


@triton.jit
def sample_of(p_offsets, i_row, samples, rows, OFFSETS: tl.constexpr):
    """The sample of a row: the last that begins at it or before it."""
    if OFFSETS:
        low, high = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64) + samples
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(p_offsets + middle) <= i_row
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        return low
    return i_row // rows


@triton.jit
def project_gradients_prepare_kernel(
    p_values, p_offsets, p_scaled, p_exponent, rows, width, row_stride, stride,
    BIAS: tl.constexpr, OFFSETS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows, width) -> (rows, width + 1): a sample times 2^−e; last the bias's 1 times it, or 0."""
    i_sample = tl.program_id(0).to(tl.int64)
    first, last = rows_of(p_offsets, i_sample, rows, OFFSETS)
    o_row, o_column = tl.arange(0, R), tl.arange(0, BLOCK)
    # what is not finite has larger bits, without the sign, than all that is
    bits = tl.zeros((R, BLOCK), tl.int64 if p_values.dtype.element_ty == tl.float64 else tl.int32)
    for i_row in range(first, last, R):
        m_row = i_row + o_row < last
        p_row = p_values + (i_row + o_row) * row_stride
        for i_column in range(0, width, BLOCK):
            column = (i_column + o_column).to(tl.int64)
            m_tile = m_row[:, None] & (column < width)[None, :]
            x = tl.load(p_row[:, None] + column[None, :] * stride, m_tile, other=0)
            bits = tl.maximum(bits, bits_of_size(x))
    largest = tl.max(tl.reshape(bits, (R * BLOCK,)))
    largest = largest.to(tl.float64 if largest.dtype == tl.int64 else tl.float32, bitcast=True)
    bad = (largest < float("inf")) == 0
    largest = tl.maximum(tl.where(bad, 0.0, largest).to(tl.float64), 1.0 if BIAS else 0.0)
    e = exponent_of(largest)
    # twice, because 2^−e may leave the range
    half = (-e) >> 1
    factor, other = power_of_two(half), power_of_two(-e - half)
    tl.store(p_exponent + i_sample, tl.where(bad, NOT_FINITE, e))
    for i_row in range(first, last, R):
        m_row = i_row + o_row < last
        p_row = p_values + (i_row + o_row) * row_stride
        p_copy = p_scaled + (i_row + o_row) * (width + 1)
        for i_column in range(0, width, BLOCK):
            column = (i_column + o_column).to(tl.int64)
            m_tile = m_row[:, None] & (column < width)[None, :]
            x = tl.load(p_row[:, None] + column[None, :] * stride, m_tile, other=0).to(tl.float64)
            x = tl.where(bad, 0.0, x * factor * other).to(tl.float32)
            tl.store(p_copy[:, None] + column[None, :], x, m_tile)
        last_number = (factor * other).to(tl.float32) if BIAS else 0.0
        tl.store(p_copy + width, tl.zeros((R,), tl.float32) + last_number, m_row)


@triton.jit(do_not_specialize=["seed", "layer"])
def project_gradients_sketch_kernel(
    p_delta, p_a, p_parts, pairs, out_features, in_features, dim, blocks, repeats, words,
    block_rows, block_columns, part_rows, part_columns, seed, layer,
    BIAS: tl.constexpr, NARROW: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(pairs, out + 1), (pairs, in + 1) -> (parts, pairs, K): each part has 32 · ``words`` blocks.

    So many blocks are ``part_rows`` of the gradient and ``part_columns`` < in of the next, and so
    is one block.

    NARROW: K ≤ in, so that a block lies in two rows of the gradient at most.
    """
    bucket_tiles = tl.cdiv(dim, BK)
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    # past the end are the last bucket and the last pair again, with the same result
    bucket = tl.minimum(i_tile % bucket_tiles * BK + tl.arange(0, BK), dim - 1)
    pair = (i_tile // bucket_tiles).to(tl.int64) * BP + tl.arange(0, BP)
    pair = tl.minimum(pair, pairs - 1)
    # Tiles (pairs, buckets) lie along one dimension: so neighbouring threads have neighbouring
    # buckets, as their loads have. Of two dimensions compilers choose the wrong one.
    pair = tl.reshape(tl.broadcast_to(pair[:, None], (BP, BK)), (BP * BK,))
    p_row_delta = p_delta + pair * (out_features + 1)
    p_row_a = p_a + pair * (in_features + 1)
    acc = tl.zeros((BP * BK,), tl.float32)
    none = tl.zeros((BK,), tl.int32)
    first_word = i_part * words
    last_word = tl.minimum(first_word + words, tl.cdiv(blocks, WORD))
    # where a word's blocks begin, and those of the next: without a division of 64 bits
    first_row, first_column = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    for _ in range(0, i_part):
        first_row, first_column = row_and_column(
            first_row + part_rows, first_column + part_columns, in_features, True
        )
    next_row, next_column = first_row, first_column
    for i_word in range(first_word, last_word):
        quads = tl.minimum(WORD // 4, tl.cdiv(blocks, 4) - i_word * (WORD // 4))
        for copy in range(0, repeats):
            group = none + i_word // 4
            w0, w1, w2, w3 = tl.philox(seed, group, bucket, none + copy, none + layer + SKETCH)
            which = i_word % 4
            signs = tl.where(
                which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)
            ).to(tl.int32, bitcast=True)
            next_row, next_column = first_row, first_column
            for i_quad in range(0, quads):
                number = i_word * (WORD // 4) + i_quad
                s0, s1, s2, s3 = tl.philox(seed, number, 0, copy, layer + SHIFT)
                for i in tl.static_range(4):
                    drawn = s0 if i == 0 else s1 if i == 1 else s2 if i == 2 else s3
                    shift = ((drawn.to(tl.uint64) * dim) >> 32).to(tl.int32)
                    place = bucket - shift
                    j = next_column + tl.where(place < 0, place + dim, place)
                    row, column = row_and_column(next_row, j, in_features, NARROW)
                    if BIAS:
                        past = (row - out_features) * in_features + column
                        is_bias = (row >= out_features) & (past < out_features)
                        row = tl.where(is_bias, past, row)
                        column = tl.where(is_bias, in_features, column)
                    row = tl.minimum(row, out_features)  # past the end of the gradient: δ is 0
                    delta = tl.load(p_row_delta + for_pairs(row.to(tl.int64), BP))
                    a = tl.load(p_row_a + for_pairs(column.to(tl.int64), BP))
                    sign = for_pairs(signs << (31 - i - 4 * i_quad) & -(2**31), BP)
                    flipped = delta.to(tl.int32, bitcast=True) ^ sign
                    acc = tl.fma(flipped.to(tl.float32, bitcast=True), a, acc)
                    next_row, next_column = row_and_column(
                        next_row + block_rows, next_column + block_columns, in_features, True
                    )
        first_row, first_column = next_row, next_column
    p_result = p_parts + (i_part.to(tl.int64) * pairs + pair) * dim
    tl.store(p_result + for_pairs(bucket.to(tl.int64), BP), acc)


@triton.jit
def for_pairs(x, BP: tl.constexpr):
    """(buckets) -> (pairs · buckets)."""
    return tl.reshape(tl.broadcast_to(x[None, :], (BP, x.shape[0])), (BP * x.shape[0],))


@triton.jit
def row_and_column(row, column, width, NARROW: tl.constexpr):
    """Of an entry ``column`` after the beginning of a row; NARROW: that is below 2 · width."""
    if NARROW:
        row = tl.where(column < width, row, row + 1)
        column = tl.where(column < width, column, column - width)
    else:
        row += column // width
        column = column % width
    return row, column


@triton.jit
def plus_minus_one(words):
    """(K, 4) words -> (K, 128) signs in float16: −1 where a bit is 1.

    The column 8 q + 2 w + e has bit q + 16 e of word w. So a thread of the matrix units has the
    signs of one word, and one shift makes two of them.
    """
    o_shift = 15 - tl.arange(0, 16)
    # in both halves of a word 1.0, and its sign from the bit that is there after the shift
    two = words[:, None, :] << o_shift[None, :, None] & TWO_SIGNS ^ TWO_ONES  # (K, 16, 4)
    signs = tl.join(two.to(tl.int16), (two >> 16).to(tl.int16))  # (K, 16, 4, 2)
    return tl.reshape(signs, (words.shape[0], GROUP)).to(tl.float16, bitcast=True)


@triton.jit
def entry_of_column():
    """(128): which entry of a group the column of ``plus_minus_one`` multiplies."""
    c = tl.arange(0, GROUP)
    return c // 2 % 4 * WORD + c // 8 + c % 2 * 16


@triton.jit
def two_halves(x):
    """(128, P) -> (128, 2 P) float16: x, and 2¹¹ times what is left of it, side by side."""
    high = x.to(tl.float16).to(tl.float32)
    both = tl.join(high, (x - high) * LOW)
    # rounded last: Triton 3.6 does not put what was reshaped into shared memory
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1])).to(tl.float16)


@triton.jit
def sum_of_halves(products):
    """(K, 2 P) -> (K, P)."""
    high, low = tl.split(tl.reshape(products, (products.shape[0], products.shape[1] // 2, 2)))
    return tl.fma(low, tl.full(low.shape, 1 / LOW, tl.float32), high)


@triton.jit(do_not_specialize=["seed", "stream"])
def project_gradients_signs_kernel(
    p_x, p_delta, p_words, p_parts, pairs, width, x_pitch, rows, delta_pitch, dim, row_parts,
    rows_of_a_part, groups_of_a_part, first_part, matrix_row, first_word, all_words, seed, stream,
    PACKED: tl.constexpr, WEIGHTED: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(pairs, width), (pairs, rows) -> (parts, pairs, K): Σ_i δ_i Σ_j R_kij x_j; δ may be all 1."""
    output_tiles = tl.cdiv(dim, BK)
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    i_output = i_tile % output_tiles * BK + tl.arange(0, BK)
    i_pair = (i_tile // output_tiles).to(tl.int64) * BP + tl.arange(0, BP)
    m_pair = i_pair < pairs
    p_row_delta = p_delta + i_pair * delta_pitch
    i_word = tl.zeros((BK, 1), tl.int32) + tl.arange(0, 4)[None, :]
    row_words = tl.cdiv(width, WORD)
    output = tl.minimum(i_output, dim - 1)[:, None]
    tile = (output // TILED_OUTPUTS).to(tl.int64) * all_words * TILED_OUTPUTS
    p_output = p_words + tile + output % TILED_OUTPUTS
    acc = tl.zeros((BK, BP), tl.float32)
    none = tl.zeros((BK, 4), tl.int32)
    first_row = i_part % row_parts * rows_of_a_part
    last_row = tl.minimum(first_row + rows_of_a_part, rows)
    first_group = i_part // row_parts * groups_of_a_part
    last_group = tl.minimum(first_group + groups_of_a_part, tl.cdiv(width, GROUP))
    for i_group in range(first_group, last_group):
        j = i_group * GROUP + entry_of_column()
        p_tile = p_x + i_pair[None, :] * x_pitch + j[:, None].to(tl.int64)
        x = tl.load(p_tile, (j < width)[:, None] & m_pair[None, :], other=0.0)
        halves = two_halves(x)
        for i_row in range(first_row, last_row):
            if WEIGHTED:
                delta = tl.load(p_row_delta + i_row, m_pair, other=0.0)
            if PACKED:
                word = i_group * 4 + i_word
                o_word = first_word + tl.cast(i_row, tl.int64) * row_words + word
                words = tl.load(p_output + o_word * TILED_OUTPUTS, word < row_words, other=0)
            else:
                counter = none + (matrix_row + i_row)
                w0, w1, w2, w3 = tl.philox(
                    seed, none + i_group, counter, none + i_output[:, None], none + stream
                )
                words = tl.where(
                    i_word < 2, tl.where(i_word == 0, w0, w1), tl.where(i_word == 2, w2, w3)
                ).to(tl.int32, bitcast=True)
            sums = sum_of_halves(tl.dot(plus_minus_one(words), halves))
            if WEIGHTED:
                acc = tl.fma(sums, tl.broadcast_to(delta[None, :], (BK, BP)), acc)
            else:
                acc += sums
    p_part = p_parts + (first_part + i_part).to(tl.int64) * pairs * dim
    p_result = p_part + i_pair[None, :] * dim + i_output[:, None].to(tl.int64)
    tl.store(p_result, acc, (i_output < dim)[:, None] & m_pair[None, :])


@triton.jit(do_not_specialize=["scale_bits"])
def project_gradients_finish_kernel(
    p_parts, p_right, p_offsets, p_delta_exponent, p_exponent, p_sums, p_result, first_pair, pairs,
    samples, rows, parts, dim, left_dim, right_dim, scale_bits, OFFSETS: tl.constexpr,
    FACTORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds these pairs' parts, or products of two factors, to the sums of their samples.

    A program has the rows of one sample: the others that begin with one of its rows end at once.
    """
    i_pair = tl.program_id(0).to(tl.int64)
    i_sample = sample_of(p_offsets, first_pair + i_pair, samples, rows, OFFSETS)
    first, last = rows_of(p_offsets, i_sample, rows, OFFSETS)
    if (first == first_pair + i_pair) | (i_pair == 0):
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_k = k < dim
        place = i_sample * dim + k
        sums = tl.zeros((BLOCK,), tl.float64)
        if first < first_pair:
            sums = tl.load(p_sums + place, m_k, other=0.0)
        for row in range(i_pair, tl.minimum(last - first_pair, pairs)):
            if FACTORED:
                left = tl.load(p_parts + row * left_dim + k // (dim // left_dim), m_k, other=0.0)
                right = tl.load(p_right + row * right_dim + k % right_dim, m_k, other=0.0)
                sums += left.to(tl.float64) * right.to(tl.float64)
            else:
                of_row = tl.zeros((BLOCK,), tl.float64)
                for i_part in range(0, parts, UNROLLED):
                    for i in tl.static_range(UNROLLED):  # so many loads at a time
                        part = tl.zeros((BLOCK,), tl.int64) + i_part + i
                        p_part = p_parts + (part * pairs + row) * dim
                        number = tl.load(p_part + k, m_k & (part < parts), other=0.0)
                        of_row += number.to(tl.float64)
                sums += of_row
        tl.store(p_sums + place, sums, m_k)
        delta_exponent = tl.load(p_delta_exponent + i_sample)
        exponent = tl.load(p_exponent + i_sample)
        bad = (delta_exponent == NOT_FINITE) | (exponent == NOT_FINITE)
        e = tl.minimum(tl.maximum(delta_exponent + exponent, -1000), 1000)
        factor = scale_bits.to(tl.float64, bitcast=True) * power_of_two(e)
        result = tl.where(bad, float("nan"), sums * factor)
        tl.store(p_result + place, result.to(tl.float32), m_k)
