"""How many times faster than faiss, at every shape, both indices prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots

from knn.workloads import SHAPES

PANELS = {"faiss": "as it comes", "faiss, fmkernels-float32": "in float32"}


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plots.panels(len(PANELS), height=4.2)
    for axis, (measurement, words) in zip(axes, PANELS.items(), strict=True):
        names = plots.measured(contents, list(SHAPES), measurement)
        plots.bars(axis, contents, names, measurement)
        axis.axvline(1, color="#222", linewidth=0.8)
        axis.set_xlabel(f"times faster than faiss, {words}")
    axes[0].legend(fontsize=7)
    plots.save(figure, path)
