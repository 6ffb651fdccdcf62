"""Argument checks of the public functions; messages read ``op: argument: expected … got …``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def floating_tensor(op: str, argument: str, value: Any) -> None:
    """A dense tensor of a real floating dtype with at least one dimension and one column."""
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        shape = value.shape
        if shape and shape[-1] >= 1:
            return
    _refuse_tensor(op, argument, value)


def _refuse_tensor(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument}: expected a torch.Tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"{op}: {argument}: expected a floating-point dtype, got {value.dtype}; "
            f"convert it with {argument}.float()"
        )
    if value.ndim == 0:
        raise ValueError(f"{op}: {argument}: expected at least one dimension (…, n), got a scalar")
    raise ValueError(
        f"{op}: {argument}: expected at least 1 value per row, got shape {shape(value)}"
    )


def dimensions(op: str, argument: str, value: Tensor, layout: str) -> None:
    """As many dimensions as ``layout`` has names, such as ``"(B, N, D)"``."""
    if value.ndim != layout.count(",") + 1:
        raise ValueError(f"{op}: {argument}: expected shape {layout}, got {shape(value)}")


def like(op: str, argument: str, value: Any, other: str, reference: Tensor) -> None:
    """A floating tensor of the shape and on the device of another."""
    if (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.shape == reference.shape
        and value.device == reference.device
    ):
        return
    floating_tensor(op, argument, value)
    same_device(op, argument, value, other, reference)
    raise ValueError(
        f"{op}: {argument}: expected the shape of {other}, {shape(reference)}, got {shape(value)}"
    )


def same_device(op: str, argument: str, value: Tensor, other: str, reference: Tensor) -> None:
    """A tensor on the device of another."""
    if value.device != reference.device:
        raise ValueError(
            f"{op}: {argument}: expected the device of {other}, {reference.device}, "
            f"got {value.device}"
        )


def non_negative(op: str, argument: str, value: Any) -> None:
    """A finite number that is zero or larger."""
    if not isinstance(value, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {argument}: expected a number, got {type(value).__name__}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{op}: {argument}: expected a finite number >= 0, got {value}")


def choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {argument}: expected one of {', '.join(choices)}, got {value!r}")


def shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
