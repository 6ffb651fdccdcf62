"""The losses of VeRA beside those of PEFT's VeRA: the same model, seeds, batches and optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.demo.finetuning import Problem, fine_tune

PAIR = ("VeRA", "VeRA by PEFT")
STEPS = 20
RESEEDED = 5
"""Runs of PEFT with other seeds, which draw the new layer and the order of the batches."""


class Difference(NamedTuple):
    """Of the first losses, from PEFT's."""

    float64: float
    """The largest."""
    float32: float
    """The largest, in standard deviations of the reseeded runs at the same step."""


def difference(problem: Problem, rate: float, steps: int = STEPS) -> Difference:
    """How far the losses are from PEFT's of the same seed, and what chance makes of them."""
    exact = _gap(*(losses(problem, name, rate, 0, steps, torch.float64) for name in PAIR))
    ours, theirs = (losses(problem, name, rate, 0, steps) for name in PAIR)
    others = [losses(problem, PAIR[1], rate, seed + 1, steps) for seed in range(RESEEDED)]
    chance = torch.stack([theirs, *others]).std(dim=0)
    return Difference(exact.max().item(), (_gap(ours, theirs) / chance).max().item())


def losses(
    problem: Problem,
    method: str,
    rate: float,
    seed: int,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(steps), in float64."""
    found = fine_tune(problem, method, rate, seed, steps=steps, dtype=dtype).losses
    return torch.tensor(found, dtype=torch.float64)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs()


def sentence(found: Difference) -> str:
    """What the difference says."""
    return (
        f"The first {STEPS} losses differ from those of PEFT's VeRA by at most {found.float64:.0e} "
        f"in float64, and in float32 by {found.float32:.0e} of the deviation of {RESEEDED + 1} "
        "seeds of PEFT's"
    )
