"""What this machine can do, measured in the same run, and how much of it a step reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import digits, seconds, warm_up
from workload import Workload


def roofline() -> dict[str, float]:
    """The best of this machine, measured in this run, with 2 threads.

    Returns:
        ``operations_per_s`` of a float32 product, the same of a bfloat16 and an int8 one, and
        ``bytes_per_s`` of a copy.
    """
    a, b = torch.randn(2, 2048, 2048).unbind()
    source, target = torch.randn(2, 2**26).unbind()
    halves = a.bfloat16(), b.bfloat16()
    codes = [(30 * x).clamp(-127, 127).to(torch.int8) for x in (a, b)]
    return {
        "operations_per_s": 2 * 2048**3 / best(lambda: a @ b),
        "bfloat16_operations_per_s": 2 * 2048**3 / best(lambda: halves[0] @ halves[1]),
        "int8_operations_per_s": 2 * 2048**3 / best(lambda: torch._int_mm(*codes)),
        "bytes_per_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)),
    }


def best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of five calls."""
    warm_up(function)
    return min(seconds(function) for _ in range(5))


RATES = {
    "float32": "operations_per_s",
    "bfloat16": "bfloat16_operations_per_s",
    "int8": "int8_operations_per_s",
}
"""Of a product, by its dtype."""


def shares(workload: Workload, taken_s: float, product: str = "float32") -> dict[str, float]:
    """Of the roofline that a step in ``taken_s`` reaches. It is measured now, and returned, too."""
    roof = roofline()
    reached = {
        "share_of_matmul_rate": workload.operations() / taken_s / roof[RATES[product]],
        "share_of_copy_rate": workload.bytes_moved() / taken_s / roof["bytes_per_s"],
    }
    return {name: digits(figure) for name, figure in (reached | roof).items()}
