"""Which form of vera_expand is the cheaper: a pure function of sizes."""

from __future__ import annotations


def by_matrix(tokens: int, out_features: int, rank: int) -> bool:
    """Whether B is scaled once, and not the rows of U and Z."""
    return tokens * (out_features + rank) > out_features * rank
