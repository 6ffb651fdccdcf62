"""Argument checks of the public functions; messages read ``op: argument: expected … got …``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

LARGEST = torch.finfo(torch.float32).max

_PASSED: dict[tuple[Any, ...], Any] = {}


def once(check: Callable[..., Any], settings: tuple[Any, ...], a: Any, *others: Any) -> Any:
    """``check(a, *others, *settings)``, remembered for the same shapes, dtypes and devices.

    A training loop calls with the same ones again and again, and to look at them takes longer than
    to sort a short row.
    """
    try:
        key: tuple[Any, ...] = (check, settings, a.shape, a.dtype, a.device)
        for b in others:
            key += (b.shape, b.dtype, b.device)
        if (passed := _PASSED.get(key)) is not None:
            return passed
    except (AttributeError, TypeError):  # no tensor, or unhashable: the check has the words
        return check(a, *others, *settings)
    if len(_PASSED) >= 1024:
        _PASSED.clear()
    _PASSED[key] = passed = check(a, *others, *settings)
    return passed


def at_call(check: Callable[..., Any], settings: tuple[Any, ...], a: Any, *others: Any) -> Any:
    """``once``, but what is being compiled is looked at: a key would make each size a graph."""
    if is_compiling():
        return check(a, *others, *settings)
    return once(check, settings, a, *others)


def floating_tensor(op: str, argument: str, value: Any) -> None:
    """A dense tensor of a real floating dtype with at least one dimension and one column."""
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        shape = value.shape
        if shape and shape[-1] >= 1 and value.layout is torch.strided:
            return
    _refuse_tensor(op, argument, value)


def _refuse_tensor(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise no_tensor(op, argument, value)
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"{op}: {argument}: expected a floating-point dtype, got {value.dtype}; "
            f"convert it with {argument}.float()"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{op}: {argument}: expected a dense tensor, got {value.layout}; "
            f"convert it with {argument}.to_dense()"
        )
    if value.ndim == 0:
        raise ValueError(f"{op}: {argument}: expected at least one dimension (…, n), got a scalar")
    raise ValueError(
        f"{op}: {argument}: expected a last dimension of at least 1, got shape {shape(value)}"
    )


def no_tensor(op: str, argument: str, value: Any) -> TypeError:
    """The error for what is no tensor, with the way from a NumPy array to one."""
    is_array = isinstance(value, np.ndarray)
    hint = f"; convert it with torch.from_numpy({argument})" if is_array else ""
    return TypeError(f"{op}: {argument}: expected a torch.Tensor, got {type(value).__name__}{hint}")


def device(op: str, argument: str, value: Any) -> torch.device:
    """A device that tensors can be put on."""
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch has no one error for it
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'{op}: {argument}: expected a device that PyTorch has here, such as "cpu", '
            f"got {value!r}: {reason}"
        ) from error


def dimensions(op: str, argument: str, value: Tensor, layout: str) -> None:
    """As many dimensions as ``layout`` has names, such as ``"(B, N, D)"``."""
    if value.ndim != layout.count(",") + 1:
        raise ValueError(f"{op}: {argument}: expected shape {layout}, got {shape(value)}")


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
    """A number that is zero or larger and finite in float32."""
    if not isinstance(value, (float, int, Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {argument}: expected a number, got {type(value).__name__}")
    if not 0.0 <= value <= LARGEST:  # type: ignore[operator]
        raise ValueError(f"{op}: {argument}: expected a finite number >= 0, got {value}")


def positive_integer(op: str, argument: str, value: SupportsIndex, otherwise: str = "") -> int:
    """An integer of any kind (NumPy's, too), as Python's; ``otherwise`` says what else fits."""
    try:
        checked = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        checked = 0
    if checked < 1:
        raise ValueError(f"{op}: {argument}: expected an integer >= 1{otherwise}, got {value!r}")
    return checked


def integer_below(op: str, argument: str, value: SupportsIndex, power: int) -> int:
    """An integer of any kind from 0 to 2**power − 1, as Python's."""
    try:
        checked = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        checked = -1
    if not 0 <= checked < 2**power:
        raise ValueError(
            f"{op}: {argument}: expected an integer from 0 to 2**{power} - 1, got {value!r}"
        )
    return checked


def plain(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers of any kind (NumPy's, a Fraction) as the float that an op's schema takes."""
    return tuple(float(value) if isinstance(value, Real) else value for value in settings)


def choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {argument}: expected one of {', '.join(choices)}, got {value!r}")


def shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
