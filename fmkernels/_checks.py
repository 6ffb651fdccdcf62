"""Argument checks of the public functions; messages read ``op: argument: expected … got …``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def remembered(check: Callable[..., Any]) -> Callable[..., Any]:
    """``check``, run once per combination of arguments: settings rarely change between calls."""
    once = functools.lru_cache(maxsize=256)(check)

    def call(*arguments: Any) -> Any:
        try:
            return once(*arguments)
        except TypeError:  # unhashable, so certainly wrong: let the check find the words
            return check(*arguments)

    return call


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


def alike(first: Any, second: Any) -> bool:
    """Whether both are floating tensors of one shape, with a column, on one device."""
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.dtype.is_floating_point
        and second.dtype.is_floating_point
        and first.device == second.device
        and (shape := first.shape) == second.shape
        and len(shape) > 0
        and shape[-1] >= 1
    )


def like(op: str, argument: str, value: Any, other: str, reference: Tensor) -> None:
    """A floating tensor of the shape and on the device of another."""
    floating_tensor(op, argument, value)
    same_device(op, argument, value, other, reference)
    if value.shape != reference.shape:
        raise ValueError(
            f"{op}: {argument}: expected the shape of {other}, {shape(reference)}, "
            f"got {shape(value)}"
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
    if not 0.0 <= value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{op}: {argument}: expected a finite number >= 0, got {value}")


def plain(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers of any kind (NumPy's, a Fraction) as the float that an op's schema takes."""
    return tuple(float(value) if isinstance(value, Real) else value for value in settings)


def choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {argument}: expected one of {', '.join(choices)}, got {value!r}")


def shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
