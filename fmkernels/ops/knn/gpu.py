"""knn on NVIDIA GPUs: in which order the kernels of ``triton.py`` run.

For a block of queries, the head is scored in float64 (``gpu_config.py`` says which rows that is).
Then, for every segment of the other rows: each query's threshold, from its k-th best score; the
product, which lists the rows that may reach it (``gpu_bound.py``); their scores in float64; the k
best of all. A query with more candidates than its buffer holds is searched again with a float32
product, and one that still has (there are many equal rows, say) by scoring all rows: no answer
rests on a part of the candidates.

**Memory** beside the result, for a block of queries: the candidates, 24 bytes each, for every query
8k to 16k of them but at least 512, 2²⁹ bytes at most; the k best three times, 16 bytes each; the
queries in low precision. For a segment of rows: its copy, 2²⁸ bytes at most, and about 100 bytes a
row for what is known of them. None of it grows with M. The host waits for the device once for each
block of queries, to learn whether a buffer was too small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels._tuned import capability
from fmkernels.ops.knn import gpu_launch
from fmkernels.ops.knn.gpu_bound import Bound, Operand, scale_exponent
from fmkernels.ops.knn.gpu_config import (
    ALL_ROWS,
    Plan,
    Segment,
    head,
    low_dtype,
    product,
    product_grid,
    score_programs,
    search_plan,
    segments,
)
from fmkernels.ops.knn.reference import BFLOAT16, FELL_BACK, REFERENCE, empty_result, unit

PREPARED_AT_A_TIME = 2**16
"""Rows whose float64 copy is in memory."""


class Prepared(NamedTuple):
    """What ``bank.py`` made ready."""

    shadow: Tensor
    norms: Tensor
    residuals: Tensor | None


def knn(
    queries: Tensor,
    bank: Tensor,
    k: int,
    metric: str = "cosine",
    precision: str = "exact",
    floor: Tensor | None = None,
    shadow: Tensor | None = None,
    norms: Tensor | None = None,
    residuals: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search; see ``fmkernels.ops.knn`` for the arguments and what is returned.

    With ``precision="fast"`` the product's error counts as nothing when candidates are chosen.
    Their scores are those of float64 all the same.
    """
    scores, indices = empty_result(queries, k)
    candidates = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    paths = torch.full_like(candidates, REFERENCE)
    prepared = usable(shadow, norms, residuals)
    low = low_dtype(bank.dtype) if prepared is None else prepared.shadow.dtype
    plan = search_plan(len(queries), bank.shape[1], k, low)
    if head(len(bank), plan.capacity).count < len(bank):
        paths.fill_(BFLOAT16)
    for start in range(0, len(queries) if len(bank) else 0, plan.queries):
        left = torch.arange(start, min(start + plan.queries, len(queries)), device=queries.device)
        for attempt in (low, torch.float32, None):
            search = Search(queries[left], bank, k, metric, plan)
            if attempt is None:
                search.all_rows()
            else:
                known = prepared if attempt == low else None
                least = None if floor is None else floor[left]
                search.by_product(attempt, known, least, exact=precision == "exact")
            scores[left] = search.scores
            indices[left] = search.rows.masked_fill(search.rows >= len(bank), -1)
            candidates[left] += search.candidates
            left = left[search.overflow != 0]
            if len(left) == 0:
                break
            paths[left] = FELL_BACK
    return scores, indices, candidates, paths


def usable(
    shadow: Tensor | None, norms: Tensor | None, residuals: Tensor | None
) -> Prepared | None:
    """What was made ready, if the product can take it."""
    if shadow is None or norms is None:
        return None
    half = shadow.dtype in (torch.float16, torch.bfloat16)
    return Prepared(shadow, norms, residuals) if half and gpu_launch.fits(shadow) else None


