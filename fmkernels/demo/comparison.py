"""One training step's sort and loss, with fmkernels and composed from the diffsort package."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fmkernels
from fmkernels.demo.timing import Times, interleaved

ROWS, SIZE, STEEPNESS = 392, 49, 100.0
PAIRS = 9
BUDGET_S = 15.0
"""After this long a slow machine stops with fewer pairs."""


@dataclass(frozen=True)
class Figures:
    """What one package needs for a step."""

    loss: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Both packages on the same scores, in one run."""

    diffsort_version: str
    diffsort: Figures
    fmkernels: Figures
    gradient_difference: float
    """Largest, relative to the largest gradient, in float64."""
    times: Times
    """In float32."""


def scores(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student and teacher similarities, (ROWS, SIZE), spread like cosines of related patches."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 0.15 * torch.randn(2, ROWS, SIZE, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def fmkernels_step(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the fused op."""
    loss = fmkernels.soft_sort_cross_entropy(student, teacher, steepness=STEEPNESS)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def diffsort_step(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same as NeCo's released code composes it."""
    sorter = _diffsort_network()
    _, p = sorter(student)
    with torch.no_grad():
        _, q = sorter(teacher)
    loss = -(q * p.log()).sum(dim=-1).mean()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@functools.cache
def _diffsort_network() -> Any:
    from diffsort import DiffSortNet

    return DiffSortNet("bitonic", SIZE, steepness=STEEPNESS, distribution="cauchy")


STEPS = {"fmkernels": fmkernels_step, "diffsort": diffsort_step}


def compare() -> Comparison:
    """Parity in float64, times in interleaved pairs, memory in fresh processes."""
    exact = {name: step(*scores(torch.float64)) for name, step in STEPS.items()}
    inputs = scores()
    theirs, ours = (functools.partial(step, *inputs) for step in (diffsort_step, fmkernels_step))
    times = interleaved(theirs, ours, pairs=PAIRS, budget_s=BUDGET_S, calls=10)

    def figures(name: str) -> Figures:
        return Figures(exact[name][0].item(), peak_bytes(name))

    gradient, expected = exact["fmkernels"][1], exact["diffsort"][1]
    return Comparison(
        importlib.metadata.version("diffsort"),
        figures("diffsort"),
        figures("fmkernels"),
        (gradient - expected).abs().max().item() / expected.abs().max().item(),
        times,
    )


def peak_bytes(package: str) -> int | None:
    """Rise of a fresh process's peak resident size over one step; None where it cannot be read."""
    script = Path(__file__).with_name("peak_memory.py")
    result = subprocess.run([sys.executable, script, package], capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else None
