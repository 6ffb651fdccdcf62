"""Time, memory and the best of the device, all measured in this process."""

from __future__ import annotations

from collections.abc import Callable

import measure
import torch

from gpu.target import DEVICE, DRY_RUN, synchronize

QUARTILES = ("q1", "median", "q3")

SLOW_MS = 500
"""What takes longer is timed once."""

SAMPLE_MS = 300
"""A function is timed for about so long."""


def milliseconds(function: Callable[[], object]) -> dict[str, float]:
    """Median and quartiles of one call between device events, with a level-2 cache made cold."""
    if DRY_RUN:
        return dict.fromkeys(QUARTILES, measure.digits(measure.seconds(function) * 1e3))
    from triton.testing import do_bench

    function()
    synchronize()
    once_ms = 1e3 * measure.seconds(lambda: (function(), synchronize()))
    if once_ms > SLOW_MS:
        return dict.fromkeys(QUARTILES, measure.digits(once_ms))
    times = do_bench(function, warmup=50, rep=SAMPLE_MS, quantiles=[0.25, 0.5, 0.75])
    return dict(zip(QUARTILES, map(measure.digits, times), strict=True))


def peak_bytes(function: Callable[[], object]) -> int:
    """Most memory that one call has beside what was there before."""
    if DRY_RUN:
        return 0
    function()
    synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    function()
    synchronize()
    return torch.cuda.max_memory_allocated(DEVICE) - before


def roofline() -> dict[str, float]:
    """A large copy, and large products in float32 (TF32 off) and bfloat16, of random numbers."""
    side, elements = (64, 2**16) if DRY_RUN else (8192, 2**29)
    found = {"bytes_per_s": copy_rate(elements)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(2, side, side, device=DEVICE, dtype=dtype).unbind()
        out = torch.empty_like(a)
        rate = 2 * side**3 / seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        found[f"{name}_operations_per_s"] = rate
    return {name: measure.digits(rate) for name, rate in found.items()}


def copy_rate(elements: int) -> float:
    """Bytes read and written in a second."""
    source = torch.randn(elements, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def seconds(function: Callable[[], object]) -> float:
    return milliseconds(function)["median"] / 1e3
