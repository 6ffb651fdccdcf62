"""Where two crops of one image show the same part of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _is_size(size: Any) -> bool:
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        return False
    return height >= 1 and width >= 1


def intersection_boxes(
    crops: Tensor, sizes: Sequence[tuple[int, int]], *, num_globals: int = 2
) -> tuple[Tensor, Tensor]:
    """The intersection of every global crop with every crop, in patches of both.

    Crop v shows ``crops[b, v]`` of image b, resized to ``sizes[v]`` patches and not flipped.
    With (x, y) a corner of the intersection in pixels of the image and (x1, y1, x2, y2) the crop:

        x_in_patches = (x − x1) / (x2 − x1) · width,   y likewise

    Args:
        crops: (B, V, 4) boxes (x1, y1, x2, y2) in pixels of the image, the global crops first.
        sizes: (height, width) of every crop in patches, V of them: a crop of 98 pixels has (7, 7)
            patches of 14 pixels.
        num_globals: G, how many of the crops are global.

    Returns:
        The boxes for :class:`fmkernels.api.NeCoLoss`: (B, G, V, 4) with ``[b, g, v]`` the
        intersection of crops g and v in patches of g, and (B, V, G, 4) with ``[b, v, g]`` the same
        in patches of v.

    Raises:
        TypeError: ``crops`` is no tensor of real numbers.
        ValueError: shapes that do not fit, an empty crop, or two crops that do not intersect.

    Source:
        Pariza et al., *NeCo*, ICLR 2025.

    Example:
        >>> import torch
        >>> from fmkernels.api import intersection_boxes
        >>> crops = torch.tensor([[[0, 0, 100, 100], [50, 0, 150, 100], [60, 60, 80, 80]]])
        >>> in_global, in_other = intersection_boxes(crops, [(16, 16), (16, 16), (7, 7)])
        >>> in_global[0, 0, 1].tolist()  # the right half of the first crop is in the second
        [8.0, 0.0, 16.0, 16.0]
        >>> in_other[0, 2, 0].tolist()  # the whole local crop is in the first
        [0.0, 0.0, 7.0, 7.0]
    """
    op = "intersection_boxes"
    if not isinstance(crops, Tensor) or crops.is_complex():
        got = crops.dtype if isinstance(crops, Tensor) else type(crops).__name__
        raise TypeError(f"{op}: crops: expected a torch.Tensor of real numbers, got {got}")
    if crops.ndim != 3 or crops.shape[-1] != 4:
        raise ValueError(f"{op}: crops: expected shape (B, V, 4), got {tuple(crops.shape)}")
    if len(sizes) != crops.shape[1]:
        raise ValueError(
            f"{op}: sizes: expected one (height, width) for each of the {crops.shape[1]} crops, "
            f"got {len(sizes)}"
        )
    if not 1 <= num_globals <= crops.shape[1]:
        raise ValueError(
            f"{op}: num_globals: expected 1 to {crops.shape[1]}, the number of crops, "
            f"got {num_globals}"
        )
    for index, crop_size in enumerate(sizes):
        if not _is_size(crop_size):
            raise ValueError(
                f"{op}: sizes[{index}]: expected (height, width) in patches, integers >= 1, "
                f"got {crop_size!r}"
            )
    if not crops.is_floating_point():
        crops = crops.to(torch.float64)
    good = (crops[..., 2:] > crops[..., :2]).all(dim=-1) & crops.isfinite().all(dim=-1)
    if not bool(good.all()):
        image, v = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: crops: expected finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2, "
            f"got {crops[image, v].tolist()} for crop {v} of image {image}"
        )
    corner = torch.maximum(crops[:, :num_globals, None, :2], crops[:, None, :, :2])
    opposite = torch.minimum(crops[:, :num_globals, None, 2:], crops[:, None, :, 2:])
    if not bool((opposite > corner).all()):
        image, g, v = (opposite <= corner).any(dim=-1).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: crops: expected every crop to intersect every global crop, but crops {g} and "
            f"{v} of image {image} do not: {crops[image, g].tolist()}, {crops[image, v].tolist()}"
        )
    shared = torch.stack([corner, opposite], dim=-2)  # (B, G, V, 2 corners, 2)
    origin, extent = crops[..., :2], crops[..., 2:] - crops[..., :2]  # (B, V, 2)
    size = torch.tensor([(width, height) for height, width in sizes]).to(crops)  # (V, 2)

    def in_patches(of: slice, position: int) -> Tensor:
        """Measured in the crops ``of``, which are dimension ``position`` of the boxes."""
        unit = [part[..., of, None, :].unsqueeze(position) for part in (origin, extent, size)]
        return ((shared - unit[0]) / unit[1] * unit[2]).flatten(-2)

    return in_patches(slice(num_globals), -3), in_patches(slice(None), -4).transpose(1, 2)
