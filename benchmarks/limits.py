"""How something is asked of a figure, and whether a machine's results keep to it."""

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
