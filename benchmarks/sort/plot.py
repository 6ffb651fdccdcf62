"""How many times faster than diffsort, and time against rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots

from sort.workloads import WORKLOADS


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plots.panels(2, height=3.2)
    plots.bars(left, contents, plots.measured(contents, list(WORKLOADS), "diffsort"), "diffsort")
    left.set_xlabel("times faster than diffsort")
    for index, content in enumerate(contents):
        curve = content["results"].get("neco-step", {}).get("rows")
        if curve:
            per_row = {int(rows): each for rows, each in curve["microseconds_per_row"].items()}
            milliseconds = [rows * each / 1e3 for rows, each in per_row.items()]
            right.plot(list(per_row), milliseconds, "o-", **plots.style_of(index, content))
    right.set(xscale="log", yscale="log", xlabel="rows of 49", ylabel="ms, loss forward + backward")
    right.legend(fontsize=7)
    plots.save(figure, path)
