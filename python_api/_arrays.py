"""Features and labels as the evaluators take them: tensors or NumPy arrays, checked in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmkernels import _checks

CHECKED = 2**16
"""Rows that are looked through at a time, because the table of finite numbers takes memory, too."""


def as_tensor(op: str, argument: str, value: Any) -> Any:
    """A NumPy array as a tensor, sharing its memory where it may be written; others as they are."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    except TypeError as error:
        raise TypeError(f"{op}: {argument}: expected numbers, got {value.dtype}") from error


def finite_rows(op: str, argument: str, value: Any) -> Tensor:
    """Features (N, D), floating-point and finite, without their graph."""
    value = as_tensor(op, argument, value)
    _checks.floating_tensor(op, argument, value)
    _checks.dimensions(op, argument, value, "(N, D)")
    rows: Tensor = value.detach()
    finite = torch.cat([block.isfinite().all(dim=1) for block in rows.split(CHECKED)])
    if not finite.all():
        wrong = (~finite).nonzero()
        raise ValueError(
            f"{op}: {argument}: expected finite numbers, got NaN or infinity in {len(wrong)} of "
            f"{len(rows)} rows, the first of them row {int(wrong[0])}"
        )
    return rows


def integer_labels(op: str, argument: str, value: Any, rows: int) -> Tensor:
    """Labels (rows,) as int64, from a tensor, an array or a list of integers."""
    if not isinstance(value, Tensor):
        value = as_tensor(op, argument, np.asarray(value))
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {argument}: expected integers, got {value.dtype}")
    if value.shape != (rows,):
        raise ValueError(
            f"{op}: {argument}: expected shape ({rows},), one for each row of features, "
            f"got {_checks.shape(value)}"
        )
    labels: Tensor = value.long()
    return labels
