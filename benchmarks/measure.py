"""How things are measured: interleaved pairs, warm-up, intervals, peak memory, bytes kept.

The machines at hand are noisy (identical code against itself: 0.78 to 1.29), so only ratios within
one run are reported: the median over interleaved pairs, with its bootstrap 95 % interval.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

THREADS = 2

PAIRS = ((0.1, 31), (3.0, 9), (float("inf"), 5))
"""Up to so many seconds a call, so many pairs."""


def digits(value: float) -> float:
    """Four significant ones."""
    return float(f"{value:.4g}")


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def warm_up(function: Callable[[], object], limit_s: float = 10.0) -> float:
    """Call until fresh memory is no longer touched: a first touch costs more than the work.

    At least four calls, because inputs rotate, or two of half a second; peers that hand their
    memory back touch it for ever.

    Returns:
        The seconds of the last call.
    """
    start = time.perf_counter()
    for call in itertools.count(1):
        before = minor_faults()
        duration = seconds(function)
        settled = minor_faults() - before < 16
        late = time.perf_counter() - start > limit_s
        enough = call >= (2 if duration > 0.5 else 4)
        if (settled and enough) or (late and call >= 2):
            return duration


def minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def bootstrap(samples: list[float], repeats: int = 2000) -> tuple[float, float]:
    """95 % interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(samples, (repeats, len(samples))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def ratio(*, pairs: int | None = None, **functions: Callable[[], object]) -> dict[str, Any]:
    """The time of the first function over that of the second, from pairs A B B A ….

    Returns:
        ``of``: what was divided by what; the ``median`` over the ``pairs`` and its bootstrap 95 %
        interval from ``low`` to ``high``; ``ms``: the median time of each; ``others``, see
        ``watch_others``.
    """
    times, watched = interleaved(functions, pairs)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    return {"of": " / ".join(functions)} | interval(ratios) | medians(times) | watched


def addition(*, pairs: int | None = None, **functions: Callable[[], object]) -> dict[str, Any]:
    """What the second function takes beyond the first, in % of the first, from pairs A B B A ….

    The median of the paired differences; the rest as ``ratio`` returns it.
    """
    times, watched = interleaved(functions, pairs)
    base, whole = times.values()
    percent = 100 / statistics.median(base)
    added = [percent * (b - a) for a, b in zip(base, whole, strict=True)]
    first, second = functions
    return {"of": f"({second} - {first}) / {first}"} | interval(added) | medians(times) | watched


def beyond(*, pairs: int | None = None, **functions: Callable[[], object]) -> dict[str, Any]:
    """How much longer the second function takes beyond the first than the third does.

    The ratio of the medians of the differences from rounds A B C C B A …, and its bootstrap 95 %
    interval; the rest as ``ratio`` returns it, with the differences as ``beyond_ms``.
    """
    times, watched = interleaved(functions, pairs)
    base, *others = (np.array(each) for each in times.values())
    first, *names = functions
    added = [each - base for each in others]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(base), size=(2000, len(base)))
    ratios = np.median(added[0][drawn], axis=1) / np.median(added[1][drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    medians_s = [float(np.median(each)) for each in added]
    figures = {"median": medians_s[0] / medians_s[1], "low": float(low), "high": float(high)}
    return {
        "of": f"({names[0]} - {first}) / ({names[1]} - {first})",
        **{name: digits(figure) for name, figure in figures.items()},
        "pairs": len(base),
        "beyond_ms": dict(zip(names, (digits(1e3 * each) for each in medians_s), strict=True)),
        **medians(times),
        **watched,
    }


def interleaved(
    functions: dict[str, Callable[[], object]], pairs: int | None
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of two or more functions, warm, called in turn; and what others took meanwhile.

    A fast function is called for about 20 ms a sample.
    """
    durations = {name: warm_up(function) for name, function in functions.items()}
    if pairs is None:
        pairs = next(count for limit, count in PAIRS if max(durations.values()) <= limit)
    calls = {
        name: max(1, min(2000, round(20e-3 / max(duration, 1e-7))))
        for name, duration in durations.items()
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    with watch_others() as watched:
        for pair in range(pairs):
            for name in list(functions)[:: 1 if pair % 2 == 0 else -1]:
                times[name].append(seconds(functions[name], calls[name]))
    return times, watched


def interval(samples: list[float]) -> dict[str, float]:
    """The median, its bootstrap 95 % interval, and of how many pairs."""
    low, high = bootstrap(samples)
    figures = {"median": statistics.median(samples), "low": low, "high": high}
    return {name: digits(figure) for name, figure in figures.items()} | {"pairs": len(samples)}


def medians(times: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds."""
    return {"ms": {name: digits(1e3 * statistics.median(each)) for name, each in times.items()}}


@contextlib.contextmanager
def watch_others() -> Iterator[dict[str, float]]:
    """``others``: the share of the processors that others, the host's too, took inside the block.

    Two threads of which one has to share its core wait for each other at every small op: a peer of
    thousands of them was seen 20 × slower so, and ours 2 ×.
    """
    watched: dict[str, float] = {}
    start, before = time.perf_counter(), others_s()
    yield watched
    share = (others_s() - before) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    watched["others"] = round(max(0.0, share), 2)


def others_s() -> float:
    """Processor seconds since the machine's start that were not this process's."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields)
    ticks = user + nice + system + sum(interrupts_and_stolen)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def bytes_kept(forward: Callable[[], object], *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, the inputs themselves excluded."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    for tensor in inputs:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


def peak_extra_bytes(workload: str, provider: str) -> int:
    """Rise of the peak resident size over one step, scratch included, in a process of its own.

    There every tensor has a mapping that goes when it is freed: with the holes of a heap PEFT's
    step of ``vera-model-llama-float32`` was seen at 1.0 and at 1.6 GB, of which 0.9 are tensors.
    """
    command = [sys.executable, str(Path(__file__).parent / "peak.py"), workload, provider]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    found = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def quartiles(stats: Any) -> dict[str, float]:
    """Milliseconds, of pytest-benchmark's statistics."""
    names = {"median_ms": stats.median, "q1_ms": stats.q1, "q3_ms": stats.q3}
    return {name: digits(1e3 * figure) for name, figure in names.items()}
