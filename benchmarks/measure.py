"""How things are measured: interleaved pairs, warm-up, intervals, peak memory, bytes kept.

The machines at hand are noisy (identical code against itself: 0.78 to 1.29), so only ratios within
one run are reported: the median over interleaved pairs, with its bootstrap 95 % interval.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

PAIRS = 31
SLOW_PAIRS = 9
"""Pairs where one call takes more than 100 ms."""


@dataclass(frozen=True)
class Ratio:
    """peer time / our time: the median over pairs and its bootstrap 95 % interval."""

    ratio: float
    low: float
    high: float
    pairs: int
    ours_ms: float
    peer_ms: float

    def as_dict(self) -> dict[str, float]:
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def warm_up(function: Callable[[], object], calls: int = 20, limit_s: float = 4.0) -> None:
    """Call until fresh memory is no longer touched: a first touch costs more than the work."""
    start = time.perf_counter()
    for _ in range(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        function()
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16:
            return
        if time.perf_counter() - start > limit_s:
            return


def bootstrap(samples: list[float], repeats: int = 2000) -> tuple[float, float]:
    """95 % interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(samples, (repeats, len(samples))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def compare(
    ours: Callable[[], object], peer: Callable[[], object], pairs: int | None = None
) -> Ratio:
    """Time both in pairs A B B A …; a fast call is repeated for about 20 ms."""
    warm_up(ours)
    warm_up(peer)
    durations = seconds(ours, 3), seconds(peer)
    if pairs is None:
        pairs = PAIRS if durations[1] < 0.1 else SLOW_PAIRS
    calls = [max(1, min(2000, round(20e-3 / max(d, 1e-7)))) for d in durations]
    ours_s, peer_s = [], []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        for which in order:
            (ours_s, peer_s)[which].append(seconds((ours, peer)[which], calls[which]))
    ratios = [b / a for a, b in zip(ours_s, peer_s, strict=True)]
    low, high = bootstrap(ratios)
    return Ratio(
        statistics.median(ratios),
        low,
        high,
        pairs,
        statistics.median(ours_s) * 1e3,
        statistics.median(peer_s) * 1e3,
    )


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


def peak_extra_bytes(module: str, workload: str, provider: str) -> int:
    """Rise of the peak resident size over one step, in a process of its own, scratch included."""
    output = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "peak.py"), module, workload, provider],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(output.split()[-1])


def roofline() -> dict[str, float]:
    """The best of this machine, measured in this run: float32 mm and a copy, with 2 threads."""
    a, b = torch.randn(2, 2048, 2048).unbind()
    source, target = torch.randn(2, 2**26).unbind()
    warm_up(lambda: a @ b)
    warm_up(lambda: target.copy_(source))
    matmul = min(seconds(lambda: a @ b) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return {
        "float32_gflops": round(2 * 2048**3 / matmul / 1e9),
        "copy_gb_per_s": round(2 * source.numel() * 4 / copy / 1e9, 1),
    }
