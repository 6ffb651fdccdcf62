"""What is asked of the figures, and whether a machine's results keep to it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

Results = dict[str, dict[str, dict[str, Any]]]

HOLDS = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


BUSY = 0.1
"""The share of the machine that others may take before a ratio says nothing."""


def busy(measurement: dict[str, Any]) -> bool:
    return measurement.get("others", 0) > BUSY


class Limit(NamedTuple):
    """A ``figure`` of the results and what is ``asked`` of it, such as ``"≥ 200 ×"``."""

    what: str
    asked: str
    figure: Callable[[Results], dict[str, float]]

    @property
    def unit(self) -> str:
        return self.asked.split()[2]

    def measured(self, results: Results) -> dict[str, float] | None:
        """The figure's ``median``, ``low`` and ``high``; None if they were not measured."""
        try:
            return self.figure(results)
        except KeyError:
            return None

    def verdict(self, figure: dict[str, float]) -> str:
        """Met if the median keeps to what is asked, missed if no part of the interval does."""
        if busy(figure):
            return "undecided"
        sign, bound, _ = self.asked.split()
        kept = {key: HOLDS[sign](figure[key], float(bound)) for key in ("low", "median", "high")}
        if kept["median"]:
            return "met"
        return "undecided" if any(kept.values()) else "missed"


def exactly(value: float) -> dict[str, float]:
    """The figure of what has no interval."""
    return dict.fromkeys(("median", "low", "high"), value)


def ratio(workload: str, measurement: str) -> Callable[[Results], dict[str, float]]:
    return lambda results: results[workload][measurement]


def peak_share(results: Results) -> dict[str, float]:
    peak = results["neco-step"]["memory"]["peak_bytes"]
    return exactly(100 * peak["fmkernels"] / peak["diffsort"])


def peak_megabytes(results: Results) -> dict[str, float]:
    return exactly(results["neco-196"]["memory"]["peak_bytes"]["fmkernels"] / 1e6)


def worst_log_error(results: Results) -> dict[str, float]:
    return exactly(max(errors["fmkernels"]["mean"] for errors in results["accuracy"].values()))


def host_time(what: str, prefix: str, direction: str, asked: str) -> Limit:
    name = f"host time of a 2 × 8 {what} beside `F.softmax`, {direction}"
    return Limit(name, asked, ratio("host-time", prefix + direction))


LIMITS = (
    Limit(
        "`neco-step` beside diffsort, AVX-512", "≥ 200 ×", ratio("neco-step", "diffsort, avx512")
    ),
    Limit("`soft-sort-matrix` beside diffsort", "≥ 100 ×", ratio("soft-sort-matrix", "diffsort")),
    host_time("loss", "", "forward", "≤ 3 ×"),
    host_time("loss", "", "forward + backward", "≤ 1.2 ×"),
    host_time("`soft_sort`", "soft_sort, ", "forward", "≤ 3 ×"),
    host_time("`soft_sort`", "soft_sort, ", "forward + backward", "≤ 1.2 ×"),
    Limit("`neco-step`, peak extra memory beside diffsort's", "< 2 %", peak_share),
    Limit("`neco-196`, peak extra memory", "< 100 MB", peak_megabytes),
    Limit(
        "mean error of log P in float32, the worst distribution", "≤ 0.001 nats", worst_log_error
    ),
)
