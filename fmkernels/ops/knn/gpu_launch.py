"""How the kernels of ``triton.py`` are started: tensors in, tensors filled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops.knn.gpu_config import MERGED, PITCH, PREPARED, SCORED, Grid, Product, Segment
from fmkernels.ops.knn.triton import (
    knn_candidates_kernel,
    knn_listing_kernel,
    knn_merge_kernel,
    knn_prepare_kernel,
    knn_score_kernel,
)


def map_of(segment: Segment) -> tuple[int, int, int, int]:
    """A segment as the kernels take it."""
    return segment.first, segment.run, segment.stride, segment.step


def prepare(
    rows: Tensor, segment: Segment, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(M, D) -> of the segment's rows: copy or None, ‖w‖², ‖w − copy‖², e; see the kernel."""
    dim, count = rows.shape[1], segment.count
    pitch = -(-dim // PITCH) * PITCH
    copy = None if dtype is None else torch.empty(count, pitch, dtype=dtype, device=rows.device)
    squares = torch.empty(count, dtype=torch.float64, device=rows.device)
    lost = torch.zeros_like(squares)
    exponent = torch.empty(count, dtype=torch.int32, device=rows.device)
    knn_prepare_kernel[(-(-count // PREPARED),)](
        rows,
        rows if copy is None else copy,
        squares,
        lost,
        exponent,
        count,
        dim,
        *rows.stride(),
        pitch,
        *map_of(segment),
        COPY=copy is not None,
        WIDE=rows.dtype == torch.float64,
        R=PREPARED,
        BLOCK=256,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return copy, squares, lost, exponent


def fits(rows: Tensor) -> bool:
    """Whether the product takes rows of a half type (…, D) as they are."""
    return rows.shape[1] % PITCH == 0 and rows.stride(1) == 1


class Slots(NamedTuple):
    """What the product leaves: per query how many words, and (Q, slots) their buckets and bits."""

    counts: Tensor
    buckets: Tensor
    words: Tensor


def candidates(
    queries: Tensor,
    rows: Tensor,
    segment: Segment,
    terms: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    threshold: Tensor,
    slots: Slots,
    tile: Product,
    grid: Grid,
    *,
    squared: bool,
) -> None:
    """Append the words of a segment's rows.

    Args:
        queries: (Q, pitch), the copy of the queries.
        rows: a copy of rows, or rows themselves, as ``fits`` says.
        segment: which of them.
        terms: of every row of the segment factor, addend and half, float32.
        weight: (Q), of half; taken only if ``squared``.
        threshold: (Q), float32; nothing is appended where it is NaN.
        slots: where to; the counts are increased.
        tile: the product's tile.
        grid: of programs.
        squared: the metric is l2.
    """
    knn_candidates_kernel[(grid.programs,)](
        queries,
        rows,
        *terms,
        weight,
        threshold,
        *slots,
        len(queries),
        segment.count,
        rows.shape[1],
        queries.stride(0),
        rows.stride(0),
        *map_of(segment),
        grid.tiles,
        slots.words.shape[1],
        SQUARED=squared,
        BM=tile.queries,
        BN=tile.rows,
        BK=tile.dim,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )


def listing(
    slots: Slots, segment: Segment, listed: Tensor, length: Tensor, overflow: Tensor
) -> None:
    """Write the rows (Q, capacity) that the words mean; counts become 0, overflow 1 or stays."""
    knn_listing_kernel[(len(listed),)](
        *slots,
        listed,
        length,
        overflow,
        slots.words.shape[1],
        listed.shape[1],
        *map_of(segment),
        S=32,
        num_warps=4,
        enable_fp_fusion=True,
    )


def score(
    queries: Tensor,
    bank: Tensor,
    listed: Tensor,
    length: Tensor,
    scores: Tensor,
    missing: int,
    metric: str,
    programs: int,
) -> None:
    """Scores of the listed rows (Q, capacity); those that are NaN become −inf, of row ``missing`` …

    Args:
        queries: (Q, D), as they are.
        bank: (M, D), as it is.
        listed: (Q, capacity) rows.
        length: (Q), how many of them.
        scores: (Q, capacity), where to.
        missing: greater than any row.
        metric: as in the reference.
        programs: for every query.
    """
    knn_score_kernel[(len(queries), programs)](
        queries,
        bank,
        listed,
        length,
        scores,
        queries.shape[1],
        *queries.stride(),
        *bank.stride(),
        listed.shape[1],
        missing,
        METRIC=metric,
        WIDE=torch.float64 in (queries.dtype, bank.dtype),
        R=SCORED,
        BLOCK=128,
        num_warps=4,
        enable_fp_fusion=True,
    )


def merge(
    best: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    length: Tensor,
    merged: tuple[Tensor, Tensor],
) -> None:
    """Scores and rows (Q, k) of the best so far and (Q, capacity) of new ones -> those of all."""
    knn_merge_kernel[(len(length),)](
        *best,
        *new,
        length,
        *merged,
        best[0].shape[1],
        new[0].shape[1],
        B=MERGED,
        num_warps=4,
        maxnreg=128,  # Triton 3.6 aims at 64 and spills one
        enable_fp_fusion=True,
    )
