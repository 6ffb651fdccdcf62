"""How much less an adapter takes than PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots

from vera.report import names

PANELS = {"peft": "times less than PEFT", "peft-autocast": "times less than PEFT under autocast"}


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plots.panels(len(PANELS), height=3.2)
    for axis, (measurement, words) in zip(axes, PANELS.items(), strict=True):
        measured = plots.measured(contents, names(), measurement)
        plots.bars(axis, contents, measured, measurement)
        axis.axvline(1, color="#222", linewidth=0.8)
        axis.set_xlabel(f"what the adapter takes,\n{words}")
    axes[0].legend(fontsize=7)
    plots.save(figure, path)
