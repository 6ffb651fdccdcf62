"""Pictures of in-context segmentation: predictions beside the truth, and retrieved patches."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .arrays import optional

BACKGROUND, IGNORED = (0.93, 0.93, 0.93), (1.0, 1.0, 1.0)
MARK = "#e4572e"
CONTEXT = 2
"""Patches that are shown on each side of a retrieved one."""
PANELS = ("image", "truth", "prediction")


def check(op: str, path: str | PathLike[str]) -> None:
    """Refuse, before anything is computed, a picture that could not be written."""
    optional("matplotlib", f"{op}: picture")
    figure_of = optional("matplotlib.figure", "picture")
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{op}: picture: expected a file in a folder that exists, got {path}")
    kinds = figure_of.Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix[1:].lower()
    if suffix and suffix not in kinds:  # without one, matplotlib writes a .png
        names = ", ".join(f".{kind}" for kind in kinds)
        raise ValueError(f"{op}: picture: expected a file of a kind in {names}, got {path}")


def predictions(
    path: str | PathLike[str],
    examples: Sequence[tuple[Tensor, Tensor, Tensor]],
    num_classes: int,
    ignore_index: int,
) -> None:
    """Image (3, H, W), truth and prediction (H, W) of every example, two examples in a row."""
    figure_of = optional("matplotlib.figure", "picture")
    across = min(2, len(examples))
    down = -(-len(examples) // max(across, 1))
    figure = figure_of.Figure(figsize=(2.1 * 3 * across, 2.25 * down), facecolor="white")
    axes = figure.subplots(down, 3 * across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (image, *classes) in enumerate(examples):
        row, column = divmod(number, across)
        place = axes[row, 3 * column : 3 * column + 3]
        place[0].imshow(pixels(image))
        for axis, mask in zip(place[1:], classes, strict=True):
            axis.imshow(_coloured(mask, num_classes, ignore_index), interpolation="nearest")
        if row == 0:
            for axis, title in zip(place, PANELS, strict=True):
                axis.set_title(title, fontsize=10)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.25 / (2.25 * down), 0.04, 0.04)
    figure.savefig(path, dpi=110)


def neighbors(
    path: str | PathLike[str],
    image: Tensor,
    patches: Sequence[tuple[int, int]],
    scores: Tensor,
    indices: Tensor,
    origins: Tensor,
    dataset: Any,
    shown: int,
) -> None:
    """Every patch in its image, then near by, then its nearest ones, with their cosines.

    ``scores`` and ``indices`` are (rows, columns, k), ``origins`` (M, 2).
    """
    check("InContextSegmenter.draw_neighbors", path)
    figure_of = optional("matplotlib.figure", "picture")
    marks = optional("matplotlib.patches", "picture", "matplotlib")
    grid = (indices.shape[0], indices.shape[1])
    shown = min(shown, indices.shape[2])
    figure = figure_of.Figure(figsize=(1.3 * (shown + 2), 1.5 * len(patches)), facecolor="white")
    axes = figure.subplots(len(patches), shown + 2, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()

    def show(
        axis: Any, picture: NDArray[Any], row: int, column: int, rows: int, columns: int
    ) -> None:
        """A picture of rows × columns patches, with a frame around one of them."""
        high, wide = picture.shape[0] / rows, picture.shape[1] / columns
        axis.imshow(picture)
        corner = (column * wide - 0.5, row * high - 0.5)
        axis.add_patch(marks.Rectangle(corner, wide, high, fill=False, color=MARK, linewidth=1.5))

    around = (CONTEXT, CONTEXT, 2 * CONTEXT + 1, 2 * CONTEXT + 1)
    for (row, column), (whole, query, *places) in zip(patches, axes, strict=True):
        show(whole, pixels(image), row, column, *grid)
        show(query, _surroundings(image, row, column, grid), *around)
        found = zip(places, scores[row, column], indices[row, column], strict=False)
        for axis, score, index in found:
            number, patch = (int(value) for value in origins[index])
            source = dataset[number][0]
            show(axis, _surroundings(source, *divmod(patch, grid[1]), grid), *around)
            axis.set_title(f"{float(score):.2f}", fontsize=8, pad=2)
    axes[0, 1].set_title("query", fontsize=8, pad=2)
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.93, 0.05, 0.2)
    figure.savefig(path, dpi=110)


def pixels(image: Tensor) -> NDArray[Any]:
    """(3, H, W) -> (H, W, 3) from 0 to 1; a normalised image is stretched to fill that range."""
    values = image.detach().cpu().float()
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / max(high - low, 1e-12)
    if len(values) == 1:
        values = values.expand(3, -1, -1)
    picture: NDArray[Any] = values.permute(1, 2, 0).numpy()
    return picture


def _surroundings(image: Tensor, row: int, column: int, grid: tuple[int, int]) -> NDArray[Any]:
    """The patch with CONTEXT patches around it; white beyond the edge of the image."""
    picture = pixels(image)
    high, wide = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    margins = ((CONTEXT * high,) * 2, (CONTEXT * wide,) * 2, (0, 0))
    padded = np.pad(picture, margins, constant_values=1.0)
    top, left, side = row * high, column * wide, 2 * CONTEXT + 1
    return padded[top : top + side * high, left : left + side * wide]


def _coloured(mask: Tensor, num_classes: int, ignore_index: int) -> NDArray[Any]:
    """(H, W) -> (H, W, 3): class 0 grey, ignored pixels white."""
    colormaps = optional("matplotlib", "picture").colormaps
    name = "tab10" if num_classes <= 11 else "tab20" if num_classes <= 21 else "gist_ncar"
    count = max(num_classes - 1, 1)
    positions = np.arange(count) if count <= 20 else np.linspace(0, 1, count)
    palette = np.vstack([BACKGROUND, colormaps[name](positions)[:, :3], IGNORED])
    numbers = mask.cpu().numpy().astype(np.int64)
    numbers = np.where(numbers == ignore_index, num_classes, numbers)
    coloured: NDArray[Any] = palette[numbers]
    return coloured
