"""The suites: each has its workloads, providers, limits and words in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fungi.plot
import fungi.report
import knn.plot
import knn.report
import sort.plot
import sort.report
import vera.plot
import vera.report

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"

Content = dict[str, Any]
"""Of a results file: ``machine``, and ``results[workload][measurement]``."""


class Suite(NamedTuple):
    """What becomes of the results ``<name>-<machine>.json``."""

    package: str
    """That a user would otherwise install; its version belongs to the machine."""
    section: Callable[[Content], list[str]]
    """Of one machine, for the README."""
    plot: Callable[[list[Content], Path], None]
    """Of all machines, to ``docs/benchmarks/<name>.png``."""
    details: Callable[[Content], list[str]] | None = None
    """Of one machine, for ``docs/benchmarks/<name>.md``."""


SUITES = {
    "sort": Suite("diffsort", sort.report.section, sort.plot.plot),
    "knn": Suite("faiss-cpu", knn.report.section, knn.plot.plot, knn.report.details),
    "fungi": Suite("torch", fungi.report.section, fungi.plot.plot, fungi.report.details),
    "vera": Suite("peft", vera.report.section, vera.plot.plot, vera.report.details),
}
