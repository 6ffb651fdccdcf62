"""The demo's figure: query patches and their neighbours in soft order, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from torch import Tensor

from fmkernels.demo import photographs
from fmkernels.demo.training import Evaluation, Experiment

NEAREST = 9
GAP = 3
INK, MUTED, ACCENT = "#1b1f24", "#6b7280", "#e4572e"
LABELS = ("before", "after", "teacher")
EXPLANATION = (
    "patch_neighbor_loss teaches a small network to rank 49 references as its teacher does. Every "
    "patch on the right is one slot of the relaxed sort: the references, mixed by a column of P.\n"
    "The faded part of each photograph was trained on, the query was not. Rows of P are in the "
    "teacher's order: its diagonal is agreement."
)
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
}

Query = tuple[str, int, int]
"""Photograph, row and column among its held-out patches."""


def draw(
    experiment: Experiment,
    evaluations: tuple[Evaluation, Evaluation],
    losses: Sequence[float],
    queries: Sequence[Query],
    orders: tuple[Tensor, Tensor, Tensor],
) -> Figure:
    """One band per query; below, the references, the loss and the agreement.

    Args:
        experiment: photographs and references.
        evaluations: before and after the training.
        losses: one per step.
        queries: what the bands show.
        orders: permutation matrices before, after and of the teacher, (queries, 49, 49) each.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 1.75 * len(queries) + 3.4), facecolor="white")
        parts = figure.add_gridspec(2, 1, height_ratios=(1.75 * len(queries) + 1.0, 2.4))
        top, foot = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
        _bands(top, experiment, queries, orders)
        _foot(foot, experiment, evaluations, losses)
    return figure


def _bands(
    figure: FigureBase,
    experiment: Experiment,
    queries: Sequence[Query],
    orders: tuple[Tensor, Tensor, Tensor],
) -> None:
    figure.text(0.02, 0.97, "Learning an order of neighbours", fontsize=17, weight="bold")
    figure.text(0.02, 0.955, EXPLANATION, color=MUTED, va="top", linespacing=1.5)
    grid = figure.add_gridspec(
        len(queries), 7, width_ratios=(2.2, 1.6, 0.5, 4.8, 1.6, 1.6, 1.6),
        left=0.02, right=0.985, top=0.865, bottom=0.01, wspace=0.06, hspace=0.1,
    )  # fmt: skip
    for row, (name, *place) in enumerate(queries):
        photo, strips, *matrices = (
            figure.add_subplot(grid[row, column]) for column in (0, 3, 4, 5, 6)
        )
        patch = figure.add_subplot(grid[row, 1])
        _photo(photo, experiment.photos[name], *place)
        patch.imshow(
            _pixels(photographs.held_out(experiment.photos[name])[tuple(place)]),
            interpolation="bicubic",
        )
        _frame(patch, ACCENT)
        permutations = [order[row] for order in orders]
        _strips(strips, experiment.references, permutations)
        for axis, permutation in zip(matrices, permutations, strict=True):
            _matrix(axis, permutation, teacher=permutations[-1])
        if row == 0:
            patch.set_title("query", fontsize=10)
            strips.set_title("slots of the sort, nearest first  →", fontsize=10, loc="left")
            for axis, label in zip(matrices, LABELS, strict=True):
                axis.set_title(f"P {label}", fontsize=10)


def _pixels(patch: Tensor) -> np.ndarray:
    """(3, height, width) -> (height, width, 3), as matplotlib wants it."""
    return patch.permute(1, 2, 0).clamp(0, 1).numpy()


def _frame(axis: Axes, colour: str = "white", width: float = 2.0) -> None:
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=width)


def _photo(axis: Axes, photo: Tensor, row: int, column: int) -> None:
    """The photograph, its training part faded, with the query's place."""
    faded = photo.clone()
    border = photographs.border(photo)
    faded[:, :, border:] = 1 - 0.55 * (1 - photo[:, :, border:])
    size = photographs.PATCH
    axis.imshow(_pixels(faded))
    axis.add_patch(
        Rectangle((column * size, row * size), size, size, fill=False, color=ACCENT, linewidth=2)
    )
    _frame(axis, width=0)


def _strips(axis: Axes, references: Tensor, permutations: Sequence[Tensor]) -> None:
    """Three rows of slots, the last (nearest) slot of the ascending order on the left."""
    size = photographs.PATCH
    high, wide = len(permutations) * (size + GAP), NEAREST * (size + GAP)
    canvas = torch.ones(3, high - GAP, wide - GAP)
    for row, permutation in enumerate(permutations):
        nearest = permutation.flip(1)[:, :NEAREST].T  # (NEAREST, references)
        soft = (nearest / nearest.sum(1, keepdim=True)) @ references.flatten(1)
        for column, patch in enumerate(soft.view(-1, *references.shape[1:])):
            top, left = row * (size + GAP), column * (size + GAP)
            canvas[:, top : top + size, left : left + size] = patch
    axis.imshow(_pixels(canvas))
    _frame(axis, width=0)
    axis.set_yticks([row * (size + GAP) + size / 2 for row in range(3)], LABELS)
    axis.tick_params(axis="y", length=0, labelcolor=INK, pad=4)


def _matrix(axis: Axes, permutation: Tensor, teacher: Tensor) -> None:
    """P with its rows in the teacher's order: the diagonal is agreement."""
    slots = torch.arange(len(teacher), dtype=teacher.dtype)
    order = (teacher @ slots).argsort(descending=True)
    axis.imshow(permutation[order].flip(1).numpy(), cmap="magma_r", norm=PowerNorm(0.5, 0, 1))
    _frame(axis, "#d5d8dc", 0.8)


def _foot(
    figure: FigureBase,
    experiment: Experiment,
    evaluations: tuple[Evaluation, Evaluation],
    losses: Sequence[float],
) -> None:
    grid = figure.add_gridspec(
        1, 3, width_ratios=(1, 2.6, 1.7), left=0.02, right=0.985, top=0.83, bottom=0.2, wspace=0.2
    )
    references, curve, words = (figure.add_subplot(grid[0, column]) for column in range(3))
    size, n = photographs.PATCH, photographs.GRID
    mosaic = torch.ones(3, n * (size + GAP) - GAP, n * (size + GAP) - GAP)
    for index, patch in enumerate(experiment.references):
        top, left = index // n * (size + GAP), index % n * (size + GAP)
        mosaic[:, top : top + size, left : left + size] = patch
    references.imshow(_pixels(mosaic))
    _frame(references, width=0)
    references.set_title("the 49 references", fontsize=10)

    before, after = evaluations
    curve.plot(losses, color=ACCENT, linewidth=1.8)
    curve.set(xlim=(0, len(losses) - 1), xlabel="gradient step")
    curve.set_title("loss on the training crops", fontsize=10, loc="left")
    curve.spines[["top", "right"]].set_visible(False)
    curve.tick_params(colors=MUTED)
    words.axis("off")
    words.set_title("on patches that were never trained on", fontsize=10, loc="left")
    for line, (label, a, b) in enumerate(
        (
            ("loss", f"{before.loss:.2f}", f"{after.loss:.2f}"),
            ("rank correlation", f"{before.spearman:.2f}", f"{after.spearman:.2f}"),
            ("shared among 5 nearest", f"{before.top5:.0%}", f"{after.top5:.0%}"),
        )
    ):
        height = 0.78 - 0.3 * line
        words.text(0, height, label, color=MUTED)
        words.text(0.7, height, f"{a}  →", ha="right", color=MUTED)
        words.text(0.98, height, b, ha="right", fontsize=14, weight="bold")
