"""One training step's sort and loss, with fmkernels and composed from the diffsort package."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fmkernels

ROWS, SIZE, STEEPNESS = 392, 49, 100.0
PAIRS = 9
BUDGET_S = 15.0
"""After this long a slow machine stops with fewer pairs."""

PROCESSOR_TIMES = Path("/proc/stat")


@dataclass(frozen=True)
class Figures:
    """What one package needs for a step."""

    loss: float
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Both packages on the same scores, in one run."""

    diffsort_version: str
    diffsort: Figures
    fmkernels: Figures
    gradient_difference: float
    """Largest, relative to the largest gradient, in float64."""
    speed_ratio: float
    pairs: int


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
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    inputs = scores()
    for step in STEPS.values():
        step(*inputs)  # touches fresh memory, starts the threads
    start = time.perf_counter()
    for pair in range(PAIRS):
        if pair > 2 and time.perf_counter() - start > BUDGET_S:
            break
        for name in sorted(STEPS, reverse=pair % 2 == 1):
            calls = 10 if name == "fmkernels" else 1
            times[name].append(_seconds(STEPS[name], inputs, calls))

    def figures(name: str) -> Figures:
        return Figures(exact[name][0].item(), statistics.median(times[name]), peak_bytes(name))

    ours, theirs = exact["fmkernels"][1], exact["diffsort"][1]
    ratios = [b / a for a, b in zip(times["fmkernels"], times["diffsort"], strict=True)]
    return Comparison(
        importlib.metadata.version("diffsort"),
        figures("diffsort"),
        figures("fmkernels"),
        (ours - theirs).abs().max().item() / theirs.abs().max().item(),
        statistics.median(ratios),
        len(ratios),
    )


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that other programs use just now; 0 where the system does not say (Linux does)."""
    if not PROCESSOR_TIMES.exists():
        return 0.0

    def used_s() -> float:
        fields = map(int, PROCESSOR_TIMES.read_text().split(maxsplit=9)[1:9])
        user, nice, system, _idle, _waiting, *interrupts_and_stolen = fields
        ticks = user + nice + system + sum(interrupts_and_stolen)
        return ticks / os.sysconf("SC_CLK_TCK")

    before = used_s()
    time.sleep(seconds)
    return (used_s() - before) / seconds


def _seconds(step: Callable[..., object], inputs: tuple[Tensor, Tensor], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step(*inputs)
    return (time.perf_counter() - start) / calls


def peak_bytes(package: str) -> int | None:
    """Rise of a fresh process's peak resident size over one step; None where it cannot be read."""
    script = Path(__file__).with_name("peak_memory.py")
    result = subprocess.run([sys.executable, script, package], capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else None
