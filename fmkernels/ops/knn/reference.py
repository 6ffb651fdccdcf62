"""Exact nearest neighbours in PyTorch: what is right, and why a cheap product is enough to find it.

**What is right.** The score of bank row b for query q is, computed in float64,

    cosine          q·b / (‖q‖ ‖b‖), and 0 where a norm is 0
    inner_product   q·b
    l2              −‖q − b‖²             (the sign is turned back in the public function)

and the answer is the k largest, larger first, equal ones by the lower index, a NaN never. This file
computes all of them, tile by tile. The kernels compute only a few, for which they need a bound.

**The bound.** Let a = ‖q‖, u = q/a, and û, b̂ what u and b become in the low precision (bfloat16 or
float32; or int8, as whole multiples of a 127th of the row's largest entry). A matrix product
returns s ≈ û·b̂. The distance between u·b and s is at most the sum of

1. ``‖u − û‖ ‖b‖ + ‖û‖ ‖b − b̂‖``: rounding of the factors, by Cauchy-Schwarz from the very rows'
   residual norms, which are measured, in float64, and not from the worst case. What a conversion
   flushes to zero, or takes to infinity, is part of the residual.
2. ``D 2⁻²² ‖û‖ ‖b̂‖``: accumulation in float32, whose error in any order is at most
   D 2⁻²⁴ Σ|û_d b̂_d|, to first order. The factor 4 covers the rest, and hardware that truncates
   instead of rounding, or rounds twice per step.
3. ``2⁻⁸ |s|``: a bfloat16 product returns bfloat16. Nothing for one that returns float32, or int32.
4. ``D 2⁻¹²⁵ (1 + ‖b‖)``: factors and products below the normal numbers may be flushed to zero. A
   product that vanishes is below 2⁻¹²⁶, a factor that vanishes takes 2⁻¹²⁶ times the other.
5. ``2⁻²⁰ ‖b‖``: the comparison itself is done in float32, in ten roundings or less.

What orders like the score is v = σ u·b, with σ = 1/‖b‖ for the cosine and else 1, so v is within
e = σ times that sum of σ s. Rows that have to be cast are scaled to norm 1 first: then b stands for
b/‖b‖ in the sum, and σ for σ ‖b‖.

For ``l2``, with half squared norms h = ‖b‖²/2, the row that is nearest maximises a u·b − h, since
−‖q − b‖²/2 = a u·b − h − a²/2. Both parts are divided by S max(a, S), S the largest ‖b‖ of the
tile, so that nothing overflows; point 5 counts 2⁻²¹ h in, 2⁻¹²⁰ covers what vanishes, and
``(D + 8) 2⁻⁵⁰ (a² + S²)/2``, divided likewise, covers what the score itself loses in float64: where
a is far above S it cannot tell rows apart that v can.

Where a float32 product is told to round its factors (``torch.set_float32_matmul_precision``), each
loses 2⁻⁹ of its norm with bfloat16, and less with TF32: ``3 · 2⁻⁸ ‖û‖ ‖b̂‖`` more, generously.

**Selection.** A row can be among the k nearest only if its upper end v + e reaches a lower bound t
of the k-th largest v. Any k rows give one: the smallest of their lower ends v − e, or, once k rows
have been scored in float64, the k-th best of those. So a tile is compared with t; the rows that
reach it, the candidates, are scored in float64 from the inputs themselves and merged. A row whose e
is infinite or undefined (it has an infinite entry, or a norm outside of 2⁻¹⁰⁰ … 2¹²⁰) is always a
candidate. Hence the answer does not depend on the low precision, on tiles, threads or on the order
of the products: those decide only how many rows are scored twice.

Where a product leaves a query too many candidates, the same comparison is made with a better one:
int8, bfloat16, float32. What that leaves, such as equal rows, is scored in float64, as all
candidates are.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("cosine", "inner_product", "l2")
TILE = 1024
"""Rows and queries whose scores are in memory at a time."""
LAST = torch.iinfo(torch.int64).max

REFERENCE, INT8, BFLOAT16, FLOAT32, FELL_BACK = range(5)
"""What a query's candidates were found with: nothing, a product, or one and then a better one."""
PATH_OF = {torch.int8: INT8, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}


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
    """All scores in float64; see ``fmkernels.ops.knn`` for the arguments and what is returned."""
    found_scores, found_indices = empty_result(queries, k)
    for first in range(0, len(queries), TILE):
        block = slice(first, first + TILE)
        scores, indices = found_scores[block], found_indices[block]
        for start in range(0, len(bank), TILE):
            new = exact_scores(queries[block], bank[start : start + TILE], metric, k)
            if floor is not None:
                new = new.masked_fill(~(new >= floor[block, None]), torch.nan)
            number = torch.arange(start, start + new.shape[1], device=bank.device)
            number = number.expand_as(new).masked_fill(new.isnan(), -1)
            scores, indices = merge(
                torch.cat([scores, new], dim=1), torch.cat([indices, number], dim=1), k
            )
        found_scores[block], found_indices[block] = scores, indices
    candidates = torch.full(queries.shape[:1], len(bank), device=queries.device)
    return found_scores, found_indices, candidates, torch.full_like(candidates, REFERENCE)


def empty_result(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices of nothing found yet: −inf and −1."""
    shape, device = (len(queries), k), queries.device
    scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    return scores, torch.full(shape, -1, dtype=torch.int64, device=device)


def exact_scores(queries: Tensor, rows: Tensor, metric: str, k: int = LAST) -> Tensor:
    """(Q, D), (M, D) -> (Q, M) in float64, larger is nearer; NaN for some not of the k best."""
    queries, rows = queries.double(), rows.double()
    if metric == "l2":
        # by differences: the products' form loses small distances to cancellation
        return -torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    if metric == "cosine":
        queries, rows = unit(queries), unit(rows)
    products = queries @ rows.mT
    # a product's last bits depend on where a row stands: equal rows would not tie
    error = queries.shape[1] * 2.0**-50 * queries.norm(dim=1, keepdim=True) * rows.norm(dim=1)
    least = products - error
    least = least.masked_fill(least.isnan(), -torch.inf)
    kth = least.topk(min(k, len(rows))).values[:, -1:]
    pairs = (~(products + error < kth)).nonzero()
    products.fill_(torch.nan)
    for q, r in (part.unbind(1) for part in pairs.split(TILE * 64 // queries.shape[1] + 1)):
        products[q, r] = (queries[q] * rows[r]).sum(dim=1)
    return products


def unit(rows: Tensor) -> Tensor:
    """Rows of norm 1; a row of zeros stays one. Scaled first: squares would leave the range."""
    largest = rows.abs().amax(dim=-1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)
    return rows / torch.where(largest > 0, rows.norm(dim=-1, keepdim=True), 1)


def merge(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of (Q, n) scores and their indices: larger first, then the lower index.

    An index of −1 is no row; where fewer than k are left, −inf and −1 follow. So results of parts
    of a bank, side by side, become those of the whole.
    """
    scores = scores.masked_fill(indices < 0, -torch.inf)
    by_index = indices.masked_fill(indices < 0, LAST).argsort(dim=-1, stable=True)
    scores, indices = scores.gather(-1, by_index), indices.gather(-1, by_index)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return scores.gather(-1, order), indices.gather(-1, order)
