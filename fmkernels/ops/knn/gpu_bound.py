"""The bound of ``reference.py`` in the units in which the GPU kernels compare.

Query and row are scaled by powers of two, which is exact: q = 2^e u, b = 2^e' w, norms in [1, 2),
and û, ŵ are what u and w become in low precision. (Rows that are float16 or bfloat16 are taken as
they are, without a copy: e' = 0, w = ŵ = b. Of a prepared bank, 2^e' is ‖b‖.) What is compared is

    cosine          v = ‖u‖ score                = g u·w            g = 1/‖w‖
    inner_product   v = 2^(−e−F) score           = g u·w            g = 2^(e'−F)
    l2              v = 2^(−e−F) (score + a²)/2  = g u·w − z h      g as before, h = (g‖w‖)²/2,
                                                                    z = 2^(F−e), a = ‖q‖

with F the exponent of the largest norm in the head, so that nothing leaves the range of float32 but
rows that are far larger. Points 1, 2 and 4 make |g û·ŵ − g u·w| at most

    g ((r + c α + f) ‖w‖ + α (1 + c) ‖w − ŵ‖ + f),   c = D 2⁻²²,   f = D 2⁻¹²⁴

where r is the largest ‖u − û‖ of the block's queries and α = 2 + 2⁻⁶ ≥ ‖û‖. A query with
‖u − û‖ > 2⁻⁶ (it has an infinity, say), or whose z would leave the range, takes no part in r: every
row is its candidate.

Point 2 holds for tensor cores. They multiply exactly, align a block of 4 to 16 products and the sum
so far to the largest of them, and cut off at 24 bits or more (Fasi, Higham, Mikaitis, Pranesh,
*Numerical behavior of NVIDIA tensor cores*, PeerJ Computer Science, 2021). So a block loses at most
2⁻²³ Σ|û_d ŵ_d| for each of its terms, for the sum so far and for normalising: D + 2⌈D/4⌉ ≤ 2D times
in all (for D = 1 there is nothing to lose), which is c. Subnormal factors are not flushed there.
Point 3 does not arise: sums stay in float32. Point 5 is counted as 2⁻²⁰ of every term, and the
threshold is lowered by 2⁻²² and by what float64 may have lost in the k-th best score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops.knn.gpu_config import Segment

ALPHA = 2 + 2.0**-6
REGULAR = 2.0**-6
"""What the copy of a scaled query lacks, at most."""

EXPONENTS = 100
"""By which a query's may differ from F, for l2."""

LARGEST = float(torch.finfo(torch.float32).max)


class Operand(NamedTuple):
    """Rows of one side of the product, x = 2^e w; e need not be whole."""

    low: Tensor
    """(…, D or more), ŵ; the last dimension contiguous."""
    segment: Segment
    """Which rows of ``low``."""
    norm: Tensor
    """(n,), ‖w‖, float64, as what follows"""
    lost: Tensor
    """(n,), ‖w − ŵ‖"""
    exponent: Tensor
    """(n,), e"""


def scale_exponent(norms: Tensor) -> Tensor:
    """F, of the norms (n,) of some rows of the bank: a scalar tensor, not read by the host."""
    usable = torch.where(norms.isfinite() & (norms > 0), norms, 0).amax()
    return torch.where(usable > 0, usable, 1).log2().floor()


@dataclass(frozen=True)
class Bound:
    """For a block of queries: what the product compares, in float32."""

    queries: Operand
    scale: Tensor
    """F"""
    metric: str
    dim: int
    exact: bool = True
    """Otherwise the product's error counts as nothing."""

    def row_terms(self, rows: Operand) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row g, the most that the product's error can add to v, and h."""
        c, f = self.dim * 2.0**-22, self.dim * 2.0**-124
        if self.metric == "cosine":
            factor = torch.where(rows.norm == 0, 0, 1 / rows.norm)
        else:
            factor = torch.exp2(rows.exponent - self.scale)
        length, lost = factor * rows.norm, factor * rows.lost
        error = (self._error() + c * ALPHA + f) * length + ALPHA * (1 + c) * lost + f * factor
        error = error + 2.0**-20 * (error + ALPHA * (length + lost))
        addend = error * (1 + 2.0**-22) + 2.0**-124
        half = length.square() / 2 * (1 - 2.0**-20) - 2.0**-126
        factor, half, rounded = factor.float(), half.float(), addend.float()
        certain = factor.isfinite() & half.isfinite() & rounded.isfinite() & (rows.norm < 2.0**120)
        if not self.exact:
            rounded = torch.zeros_like(rounded)
        return factor, torch.where(certain, rounded, torch.inf), half

    def weight(self) -> Tensor:
        """(Q), z."""
        return torch.exp2(self.scale - self._exponent()).float()

    def thresholds(self, kth: Tensor) -> Tensor:
        """(Q) scores -> v, or less; −inf where it is not known, NaN where no score is a number."""
        norm, exponent = self.queries.norm, self._exponent()
        regular = self._regular()
        if self.metric == "cosine":
            v = kth * norm
            size = v.abs()
            hopeless = ~norm.isfinite()
        else:
            unit = torch.exp2(-exponent - self.scale)
            v, size = kth * unit, kth.abs() * unit
            hopeless = norm.isnan()
        if self.metric == "l2":
            squared = (norm * torch.exp2(exponent)).square()
            v, size = (kth + squared) * unit / 2, (kth.abs() + squared) * unit / 2
            regular = regular & ((exponent - self.scale).abs() <= EXPONENTS)
        lower = v - v.abs() * 2.0**-22 - size * (self.dim + 8) * 2.0**-50 - 2.0**-124
        known = regular & (lower.abs() < LARGEST / 2)
        return torch.where(known, lower, -torch.inf).masked_fill(hopeless, torch.nan).float()

    def _regular(self) -> Tensor:
        return self.queries.lost <= REGULAR

    def _error(self) -> Tensor:
        """r"""
        return torch.where(self._regular(), self.queries.lost, 0).amax()

    def _exponent(self) -> Tensor:
        """e; that of a row of zeros may be any."""
        return torch.where(self.queries.norm == 0, self.scale, self.queries.exponent)
