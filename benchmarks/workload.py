"""What every problem that is measured has: inputs that rotate, its least work, a check."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INPUT_SETS = 4
"""Calls take their inputs from these in turn: a user's are new at every step, too."""

Device = torch.device | str


class Workload(abc.ABC):
    """A problem that providers, which have names, solve."""

    @abc.abstractmethod
    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Any]:
        """What is timed: it returns the result. The first call takes the first inputs."""

    @abc.abstractmethod
    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        """Fail unless our result is right, beside the peer's and beside float64.

        Returns:
            What is worth recording of the two results.
        """

    @abc.abstractmethod
    def operations(self) -> int:
        """Multiplications and additions that a step cannot do without."""

    @abc.abstractmethod
    def bytes_moved(self) -> int:
        """What a step must read and write at least."""

    @abc.abstractmethod
    def tiny(self) -> Workload:
        """The same on next to nothing, to import and initialise everything."""


def in_turn(function: Callable[..., Any], inputs: list[Any]) -> Callable[..., Any]:
    """A step that gives a function the next of its inputs at every call, and the call's options."""
    turns = itertools.cycle(inputs)
    return lambda **options: function(next(turns), **options)


def on_device(tensors: Any, device: Device) -> Any:
    """A tensor, a tuple of them or None, there; leaves again."""
    if isinstance(tensors, tuple):
        return tuple(on_device(tensor, device) for tensor in tensors)
    if tensors is None:
        return None
    return tensors.detach().to(device).requires_grad_(tensors.requires_grad)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
