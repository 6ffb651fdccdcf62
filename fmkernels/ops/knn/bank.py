"""What a bank of rows is made ready with, once, for searches that come later."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fmkernels.ops.knn.config import lowest_dtype


class PreparedRows(NamedTuple):
    """Rows and what a search would otherwise make of them each time; the last three may be absent.

    They are the last arguments of the op ``fmkernels.ops.knn.search``, whose result does not depend
    on them.
    """

    rows: Tensor
    """(M, D)"""
    shadow: Tensor | None = None
    """(M, D), the rows in the dtype of the low-precision product, scaled to norm 1."""
    norms: Tensor | None = None
    """(M,), float64"""
    residuals: Tensor | None = None
    """(M,), float32: the norm of what the shadow lacks; None if it is the rows as they are."""
    scales: Tensor | None = None
    """(M,), float32: what a shadow in int8 is multiplied by."""


def prepare(rows: Tensor) -> PreparedRows:
    """Make rows ready for this machine's searches: a copy in low precision where that helps."""
    from fmkernels.ops.knn import cpp, search

    if rows.device.type == "cuda" and search.why_not("triton") is None:
        from fmkernels.ops.knn import gpu

        return PreparedRows(rows, *gpu.shadow_of(rows))
    if rows.device.type != "cpu" or search.why_not("cpp") is not None:
        return PreparedRows(rows)
    return PreparedRows(rows, *cpp.shadow_of(rows, lowest_dtype(rows.shape[1])))
