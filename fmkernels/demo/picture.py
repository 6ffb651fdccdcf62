"""The demo's figure: query patches and their neighbours in soft order, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import fmkernels
from fmkernels.demo import photographs
from fmkernels.demo.training import STEEPNESS, Evaluation, Experiment

SHOWN = 9
GAP = 3
INK, MUTED, ACCENT = "#1b1f24", "#6b7280", "#e4572e"
LABELS = ("before", "after", "teacher")


def draw(
    experiment: Experiment,
    evaluations: Sequence[Evaluation],
    losses: Sequence[float],
    queries: Sequence[tuple[str, int, int]],
    orders: Sequence[Sequence[Tensor]],
) -> Figure:
    """One band per query, the loss curve below.

    Args:
        experiment: photographs and references.
        evaluations: before and after the training.
        losses: one per step.
        queries: photograph, row and column among its held-out patches.
        orders: per query the permutation matrices (before, after, teacher), (49, 49) each.
    """
    figure = Figure(figsize=(13, 2.05 * len(queries) + 2.6), facecolor="white")
    grid = figure.add_gridspec(
        len(queries) + 1,
        6,
        width_ratios=(1.75, 0.8, 4.1, 1.25, 1.25, 1.25),
        left=0.02, right=0.985, top=1 - 0.95 / figure.get_figheight(), bottom=0.06,
        wspace=0.1, hspace=0.16,
    )  # fmt: skip
    for row, (query, permutations) in enumerate(zip(queries, orders, strict=True)):
        axes = [figure.add_subplot(cell) for cell in grid[row, :]]
        _photo(axes[0], experiment, query)
        _patch(axes[1], experiment, query)
        _strips(axes[2], experiment.references, permutations)
        for axis, label, permutation in zip(axes[3:], LABELS, permutations, strict=True):
            _matrix(axis, permutation, by=permutations[-1])
            if row == 0:
                axis.set_title(label, fontsize=10, color=INK)
        if row == 0:
            axes[1].set_title("query", fontsize=10, color=INK)
            axes[2].set_title("its nearest references in soft order →", fontsize=10, color=INK)
    return figure
