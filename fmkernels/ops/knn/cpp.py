"""Exact nearest neighbours on a CPU: oneDNN's products, tile by tile, and our selection from them.

``reference.py`` derives why that finds the nearest. The bank is gone through in parts. The rows of a
part are cast, unless they are prepared, and multiplied with a chunk of queries a tile at a time,
which is looked at while it is in the cache; the candidates are scored before the next part, in
which their scores are the threshold. Nothing that grows with the bank is allocated; ``config.py``
has the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels._autocast import product_dtype
from fmkernels._library import native_function
from fmkernels.ops.knn import reference
from fmkernels.ops.knn.config import CpuPlan, cpu_plan

_norms = native_function("knn_norms", "(Tensor rows) -> Tensor")
_shadow = native_function(
    "knn_shadow", "(Tensor rows, bool half) -> (Tensor, Tensor, Tensor)"
)
_search_part = native_function(
    "knn_search_part",
    "(Tensor units, Tensor queries, Tensor query_norms, Tensor query_residuals, Tensor shadow,"
    " Tensor rows, Tensor row_norms, Tensor? row_residuals, int first_row, str metric,"
    " bool rescored, float factor_rounding, Tensor? floor, Tensor(a!) scores, Tensor(b!) indices,"
    " Tensor(c!) candidates, Tensor(d!)? crowded, int tile_rows, int capacity,"
    " Tensor(e!) products) -> ()",
)

ROUNDED_FACTOR = 2.0**-8
"""Of float32 factors that a product may take as bfloat16; each loses half of that at most."""


class Shadow(NamedTuple):
    """Rows in a product's dtype: scaled to norm 1, or, where they have the dtype, as they are."""

    rows: Tensor
    """(M, D)"""
    norms: Tensor
    """(M,), float64, of the rows that it is a shadow of."""
    residuals: Tensor | None
    """(M,), float32: what the rows of norm 1 lack, as a norm; None for rows as they are."""

    def part(self, part: slice) -> Shadow:
        """Of some of the rows."""
        residuals = None if self.residuals is None else self.residuals[part]
        return Shadow(self.rows[part], self.norms[part], residuals)


def shadow_of(rows: Tensor, dtype: torch.dtype, unit: bool = False) -> Shadow:
    """Rows for a product in a dtype; at norm 1 even if they have it, where ``unit`` asks for that."""
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32).contiguous()
    if rows.dtype == dtype and not unit:
        return Shadow(rows.contiguous(), _norms(wide), None)
    return Shadow(*_shadow(wide, dtype == torch.bfloat16))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op on CPU tensors; see ``fmkernels.ops.knn`` for the arguments and what is returned."""
    made = None if shadow is None else shadow.dtype
    plan = cpu_plan(len(queries), queries.shape[1], k, bank.dtype, made)
    prepared = None
    if shadow is not None and norms is not None and shadow.dtype == plan.dtype:
        prepared = Shadow(shadow, norms, residuals)
    wide = torch.float64 in (queries.dtype, bank.dtype)
    queries = queries.to(torch.float64 if wide else torch.float32).contiguous()
    search = _Search(queries, k, metric, precision, floor, plan)
    for block in _slices(len(queries), plan.queries):
        units = shadow_of(queries[block], plan.product, unit=True)
        for part in _slices(len(bank), plan.rows):
            rows = bank[part]
            parts_shadow = prepared.part(part) if prepared else shadow_of(rows, plan.dtype)
            rows = rows.to(queries.dtype).contiguous()
            for chunk in _slices(len(units.rows), plan.chunk):
                chosen = slice(block.start + chunk.start, block.start + chunk.stop)
                search.part(chosen, units.part(chunk), rows, part.start, parts_shadow)
    return *search.found, search.candidates, search.paths


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


class _Search:
    """All queries, and what they have found so far."""

    def __init__(
        self,
        queries: Tensor,
        k: int,
        metric: str,
        precision: str,
        floor: Tensor | None,
        plan: CpuPlan,
    ) -> None:
        self.queries, self.metric, self.floor, self.plan = queries, metric, floor, plan
        self.rescored = precision == "exact"
        self.found = reference.empty_result(queries, k)
        self.candidates = torch.zeros(len(queries), dtype=torch.int64)
        path = reference.BFLOAT16 if plan.dtype == torch.bfloat16 else reference.FLOAT32
        self.paths = torch.full((len(queries),), path)
        self.products = torch.empty(plan.chunk * plan.tile, dtype=plan.product)

    def part(
        self, chosen: slice, units: Shadow, rows: Tensor, first_row: int, shadow: Shadow
    ) -> None:
        """Search a part of the bank for some of the queries."""
        if not (self.rescored and self.plan.dtype == torch.bfloat16):
            return self._run(chosen, units, rows, first_row, shadow, None)
        crowded = torch.zeros(len(units.rows), dtype=torch.bool)
        self._run(chosen, units, rows, first_row, shadow, crowded)
        if crowded.any():
            self._again(chosen.start + crowded.nonzero().flatten(), rows, first_row)
        return None

    def _again(self, chosen: Tensor, rows: Tensor, first_row: int) -> None:
        """The queries that have too many candidates, by a product in float32."""
        self.paths[chosen] = reference.FELL_BACK
        units = shadow_of(self.queries[chosen], torch.float32, unit=True)
        self._run(chosen, units, rows, first_row, shadow_of(rows, torch.float32), None)

    def _run(
        self,
        chosen: slice | Tensor,
        units: Shadow,
        rows: Tensor,
        first_row: int,
        shadow: Shadow,
        crowded: Tensor | None,
    ) -> None:
        products = self.products
        if products.dtype != units.rows.dtype:
            products = torch.empty(len(units.rows) * self.plan.tile, dtype=units.rows.dtype)
        rounded = products.dtype == torch.float32 and product_dtype(products) != products.dtype
        state = (*self.found, self.candidates)
        found = [x[chosen] for x in state]
        _search_part(
            units.rows,
            self.queries[chosen],
            units.norms,
            units.residuals,
            shadow.rows,
            rows,
            shadow.norms,
            shadow.residuals,
            first_row,
            self.metric,
            self.rescored,
            ROUNDED_FACTOR if rounded else 0.0,
            None if self.floor is None else self.floor[chosen].contiguous(),
            *found,
            crowded,
            self.plan.tile,
            self.plan.capacity,
            products,
        )
        if isinstance(chosen, Tensor):  # which took copies
            for whole, part in zip(state, found, strict=True):
                whole[chosen] = part
