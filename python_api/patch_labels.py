"""How many pixels of every class each patch of a segmentation mask has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks

from .evaluation_inputs import integer_classes

OP = "patch_label_counts"
HINT = (
    "a mask that torchvision's ToTensor divided by 255 is restored by (masks * 255).round().long()"
)


def patch_label_counts(
    masks: Tensor,
    num_classes: int,
    grid: tuple[int, int],
    *,
    ignore_index: int = 255,
    ignored_as: int | None = 0,
) -> Tensor:
    """Count the pixels of every class in every patch of a mask.

        counts[b, n, c] = number of pixels of class c in patch n of mask b

    Divided by their sum, they are the soft labels of the patches;
    :func:`fmkernels.knn_label_propagation` takes them as they are.

    Args:
        masks: (B, H, W), integer classes from 0 to num_classes − 1, or ``ignore_index``.
        num_classes: C.
        grid: (rows, columns) of patches, which divide H and W. Patches are numbered row by row.
        ignore_index: marks pixels without a class, such as the outlines of Pascal VOC.
        ignored_as: the class that these pixels count as; 0, as published. None leaves them out, so
            that a patch may be empty.

    Returns:
        (B, rows · columns, C), uint8 for patches of up to 256 pixels, int16 or int32 for larger
        ones. A patch of 256 pixels of one class has 255 of them, and no others: its label is
        still exactly 1.

    Raises:
        TypeError: ``masks`` is no integer tensor.
        ValueError: a class out of range, or a grid that does not divide the mask.

    Numerics:
        Exact. Scratch for one mask at a time: five bytes per pixel (of uint8) and eight per count;
        a one-hot mask has 8·C bytes per pixel.

    Source:
        The labels of Balažević et al., *Towards In-Context Scene Understanding*, NeurIPS 2023.

    Example:
        >>> import torch
        >>> from fmkernels.api import patch_label_counts
        >>> mask = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 255]])
        >>> patch_label_counts(mask[None], 3, grid=(1, 2))
        tensor([[[3, 0, 1],
                 [1, 3, 0]]], dtype=torch.uint8)
    """
    num_classes = _checks.positive_integer(OP, "num_classes", num_classes)
    rows, columns = check_grid(OP, grid)
    _check_masks(masks, rows, columns)
    if ignored_as is not None and ignored_as not in range(num_classes):
        raise ValueError(
            f"{OP}: ignored_as: expected a class from 0 to {num_classes - 1}, or None, "
            f"got {ignored_as!r}"
        )
    height, width = masks.shape[1] // rows, masks.shape[2] // columns
    bins = num_classes + (ignored_as is None)  # one more that is dropped
    first = torch.arange(rows * columns, dtype=torch.int32, device=masks.device) * bins
    first = first.view(rows, 1, columns, 1)
    counts = torch.empty(
        (len(masks), rows * columns, num_classes),
        dtype=_dtype(height * width),
        device=masks.device,
    )
    for number, (mask, count) in enumerate(zip(masks, counts, strict=True)):  # bounds the scratch
        check_classes(OP, f"masks[{number}]", mask, num_classes, ignore_index)
        bin_of = _without_ignored(mask, num_classes, ignore_index, ignored_as).int()
        bin_of.view(rows, height, columns, width).add_(first)  # + would make one more copy
        found = torch.bincount(bin_of.flatten(), minlength=rows * columns * bins)
        found = found.view(-1, bins)[:, :num_classes]
        count.copy_(found.clamp_(max=torch.iinfo(counts.dtype).max))
    return counts


def _dtype(pixels: int) -> torch.dtype:
    """The smallest that holds a patch's counts; 256 is told from 255 by being the only class."""
    if pixels <= 256:
        return torch.uint8
    return torch.int16 if pixels <= torch.iinfo(torch.int16).max else torch.int32


def _without_ignored(
    mask: Tensor, num_classes: int, ignore_index: int, ignored_as: int | None
) -> Tensor:
    """The mask with classes in range only; num_classes stands for pixels that are left out."""
    replacement = num_classes if ignored_as is None else ignored_as
    mask = _comparable(mask, ignore_index, replacement)
    return mask.masked_fill(mask == ignore_index, replacement)


def check_classes(
    op: str, argument: str, mask: Tensor, num_classes: int, ignore_index: int
) -> None:
    """Refuse a mask with a class that there is not."""
    mask = _comparable(mask, ignore_index, 0)
    smallest, largest = (int(value) for value in mask.aminmax())
    if smallest < 0 or largest >= num_classes:  # else there is nothing to refuse
        known = mask.masked_fill(mask == ignore_index, 0)
        smallest, largest = (int(value) for value in known.aminmax())
        if smallest < 0 or largest >= num_classes:
            raise ValueError(
                f"{op}: {argument}: expected classes from 0 to {num_classes - 1} or ignore_index, "
                f"{ignore_index}, got {smallest if smallest < 0 else largest}"
            )


def check_dataset(op: str, masks: Tensor, num_classes: int, ignore_index: int, first: int) -> None:
    """Refuse a batch of masks (B, H, W) by the position of an image, from ``first`` on."""
    integer_classes(op, "dataset: masks", masks, HINT)
    for number, mask in enumerate(masks, first):
        check_classes(op, f"dataset: mask of image {number}", mask, num_classes, ignore_index)


def _comparable(mask: Tensor, *numbers: int) -> Tensor:
    """The mask in a dtype in which these numbers are what they are, not wrapped around."""
    limits = torch.iinfo(mask.dtype)
    if mask.dtype in (torch.uint16, torch.uint32, torch.uint64):  # of which torch knows little
        return mask.long()
    if min(numbers) < limits.min or max(numbers) > limits.max:
        return mask.int()
    return mask


def check_grid(op: str, grid: Any) -> tuple[int, int]:
    """(rows, columns), as Python's integers."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"{op}: grid: expected (rows, columns) of patches, got {grid!r}")
    rows, columns = (_checks.positive_integer(op, "grid", side) for side in grid)
    return rows, columns


def _check_masks(masks: Any, rows: int, columns: int) -> None:
    integer_classes(OP, "masks", masks, HINT)
    _checks.dimensions(OP, "masks", masks, "(B, H, W)")
    height, width = masks.shape[1:]
    if not height or not width or height % rows or width % columns:
        raise ValueError(
            f"{OP}: masks: expected a height and width that are multiples of the grid, "
            f"{rows} x {columns}, got {height} x {width}; resize or crop image and mask so that "
            "patches cover them"
        )