def shadow_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shadow, norms and residuals of a bank, for ``bank.prepare``: made once for all searches."""
    low, count = low_dtype(rows.dtype), len(rows)
    norms = torch.empty(count, dtype=torch.float64, device=rows.device)
    as_they_are = rows.dtype == low
    shadow = rows if as_they_are else torch.empty(rows.shape, dtype=low, device=rows.device)
    residuals = torch.zeros(count, dtype=torch.float32, device=rows.device)
    for start in range(0, count, PREPARED_AT_A_TIME):
        part = slice(start, start + PREPARED_AT_A_TIME)
        wide = rows[part].double()
        norms[part] = wide.norm(dim=1)
        if not as_they_are:
            units = unit(wide)
            shadow[part] = units
            lost = (units - shadow[part].double()).norm(dim=1)
            residuals[part] = lost * (1 + 2.0**-20)  # rounded up
    return shadow, norms, None if as_they_are else residuals


class Search:
    """A block of queries, and what is known of it so far."""

    def __init__(self, queries: Tensor, bank: Tensor, k: int, metric: str, plan: Plan) -> None:
        """Nothing is known: k rows that are not there, with numbers from M on."""
        if metric == "cosine" and queries.dtype == torch.float64:
            queries = in_range(queries)
        self.queries, self.bank, self.metric, self.plan = queries, bank, metric, plan
        count, device = len(queries), queries.device
        self.scores, self.rows = empty_result(queries, k)
        self.rows += torch.arange(len(bank) + 1, len(bank) + 1 + k, device=device)
        self.candidates = torch.zeros(count, dtype=torch.int64, device=device)
        self.overflow = torch.zeros(count, dtype=torch.int32, device=device)
        self.length = torch.zeros(count, dtype=torch.int32, device=device)
        self.multiprocessors = 1
        if queries.is_cuda:
            properties = torch.cuda.get_device_properties(queries.device)
            self.multiprocessors = properties.multi_processor_count

    def by_product(
        self, low: torch.dtype, prepared: Prepared | None, floor: Tensor | None, *, exact: bool
    ) -> None:
        """Score the head, and of the other rows those that a product in this dtype leaves."""
        first = head(len(self.bank), self.plan.capacity)
        listed = self._buffer(self.plan.capacity)
        self._score_all(first, listed)
        if first.count == len(self.bank):
            return
        bound = self._bound(low, first, exact=exact)
        tile = product(len(self.queries), low, capability(self.queries.device))
        slots = gpu_launch.Slots(
            torch.zeros_like(self.length),
            torch.empty(listed.shape, dtype=torch.int32, device=listed.device),
            torch.empty(listed.shape, dtype=torch.int32, device=listed.device),
        )
        for segment in segments(len(self.bank), self.plan):
            rows = operand(self.bank, segment, low, prepared)
            best = self.scores[:, -1]
            threshold = bound.thresholds(best if floor is None else best.maximum(floor))
            threshold.masked_fill_(self.overflow != 0, torch.nan)
            gpu_launch.candidates(
                bound.queries.low,
                rows.low,
                rows.segment,
                bound.row_terms(rows),
                bound.weight(),
                threshold,
                slots,
                tile,
                product_grid(len(self.queries), segment.count, self.multiprocessors, tile),
                squared=self.metric == "l2",
            )
            gpu_launch.listing(slots, segment, listed, self.length, self.overflow)
            self._score_listed(listed)

    def all_rows(self) -> None:
        """Score all rows."""
        listed = self._buffer(min(ALL_ROWS, len(self.bank)))
        for start in range(0, len(self.bank), ALL_ROWS):
            count = min(ALL_ROWS, len(self.bank) - start)
            self._score_all(Segment(start, 1, 1, 0, count), listed)
        self.overflow.zero_()

    def _buffer(self, capacity: int) -> Tensor:
        shape = (len(self.queries), capacity)
        return torch.empty(shape, dtype=torch.int64, device=self.queries.device)

    def _bound(self, low: torch.dtype, first: Segment, *, exact: bool) -> Bound:
        whole = Segment(0, 1, 1, 0, len(self.queries))
        queries = scaled(self.queries, whole, low)
        _, squares, _, exponent = gpu_launch.prepare(self.bank, first, None)
        scale = scale_exponent(squares.sqrt() * torch.exp2(exponent.double()))
        return Bound(queries, scale, self.metric, self.bank.shape[1], exact)

    def _score_all(self, segment: Segment, listed: Tensor) -> None:
        listed[:, : segment.count] = rows_of(segment, listed.device)
        self.length.fill_(segment.count)
        self._score_listed(listed)

    def _score_listed(self, listed: Tensor) -> None:
        """Score what is listed, and keep the k best."""
        new = torch.empty(listed.shape, dtype=torch.float64, device=listed.device)
        missing = len(self.bank) + self.rows.shape[1] + 1
        programs = score_programs(len(listed), listed.shape[1], self.multiprocessors)
        gpu_launch.score(
            self.queries, self.bank, listed, self.length, new, missing, self.metric, programs
        )
        merged = torch.empty_like(self.scores), torch.empty_like(self.rows)
        gpu_launch.merge((self.scores, self.rows), (new, listed), self.length, merged)
        self.scores, self.rows = merged
        self.candidates += self.length


def in_range(queries: Tensor) -> Tensor:
    """The queries times powers of two, which a cosine does not see: so squares are finite."""
    exponent = queries.abs().amax(dim=1, keepdim=True).frexp().exponent
    return torch.ldexp(queries, -exponent.clamp(-1000, 1000))


def rows_of(segment: Segment, device: torch.device) -> Tensor:
    """The numbers of a segment's rows."""
    i = torch.arange(segment.count, device=device)
    run = segment.run
    return (
        segment.first + i.div(run, rounding_mode="floor") * segment.stride + i % run * segment.step
    )


def operand(bank: Tensor, segment: Segment, low: torch.dtype, prepared: Prepared | None) -> Operand:
    """A segment of the bank for the product: as it is, as it was prepared, or a copy of it."""
    if prepared is not None:
        rows = rows_of(segment, bank.device)
        norms = prepared.norms[rows]
        if prepared.residuals is None:
            lost = torch.zeros_like(norms)
            return Operand(prepared.shadow, segment, norms, lost, lost)
        residuals, ones = prepared.residuals[rows].double(), (norms != 0).double()
        return Operand(prepared.shadow, segment, ones, residuals, norms.log2())
    if bank.dtype == low and gpu_launch.fits(bank):
        _, squares, lost, exponent = gpu_launch.prepare(bank, segment, None)
        norms = squares.sqrt() * torch.exp2(exponent.double())
        return Operand(bank, segment, norms, lost, torch.zeros_like(norms))
    return scaled(bank, segment, low)


def scaled(rows: Tensor, segment: Segment, low: torch.dtype) -> Operand:
    """A copy in low precision, scaled by powers of two."""
    copy, squares, lost, exponent = gpu_launch.prepare(rows, segment, low)
    assert copy is not None
    contiguous = Segment(0, 1, 1, 0, segment.count)
    return Operand(copy, contiguous, squares.sqrt(), lost.sqrt(), exponent.double())
