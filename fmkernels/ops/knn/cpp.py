"""Exact nearest neighbours on a CPU: oneDNN's products, tile by tile, and our selection from them.

``reference.py`` derives why that finds the nearest. A tile is cast, multiplied with all queries of
a block, and looked at while it is in the cache; nothing that grows with the bank is allocated. In
memory at a time, beside the results, are at most

    QUERY_BLOCK × D × 2 to 4 bytes of queries,
    PRODUCTS bytes of products and TILE_BYTES of rows in low precision, if those are not at hand.
"""

from __future__ import annotations

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
_select = native_function(
    "knn_select",
    "(Tensor products, Tensor? order, Tensor queries, Tensor query_norms, Tensor query_residuals,"
    " Tensor rows, Tensor row_norms, Tensor? row_residuals, int first_row, str metric,"
    " bool rescored, float factor_rounding, Tensor? floor,"
    " Tensor(a!) scores, Tensor(b!) indices, Tensor(c!) candidates, Tensor(d!)? crowded,"
    " int crowd) -> ()",
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

    def tile(self, tile: slice) -> Shadow:
        """Of some of the rows."""
        residuals = None if self.residuals is None else self.residuals[tile]
        return Shadow(self.rows[tile], self.norms[tile], residuals)


def shadow_of(rows: Tensor, dtype: torch.dtype) -> Shadow:
    """Rows for a product in a dtype."""
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32).contiguous()
    if rows.dtype == dtype:
        return Shadow(rows.contiguous(), _norms(wide), None)
    return Shadow(*_shadow(wide, dtype == torch.bfloat16))


class _Queries:
    """A block of queries: as they are, and of norm 1 in a product's dtype."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.rows = rows
        self.units, self.norms, self.residuals = _shadow(rows, dtype == torch.bfloat16)


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
    scores, indices = reference.empty_result(queries, k)
    candidates = torch.zeros(len(queries), dtype=torch.int64)
    paths = torch.zeros(len(queries), dtype=torch.int64)
    plan = cpu_plan(len(queries), queries.shape[1], len(bank), k)
    prepared = None
    if shadow is not None and norms is not None and shadow.dtype == plan.dtype:
        prepared = Shadow(shadow, norms, residuals)
    for start in range(0, len(queries), plan.queries):
        block = slice(start, start + plan.queries)
        found = (scores[block], indices[block], candidates[block])
        limit = None if floor is None else floor[block].contiguous()
        search = _Search(queries[block], bank.dtype, metric, precision, limit, found, plan)
        for first in range(0, len(bank), plan.rows):
            tile = slice(first, first + plan.rows)
            search.tile(bank[tile], first, prepared and prepared.tile(tile))
        paths[block] = search.paths
    return scores, indices, candidates, paths


class _Search:
    """What a block of queries has found so far."""

    def __init__(
        self,
        queries: Tensor,
        bank_dtype: torch.dtype,
        metric: str,
        precision: str,
        floor: Tensor | None,
        found: tuple[Tensor, Tensor, Tensor],
        plan: CpuPlan,
    ) -> None:
        wide = torch.float64 in (queries.dtype, bank_dtype)
        dtype = torch.float64 if wide else torch.float32
        queries = queries.to(dtype).contiguous()
        self.dtype, self.metric, self.plan, self.floor, self.found = (
            dtype,
            metric,
            plan,
            floor,
            found,
        )
        self.rescored = precision == "exact"
        self.queries = _Queries(queries, plan.dtype)
        self.paths = torch.full(
            (len(queries),),
            reference.BFLOAT16 if plan.dtype == torch.bfloat16 else reference.FLOAT32,
        )
        self.products = torch.empty(plan.chunk * plan.rows, dtype=plan.dtype)

    def tile(self, rows: Tensor, first: int, shadow: Shadow | None) -> None:
        """Look at one more tile of the bank."""
        if shadow is None:
            shadow = shadow_of(rows, self.plan.dtype)
        rows = rows.to(self.dtype).contiguous()
        total = len(self.queries.rows)
        crowded = torch.zeros(total, dtype=torch.bool) if self._may_fall_back() else None
        for start in range(0, total, self.plan.chunk):
            units = self.queries.units[start : start + self.plan.chunk]
            products = self.products[: len(units) * len(rows)].view(len(units), len(rows))
            torch.mm(units, shadow.rows.mT, out=products)
            order = None if len(units) == total else torch.arange(start, start + len(units))
            self._select(products, order, self.queries, rows, shadow, first, crowded)
        if crowded is not None and crowded.any():
            self._again(crowded.nonzero().flatten(), rows, first)

    def _may_fall_back(self) -> bool:
        return self.rescored and self.plan.dtype == torch.bfloat16

    def _again(self, order: Tensor, rows: Tensor, first: int) -> None:
        """The queries with too many candidates, by a product in float32."""
        self.paths[order] = reference.FELL_BACK
        shadow = shadow_of(rows, torch.float32)
        for part in order.split(self.plan.chunk // 2 or 1):
            queries = _Queries(self.queries.rows[part], torch.float32)
            products = torch.mm(queries.units, shadow.rows.mT)
            self._select(products, part, queries, rows, shadow, first, None)

    def _select(
        self,
        products: Tensor,
        order: Tensor | None,
        queries: _Queries,
        rows: Tensor,
        shadow: Shadow,
        first: int,
        crowded: Tensor | None,
    ) -> None:
        rounded = products.dtype == torch.float32 and product_dtype(products) != products.dtype
        _select(
            products,
            order,
            self.queries.rows,
            self.queries.norms,
            queries.residuals,
            rows,
            shadow.norms,
            shadow.residuals,
            first,
            self.metric,
            self.rescored,
            ROUNDED_FACTOR if rounded else 0.0,
            self.floor,
            *self.found,
            crowded,
            self.plan.crowd,
        )
