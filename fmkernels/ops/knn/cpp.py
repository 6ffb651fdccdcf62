"""Exact nearest neighbours on a CPU: products in low precision, and our selection from them.

``reference.py`` derives why that finds the nearest. The bank is gone through in parts. The rows of
a part are cast, unless they are prepared, and multiplied with a chunk of queries: by the kernel,
which compares in the registers, or by oneDNN, a tile at a time, which is looked at while it is in
the cache. The candidates are scored before the next part, in which their scores are the threshold.
Nothing that grows with the bank is allocated; ``config.py`` has the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels._autocast import product_dtype
from fmkernels._library import native_function
from fmkernels.ops.knn import reference
from fmkernels.ops.knn.config import CpuPlan, cpu_plan, vectors

_norms = native_function("knn_norms", "(Tensor rows) -> Tensor")
_shadow = native_function(
    "knn_shadow", "(Tensor rows, Tensor like) -> (Tensor, Tensor, Tensor, Tensor)"
)
_search_part = native_function(
    "knn_search_part",
    "(Tensor units, Tensor? unit_scales, Tensor queries, Tensor query_norms,"
    " Tensor query_residuals, Tensor shadow, Tensor? shadow_scales, Tensor rows, Tensor row_norms,"
    " Tensor? row_residuals, int first_row, str metric, bool rescored, float factor_rounding,"
    " Tensor? floor, Tensor(a!) scores, Tensor(b!) indices, Tensor(c!) candidates,"
    " Tensor(d!)? crowded, int crowd, int tile_rows, int capacity, int vectors,"
    " Tensor(e!) products) -> ()",
)

MANY = 1 / 4
"""Of the queries of a chunk have too many candidates: a better product is cheaper from then on."""
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
    scales: Tensor | None
    """(M,), float32: what rows in int8 are multiplied by; None for the others."""

    def part(self, part: slice) -> Shadow:
        """Of some of the rows."""
        return Shadow(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]


def shadow_of(rows: Tensor, dtype: torch.dtype, unit: bool = False) -> Shadow:
    """Rows for a product in a dtype; of norm 1 even if they have it, if ``unit`` asks for that."""
    wide = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32).contiguous()
    if rows.dtype == dtype and not unit:
        return Shadow(rows.contiguous(), _norms(wide), None, None)
    shadow, norms, residuals, scales = _shadow(wide, torch.empty(0, dtype=dtype))
    return Shadow(shadow, norms, residuals, scales if dtype == torch.int8 else None)


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
    """The op on CPU tensors; see ``fmkernels.ops.knn`` for the arguments and what is returned."""
    asked, k = k, min(k, max(len(bank), 1))
    made = None if shadow is None else shadow.dtype
    wide = torch.float64 if torch.float64 in (queries.dtype, bank.dtype) else torch.float32
    sizes = (len(queries), queries.shape[1], len(bank), k)
    plan = cpu_plan(*sizes, bank.dtype, made, bank.dtype != wide or not bank.is_contiguous())
    prepared = None
    if shadow is not None and norms is not None:
        prepared = Shadow(shadow, norms, residuals, scales)
    queries = queries.to(wide).contiguous()
    search = _Search(queries, k, metric, precision, floor, plan)
    for block in _slices(len(queries), plan.queries):
        units = _Shadows(queries[block], None)
        for part in _slices(len(bank), plan.rows):
            shadows = _Shadows(bank[part], prepared.part(part) if prepared else None)
            rows = bank[part].to(queries.dtype).contiguous()
            for chunk in _slices(block.stop - block.start, plan.chunk):
                search.part(block.start, chunk, units, rows, part.start, shadows)
    found = search.found
    if asked > k:
        nothing = reference.empty_result(queries, asked - k)
        found = (torch.cat([found[0], nothing[0]], 1), torch.cat([found[1], nothing[1]], 1))
    return *found, search.candidates, search.paths


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


class _Shadows:
    """Of the same rows, in one dtype after the other, made when they are asked for."""

    def __init__(self, rows: Tensor, prepared: Shadow | None) -> None:
        self.rows = rows
        self.made = {} if prepared is None else {prepared.rows.dtype: prepared}

    def of(self, dtype: torch.dtype, unit: bool = False) -> Shadow:
        if dtype not in self.made:
            norms = next((made.norms for made in self.made.values()), None)
            if norms is not None and self.rows.dtype == dtype and not unit:
                self.made[dtype] = Shadow(self.rows.contiguous(), norms, None, None)
            else:
                self.made[dtype] = shadow_of(self.rows, dtype, unit)
        return self.made[dtype]


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
        self.level = 0
        self.found = reference.empty_result(queries, k)
        self.candidates = torch.zeros(len(queries), dtype=torch.int64)
        self.paths = torch.full((len(queries),), reference.PATH_OF[plan.levels[0].shadow])
        self.products: dict[torch.dtype, Tensor] = {}

    def part(
        self,
        block: int,
        chunk: slice,
        units: _Shadows,
        rows: Tensor,
        first_row: int,
        shadows: _Shadows,
    ) -> None:
        """Search a part of the bank for a chunk of a block of queries.

        Those with too many candidates are searched for again, with a better product; where they are
        many, that is what the next ones begin with.
        """
        chosen: slice | Tensor = chunk
        level, total = self.level, chunk.stop - chunk.start
        last = len(self.plan.levels) - 1 if self.rescored else level
        while True:
            crowded = torch.zeros(total, dtype=torch.bool) if level < last else None
            self._run(block, chosen, units, rows, first_row, shadows, level, crowded)
            if crowded is None or not crowded.any():
                return
            if crowded.sum() > total * MANY:
                self.level = max(self.level, level + 1)
            again = crowded.nonzero().flatten()
            chosen = again + chunk.start if isinstance(chosen, slice) else chosen[again]
            self.paths[chosen + block] = reference.FELL_BACK
            level, total = level + 1, len(again)

    def _run(
        self,
        block: int,
        chosen: slice | Tensor,
        units: _Shadows,
        rows: Tensor,
        first_row: int,
        shadows: _Shadows,
        level: int,
        crowded: Tensor | None,
    ) -> None:
        dtype, product, registers = self.plan.levels[level]
        if product not in self.products:
            result = torch.int32 if product == torch.int8 else product
            self.products[product] = torch.empty(self.plan.chunk * self.plan.tile, dtype=result)
        unit, shadow = units.of(product, unit=True), shadows.of(dtype)
        rounded = torch.float32 == product != product_dtype(self.products[product])
        if isinstance(chosen, slice):
            unit = unit.part(chosen)
            among_all: slice | Tensor = slice(block + chosen.start, block + chosen.stop)
        else:
            unit = Shadow(*(None if x is None else x[chosen] for x in unit))  # type: ignore[arg-type]
            among_all = block + chosen
            registers = vectors(self.plan.levels[level], len(chosen))
        state = (*self.found, self.candidates)
        found = [x[among_all] for x in state]
        _search_part(
            unit.rows,
            unit.scales,
            self.queries[among_all],
            unit.norms,
            unit.residuals,
            shadow.rows,
            shadow.scales,
            rows,
            shadow.norms,
            shadow.residuals,
            first_row,
            self.metric,
            self.rescored,
            ROUNDED_FACTOR if rounded else 0.0,
            None if self.floor is None else self.floor[among_all].contiguous(),
            *found,
            crowded,
            len(rows) // self.plan.crowd + 4 * self.found[0].shape[1] + 256,
            self.plan.tile,
            self.plan.capacity,
            registers,
            self.products[product],
        )
        if isinstance(chosen, Tensor):  # which took copies
            for whole, part in zip(state, found, strict=True):
                whole[among_all] = part
