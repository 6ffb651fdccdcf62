"""How the kernels of ``triton.py`` are started: tensors in, tensors filled."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops.project_gradients.gpu_config import WORD_BLOCKS, Signs, Sketch
from fmkernels.ops.project_gradients.triton import (
    project_gradients_finish_kernel,
    project_gradients_prepare_kernel,
    project_gradients_signs_kernel,
    project_gradients_sketch_kernel,
)

FINISHED = 128
"""Numbers of a result that a program adds up."""


class Samples(NamedTuple):
    """Which rows belong to which sample: ``rows`` to each, or those between its offsets."""

    offsets: Tensor | None
    rows: int
    batch: int


class Matrix(NamedTuple):
    """Rows of random signs: row i of output k, from row ``first`` on."""

    seed: int
    stream: int
    """Times 2²⁴, and the layer."""
    first: int = 0
    packed: Tensor | None = None
    """(tiles of outputs, words, outputs) of a matrix that was given."""
    first_word: int = 0
    """That of row ``first``."""


def prepare(values: Tensor, samples: Samples, bias: bool) -> tuple[Tensor, Tensor]:
    """(P, width) -> (P, width + 1) float32, each sample's times 2^−e, and e (B), int32.

    The last number of a row is the 1 that stands behind a for the bias, times the same, or 0.
    """
    pairs, width = values.shape
    scaled = torch.empty(pairs, width + 1, dtype=torch.float32, device=values.device)
    exponent = torch.empty(samples.batch, dtype=torch.int32, device=values.device)
    one_row = samples.offsets is None and samples.rows == 1
    project_gradients_prepare_kernel[(samples.batch,)](
        values,
        exponent if samples.offsets is None else samples.offsets,
        scaled,
        exponent,
        samples.rows,
        width,
        *values.stride(),
        BIAS=bias,
        OFFSETS=samples.offsets is not None,
        R=1 if one_row else 4,
        BLOCK=512 if one_row else 256,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return scaled, exponent


def sketch(
    delta: Tensor,
    a: Tensor,
    parts: Tensor,
    bias: bool,
    seed: int,
    layer: int,
    repeats: int,
    plan: Sketch,
) -> None:
    """(p, out + 1), (p, in + 1) -> parts (parts, p, K) of count sketches."""
    pairs, dim = parts.shape[1:]
    tiles = -(-pairs // plan.pairs) * -(-dim // plan.buckets)
    project_gradients_sketch_kernel[(tiles, plan.parts)](
        delta,
        a,
        parts,
        pairs,
        delta.shape[1] - 1,
        a.shape[1] - 1,
        dim,
        plan.blocks,
        repeats,
        plan.words,
        *divmod(dim, a.shape[1] - 1),
        *divmod(plan.words * WORD_BLOCKS * dim, a.shape[1] - 1),
        seed,
        layer,
        BIAS=bias,
        NARROW=plan.narrow,
        BP=plan.pairs,
        BK=plan.buckets,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )


def signs(
    x: Tensor,
    delta: Tensor | None,
    rows: int,
    matrix: Matrix,
    parts: Tensor,
    first_part: int,
    plan: Signs,
) -> None:
    """(p, width), (p, rows) or None for ones -> parts (…, p, K), from ``first_part`` on."""
    pairs, dim = parts.shape[1:]
    tiles = -(-pairs // plan.pairs) * -(-dim // plan.outputs)
    packed = matrix.packed
    project_gradients_signs_kernel[(tiles, plan.parts)](
        x,
        x if delta is None else delta,
        x if packed is None else packed,
        parts,
        pairs,
        x.shape[1],
        x.stride(0),
        rows,
        0 if delta is None else delta.stride(0),
        dim,
        plan.row_parts,
        plan.rows,
        plan.groups,
        first_part,
        matrix.first,
        matrix.first_word,
        0 if packed is None else packed.shape[1],
        matrix.seed,
        matrix.stream,
        PACKED=packed is not None,
        WEIGHTED=delta is not None,
        BK=plan.outputs,
        BP=plan.pairs,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )


def finish(
    parts: Tensor,
    right: Tensor | None,
    samples: Samples,
    exponents: tuple[Tensor, Tensor],
    sums: Tensor,
    result: Tensor,
    first_pair: int,
    scale: float,
) -> None:
    """Add the rows from ``first_pair`` on to ``sums`` (B, K), float64, and write the result so far.

    Args:
        parts: (parts, p, K); or the left factors (1, p, k₁).
        right: the right factors (1, p, k₂).
        samples: which rows belong together.
        exponents: of δ and of a.
        sums: what the rows before left.
        result: (B, K), float32.
        first_pair: the first row.
        scale: of the projection.
    """
    count, pairs, left_dim = parts.shape
    dim = result.shape[1]
    (scale_bits,) = struct.unpack("<q", struct.pack("<d", scale))
    project_gradients_finish_kernel[(pairs, -(-dim // FINISHED))](
        parts,
        parts if right is None else right,
        exponents[0] if samples.offsets is None else samples.offsets,
        *exponents,
        sums,
        result,
        first_pair,
        pairs,
        samples.batch,
        samples.rows,
        count,
        dim,
        left_dim,
        dim if right is None else right.shape[2],
        scale_bits,
        OFFSETS=samples.offsets is not None,
        FACTORED=right is not None,
        BLOCK=FINISHED,
        num_warps=4,
        enable_fp_fusion=True,
    )
