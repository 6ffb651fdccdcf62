"""The least that an adapter multiplies."""

from __future__ import annotations


def fewest(tokens: int, in_features: int, out_features: int, rank: int, *, exact: bool) -> int:
    """The multiplications of that form, for one layer that reads x, in float32 or a half type."""
    from fmkernels.ops.vera_linear.formulation import formulation, multiplications

    sizes, parts = (tokens, in_features, out_features, rank), 1 if exact else 2
    taken = formulation(*sizes, builds=True, merge=exact, parts=parts)
    return multiplications(*sizes, parts=parts)[taken]
