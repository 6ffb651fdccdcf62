"""The projection of gradients in PyTorch: what is right, in tiles of the random matrix.

The gradient of a linear layer y = W a + b for one sample is a sum over its rows (views, tokens),

    G = Σ_s δ_s [a_s; 1]ᵀ,        δ_s the gradient at the layer's output, a_s its input

and its projection p = P vec(G) needs neither G nor P:

    Rademacher     p_k = Σ_s ( Σ_i δ_si (Σ_j R_kij a_sj)  +  Σ_i R_ki δ_si )
    KhatriRao      p_k = Σ_s (r_k · δ_s) (s_k · [a_s; 1])
    Kronecker      p_uv = Σ_s (l_u · δ_s) (r_v · [a_s; 1])
    CountSketch    p_k = Σ_s Σ_c sign(c, k) g_s[c K + (k − shift_c) mod K]

where g_s = (vec(δ_s a_sᵀ), δ_s): the weight's gradient row by row, then the bias's. So the entry d
of g_s is δ_s[d div in] · a_s[d mod in], or past all of them δ_s[d − out · in].

**Range.** A gradient of 1e-8 is a subnormal number of float16, and products of two small float32
may vanish. So each sample's δ and a are multiplied by powers of two that take their largest entries
to between 1/2 and 1, which rounds nothing, and the result is multiplied by the inverse. For the
bias the constant 1 counts as an entry of a. A sample in which a number is not finite is NaN
throughout, and only that one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fmkernels._autocast import product_dtype
from fmkernels.ops.project_gradients import philox
from fmkernels.ops.project_gradients.khatri_rao import factor
from fmkernels.ops.project_gradients.rademacher import dense_signs

TILE = 2**20
"""Numbers that are in memory at a time, about."""
PAIRS = 64
"""Rows that are projected at a time."""


def project_gradients(
    grad_output: Tensor,
    activation: Tensor,
    offsets: Tensor | None,
    rows: int,
    signs: Tensor | None,
    kind: str,
    dim: int,
    bias: bool,
    scale: float,
    seed: int = 0,
    layer: int = 0,
    repeats: int = 1,
    left: int = 0,
) -> Tensor:
    """(P, out), (P, in) -> (B, dim) float32; see ``fmkernels.ops.project_gradients.project``."""
    sample = sample_of_rows(grad_output, offsets, rows)
    samples = len(offsets) - 1 if offsets is not None else len(grad_output) // rows
    delta, delta_exponent = scaled(grad_output, sample, samples, at_least=0.0)
    a, a_exponent = scaled(activation, sample, samples, at_least=float(bias))
    one = torch.exp2(-a_exponent.to(a.dtype))[sample] if bias else None
    result = a.new_zeros(samples, dim, dtype=torch.float64)
    for start in range(0, len(delta), PAIRS):
        part = slice(start, start + PAIRS)
        pair = (delta[part], a[part], None if one is None else one[part])
        if kind == "rademacher":
            projected = _dense(*pair, signs, dim, seed, layer)
        elif kind == "count_sketch":
            projected = _count_sketch(*pair, dim, seed, layer, repeats)
        else:
            projected = _factored(*pair, dim, seed, layer, left)
        result.index_add_(0, sample[part], projected.double())
    exponent = (delta_exponent + a_exponent).clamp(-1000, 1000).double()
    finite = torch.where(delta_exponent.maximum(a_exponent) == NOT_FINITE, torch.nan, 1.0)
    return (result * (scale * finite * exponent.exp2()).unsqueeze(-1)).float()


NOT_FINITE = 2**20
"""The exponent of a sample with a number that is not finite."""


def sample_of_rows(grad_output: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """(P): the number of the sample that each row belongs to."""
    pairs = torch.arange(len(grad_output), device=grad_output.device)
    if offsets is None:
        return pairs // rows
    return torch.searchsorted(offsets[1:].contiguous(), pairs, right=True)


def scaled(values: Tensor, sample: Tensor, samples: int, at_least: float) -> tuple[Tensor, Tensor]:
    """Rows times 2^−e of their sample in float32, and e (B): the largest entry is in [1/2, 1)."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    largest = torch.full((samples,), at_least, dtype=torch.float64, device=values.device)
    if len(wide):
        of_row = wide.abs().amax(dim=1).double()
        of_row = torch.where(of_row.isfinite(), of_row, torch.inf)
        largest = largest.scatter_reduce(0, sample, of_row, "amax")
    _, exponent = torch.frexp(largest)
    finite = largest.isfinite()
    exponent = torch.where(finite, exponent.long(), NOT_FINITE)
    # twice, because 2^−e may leave the range
    half = torch.where(finite, -exponent // 2, 0)
    other = torch.where(finite, -exponent - half, 0)
    factors = [torch.exp2(part.to(wide.dtype))[sample].unsqueeze(1) for part in (half, other)]
    return (wide * factors[0] * factors[1]).nan_to_num(0.0, 0.0, 0.0).float(), exponent


def _tiles(count: int, numbers_each: int) -> Iterator[tuple[int, int]]:
    """[0, count) in parts of about TILE numbers."""
    step = max(1, TILE // max(1, numbers_each))
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A bᵀ, in the full precision of its dtype."""
    dtype = product_dtype(a)
    return (a.to(dtype) @ b.to(dtype).mT).to(a.dtype)


def _dense(
    delta: Tensor,
    a: Tensor,
    one: Tensor | None,
    packed: Tensor | None,
    dim: int,
    seed: int,
    layer: int,
) -> Tensor:
    """(P, out), (P, in), (P) -> (P, K)."""
    out_features, in_features = delta.shape[1], a.shape[1]
    result = a.new_zeros(len(a), dim)
    for first, last in _tiles(out_features, dim * max(in_features, len(a))):
        rows = last - first
        for start, stop in _tiles(dim, rows * max(in_features, len(a))):
            outputs = torch.arange(start, stop, device=a.device)
            weight, of_bias = dense_signs(
                packed, outputs, first, last, out_features, in_features, seed, layer
            )
            sums = _product(a, weight.to(a.dtype).flatten(0, 1)).unflatten(1, (-1, rows))
            if one is not None:
                sums = sums + one[:, None, None] * of_bias.to(a.dtype)
            part = delta[:, first:last]
            result[:, start:stop] += (sums * part.unsqueeze(1)).sum(dim=-1)
    return result


def _count_sketch(
    delta: Tensor, a: Tensor, one: Tensor | None, dim: int, seed: int, layer: int, repeats: int
) -> Tensor:
    """(P, out), (P, in), (P) -> (P, K)."""
    out_features, in_features = delta.shape[1], a.shape[1]
    weights = out_features * in_features
    entries = weights if one is None else weights + out_features
    bucket = torch.arange(dim, device=a.device)
    result = a.new_zeros(len(a), dim)
    for first, last in _tiles(-(-entries // dim), dim * len(a)):
        blocks = torch.arange(first, last, device=a.device)
        for copy in range(repeats):
            shift = philox.shifts(seed, layer, blocks, copy, dim)
            sign = philox.sketch_signs(seed, layer, first, last, copy, bucket)  # (c, K)
            entry = blocks.unsqueeze(1) * dim + (bucket - shift.unsqueeze(1)) % dim
            of_weight = (entry % weights).where(entry < weights, 0)
            block = delta[:, of_weight // in_features] * a[:, of_weight % in_features]
            block = block.where(entry < weights, 0)  # (P, c, K)
            if one is not None:
                of_bias = (entry - weights).clamp(0, out_features - 1)
                is_bias = (entry >= weights) & (entry < entries)
                block = block.where(~is_bias, delta[:, of_bias] * one[:, None, None])
            result += (block * sign.to(a.dtype)).sum(dim=1)
    return result


def _factored(
    delta: Tensor, a: Tensor, one: Tensor | None, dim: int, seed: int, layer: int, left: int
) -> Tensor:
    """(P, out), (P, in), (P) -> (P, K), by KhatriRao, or with ``left`` rows by Kronecker."""
    right_input = a if one is None else torch.cat([a, one.unsqueeze(1)], dim=1)

    def sums(stream: int, values: Tensor, count: int) -> Tensor:
        parts = [values.new_zeros(len(values), 0)]
        for start, stop in _tiles(count, values.shape[1]):
            outputs = torch.arange(start, stop, device=a.device)
            signs = factor(seed, layer, stream, outputs, values.shape[1])
            parts.append(_product(values, signs.to(values.dtype)))
        return torch.cat(parts, dim=1)

    if not left:
        return sums(philox.LEFT, delta, dim) * sums(philox.RIGHT, right_input, dim)
    u = sums(philox.LEFT, delta, left)
    v = sums(philox.RIGHT, right_input, dim // left)
    return (u.unsqueeze(2) * v.unsqueeze(1)).flatten(1)
