"""Which way to compute a VeRA layer is the cheapest: pure functions of sizes.

Multiplications of forward and backward beside the base layer's own, with T rows, m inputs, n
outputs and rank r:

    products   T r (2 m / k + 3 n)      U, Y, dU, M, dX; k layers that read x share U and dX
    apart      3 T m n + (1 + p) m n r  Y, dX, S; ΔW, M
    merged       T m n + (1 + p) m n r  S; ΔW, M: Y and dX are the base layer's own products

``products`` is what ``vera_shrink`` and ``vera_expand`` do; it is the only one that scales to
thousands of adapters, keeps no input, and takes dropout.
"""

from __future__ import annotations

from typing import Literal

Formulation = Literal["products", "apart", "merged"]
DENSE: tuple[Formulation, ...] = ("apart", "merged")


def multiplications(
    tokens: int, in_features: int, out_features: int, rank: int, readers: int = 1, parts: int = 1
) -> dict[Formulation, int]:
    """Of forward and backward in every form, beside those of the base layer."""
    weight = tokens * in_features * out_features
    dense = (1 + parts) * in_features * out_features * rank
    return {
        "products": tokens * rank * (2 * in_features // readers + 3 * out_features),
        "apart": 3 * weight + dense,
        "merged": weight + dense,
    }


def formulation(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    dense: bool,
    merge: bool,
    readers: int = 1,
    parts: int = 1,
) -> Formulation:
    """The form with the fewest multiplications.

    Args:
        tokens: T.
        in_features: m.
        out_features: n.
        rank: r.
        dense: whether a form that keeps X and builds ΔW will do: there is one adapter, and nothing
            is dropped.
        merge: whether W0 + ΔW may be rounded to the base's dtype.
        readers: k, how many layers share U.
        parts: p, in how many numbers of the base's dtype every one of S is held for its product
            with Aᵀ: 2 in half types, in which one would round away what M is the difference of.
    """
    best: Formulation = "products"
    if not dense:
        return best
    cost = multiplications(tokens, in_features, out_features, rank, readers, parts)
    for form in DENSE if merge else DENSE[:1]:
        if cost[form] < cost[best]:  # min() cannot be traced
            best = form
    return best
