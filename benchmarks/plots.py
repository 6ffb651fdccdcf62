"""docs/benchmarks/sort.png: how many times faster than diffsort, and time against rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#3b6ea5", "#c8703a", "#4f8f5b", "#8a5a9e")
"""One per machine."""


def plot(contents: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Draw the results of every machine, with the workloads of ``names`` in that order."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    height = 0.8 / len(contents)
    for index, content in enumerate(contents):
        machine, results = content["machine"], content["results"]
        style = {
            "label": f"{machine['cpu']}, {machine['instruction set']}",
            "color": COLORS[index % len(COLORS)],
        }
        ratios = {
            row: results[name]["diffsort"]
            for row, name in enumerate(names)
            if "median" in results.get(name, {}).get("diffsort", {})
        }
        left.barh(
            [row + index * height for row in ratios],
            [ratio["median"] for ratio in ratios.values()],
            xerr=[
                [ratio["median"] - ratio["low"] for ratio in ratios.values()],
                [ratio["high"] - ratio["median"] for ratio in ratios.values()],
            ],
            height=height,
            ecolor="#222",
            **style,
        )
        curve = results.get("neco-step", {}).get("rows")
        if curve:
            per_row = curve["microseconds_per_row"]
            milliseconds = [int(rows) * micro / 1e3 for rows, micro in per_row.items()]
            right.plot([int(rows) for rows in per_row], milliseconds, "o-", **style)
    left.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    left.invert_yaxis()
    left.set_xlabel("times faster than diffsort")
    right.set(xscale="log", yscale="log", xlabel="rows of 49", ylabel="ms, loss forward + backward")
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
