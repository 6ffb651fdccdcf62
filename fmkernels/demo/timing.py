"""Times in interleaved pairs, on as many threads as the machine has to spare."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

PROCESSOR_TIMES = Path("/proc/stat")
BUSY = 0.5
"""Cores that other programs may use before everything runs on one thread."""


class Times(NamedTuple):
    """Of two calls that took turns."""

    theirs: float
    """Median seconds of a call."""
    ours: float
    speed_ratio: float
    """Median over the pairs: how many times as fast ours is."""
    pairs: int


def interleaved(
    theirs: Callable[[], object],
    ours: Callable[[], object],
    *,
    pairs: int,
    budget_s: float,
    calls: int = 1,
) -> Times:
    """Time two calls in pairs, the first of a pair in turn; the machine's moods then hit both.

    Args:
        theirs: a call.
        ours: a call.
        pairs: how many, at most.
        budget_s: after so long a slow machine stops with three pairs or more.
        calls: of ours in a pair, for one of theirs.
    """
    theirs(), ours()  # touches fresh memory, starts the threads
    spent: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(spent) < pairs and (len(spent) < 3 or time.perf_counter() - start < budget_s):
        if len(spent) % 2:
            second = _seconds(ours, calls)
            spent.append((_seconds(theirs, 1), second))
        else:
            spent.append((_seconds(theirs, 1), _seconds(ours, calls)))
    ratio = statistics.median(a / b for a, b in spent)
    theirs_s, ours_s = (statistics.median(column) for column in zip(*spent, strict=True))
    return Times(theirs_s, ours_s, ratio, len(spent))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def spare_threads() -> Iterator[str]:
    """One thread while others are busy; yields a note that says so, or nothing."""
    busy = busy_cores()
    if busy <= BUSY:
        yield ""
        return
    with threads(1):
        yield f"   Other programs use {busy:.1f} cores, so both ran on one thread"


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
