"""Which way to compute a VeRA layer is the cheapest: pure functions of sizes.

Multiplications of forward and backward beside the base layer's own, with T rows, m inputs, n
outputs and rank r, where k layers that read the same x share U (and in ``products`` dX):

    products   T r (2 m / k + 3 n)                U, Y, dU, M, dX
    folded     T r (m / k + 2 n)  +  m n r        U, Y, M; W0 + ΔW in backward, for dX
    refolded   T r (m / k + n)    +  2 m n r      U, M; W0 + ΔW in forward and in backward
    apart      2 T m n  +  (1 + p) m n r          Y, S; ΔW, M
    merged     T m n    +  (1 + p) m n r          S; ΔW, M

``products`` is what ``vera_shrink`` and ``vera_expand`` do; it is the only one that takes dropout
and scales to thousands of adapters. It and the folded forms keep no input.
"""

from __future__ import annotations

from typing import Literal

Formulation = Literal["products", "folded", "refolded", "apart", "merged"]
BUILDING: tuple[Formulation, ...] = ("folded", "refolded", "apart", "merged")
"""ΔW is made, and dX is G (W0 + ΔW)."""
MERGING: tuple[Formulation, ...] = ("refolded", "merged")
"""So is Y: X (W0 + ΔW)ᵀ."""
DENSE: tuple[Formulation, ...] = ("apart", "merged")
"""X and a matrix (n, m) are kept for backward, and no U is made."""


def multiplications(
    tokens: int, in_features: int, out_features: int, rank: int, readers: int = 1, parts: int = 1
) -> dict[Formulation, int]:
    """Of forward and backward in every form, beside those of the base layer."""
    update = in_features * out_features * rank
    dense = (1 + parts) * update
    weight = tokens * in_features * out_features
    read, written = tokens * rank * in_features // readers, tokens * rank * out_features
    return {
        "products": 2 * read + 3 * written,
        "folded": read + 2 * written + update,
        "refolded": read + written + 2 * update,
        "apart": 2 * weight + dense,
        "merged": weight + dense,
    }


def formulation(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    builds: bool,
    merge: bool,
    keeps_x: bool = True,
    readers: int = 1,
    parts: int = 1,
) -> Formulation:
    """The form with the fewest multiplications.

    Args:
        tokens: T.
        in_features: m.
        out_features: n.
        rank: r.
        builds: whether a form that builds ΔW will do: there is one adapter, nothing is dropped, and
            the layer itself is not trained.
        merge: whether Y may be that of W0 + ΔW rounded to the base's dtype.
        keeps_x: whether a form that keeps X, and makes no U, will do.
        readers: k, how many layers share U.
        parts: p, in how many numbers of the base's dtype every one of S is held for its product
            with Aᵀ: 2 in half types, in which one would round away what M is the difference of.
    """
    best: Formulation = "products"
    if not builds:
        return best
    cost = multiplications(tokens, in_features, out_features, rank, readers, parts)
    for form in BUILDING:
        allowed = (merge or form not in MERGING) and (keeps_x or form not in DENSE)
        if allowed and cost[form] < cost[best]:  # min() cannot be traced
            best = form
    return best
