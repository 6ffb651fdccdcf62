"""Features and labels as the evaluators take them, checked in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmkernels import _checks

from .arrays import tensor_of

CHECKED = 2**16
"""Rows that are looked through at a time, because the table of finite numbers takes memory, too."""


def finite_rows(op: str, argument: str, value: Any) -> Tensor:
    """Features (N, D), a tensor or a NumPy array, floating-point and finite."""
    rows = tensor_of(op, argument, value, "(N, D)")
    finite = torch.cat([block.isfinite().all(dim=1) for block in rows.split(CHECKED)])
    if not finite.all():
        wrong = (~finite).nonzero()
        raise ValueError(
            f"{op}: {argument}: expected finite numbers, got NaN or infinity in {len(wrong)} of "
            f"{len(rows)} rows, the first of them row {int(wrong[0])}"
        )
    return rows


def integers(op: str, argument: str, value: Any, hint: str = "") -> Tensor:
    """A tensor, NumPy array or list of integers, as int64; ``hint`` says what to do otherwise."""
    if isinstance(value, Tensor):
        fits = _is_integer(value)
    else:
        value = np.asarray(value)
        fits = np.issubdtype(value.dtype, np.integer)
    if not fits:
        raise TypeError(f"{op}: {argument}: expected integers, got {value.dtype}{hint}")
    if not isinstance(value, Tensor):
        value = torch.from_numpy(value.astype(np.int64))
    labels: Tensor = value.long()
    return labels


def integer_labels(op: str, argument: str, value: Any, rows: int) -> Tensor:
    """Labels (rows,), int64."""
    labels = integers(op, argument, value)
    if labels.shape != (rows,):
        raise ValueError(
            f"{op}: {argument}: expected shape ({rows},), one for each row of features, "
            f"got {_checks.shape(labels)}"
        )
    return labels


def integer_classes(op: str, argument: str, value: Any, hint: str) -> None:
    """A tensor of integers; ``hint`` says what to do with another."""
    if not isinstance(value, Tensor):
        raise _checks.no_tensor(op, argument, value)
    if not _is_integer(value):
        raise TypeError(f"{op}: {argument}: expected integer classes, got {value.dtype}; {hint}")


def _is_integer(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def sides(op: str, argument: str, value: Any) -> tuple[int, int]:
    """(height, width), of one number for both or of a pair."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{op}: {argument}: expected (H, W) or one number, got {value!r}")
    height, width = (_checks.positive_integer(op, argument, side) for side in pair)
    return height, width
