"""What the plots of the suites have in common; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("#3b6ea5", "#c8703a", "#4f8f5b", "#8a5a9e")
"""One per machine."""


def panels(count: int, height: float) -> tuple[Any, Sequence[Any]]:
    """A figure, and axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, count, figsize=(9, height), layout="constrained")


def style_of(index: int, content: dict[str, Any]) -> dict[str, str]:
    """Of a machine: its words and its colour."""
    machine = content["machine"]
    label = f"{machine['cpu']}, {machine['instruction set']}"
    return {"label": label, "color": COLORS[index % len(COLORS)]}


def measured(contents: list[dict[str, Any]], names: Sequence[str], measurement: str) -> list[str]:
    """Those of the workloads that have such a ratio on any of the machines."""
    results = [content["results"] for content in contents]
    return [name for name in names if any(ratio_of(each, name, measurement) for each in results)]


def ratio_of(results: dict[str, Any], name: str, measurement: str) -> dict[str, Any] | None:
    facts = results.get(name, {}).get(measurement, {})
    return facts if "median" in facts else None


def bars(axis: Any, contents: list[dict[str, Any]], names: Sequence[str], measurement: str) -> None:
    """The ratios of workloads with their intervals, one colour per machine."""
    height = 0.8 / len(contents)
    for index, content in enumerate(contents):
        found = [ratio_of(content["results"], name, measurement) for name in names]
        ratios = {row: ratio for row, ratio in enumerate(found) if ratio}
        axis.barh(
            [row + index * height for row in ratios],
            [ratio["median"] for ratio in ratios.values()],
            xerr=[
                [ratio["median"] - ratio["low"] for ratio in ratios.values()],
                [ratio["high"] - ratio["median"] for ratio in ratios.values()],
            ],
            height=height,
            ecolor="#222",
            **style_of(index, content),
        )
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axis.invert_yaxis()


def save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
