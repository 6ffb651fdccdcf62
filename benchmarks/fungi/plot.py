"""How many times faster than built gradients and a stored matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots

from fungi.workloads import WORKLOADS

PANELS = {"float32": "`CountSketch`", "float32, fmkernels-packed": "`Rademacher.from_matrix`"}


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plots.panels(len(PANELS), height=3.4)
    for axis, (measurement, words) in zip(axes, PANELS.items(), strict=True):
        names = plots.measured(contents, list(WORKLOADS), measurement)
        plots.bars(axis, contents, names, measurement)
        axis.set_xscale("log")
        axis.axvline(1, color="#222", linewidth=0.8)
        axis.set_xlabel(f"{words}, times faster than float32".replace("`", ""))
    axes[0].legend(fontsize=7)
    plots.save(figure, path)
