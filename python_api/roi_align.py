"""ROI alignment as two matrix products: what ``torchvision.ops.roi_align(…, aligned=True)`` gives.

A bin's value is the mean of the map at a regular grid of points, each interpolated bilinearly.
Bilinear weights are products of a weight along y and one along x, and so is their mean over the
grid; the bins of a box are therefore ``rows @ map @ columns.T`` with two small matrices. No
gather, no atomic addition: the gradient is deterministic, and torch.compile sees plain products.
For the same reason a NaN or an infinity anywhere in a map reaches all of its boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._autocast import product_dtype


def roi_align(maps: Tensor, boxes: Tensor, grid_size: int) -> Tensor:
    """Average every box of a map over a grid of bins.

    Args:
        maps: (B, D, H, W), floating.
        boxes: (B, K, 4) as (x1, y1, x2, y2) in cells of the map, clipped to it: cell i covers
            [i, i + 1).
        grid_size: bins along each side. As many points as the bin is long (rounded up) are
            averaged along each side: torchvision's ``sampling_ratio=-1``.

    Returns:
        (B, K, grid_size², D), bins row by row, in the dtype of ``maps``.

    Source:
        He et al., *Mask R-CNN*, ICCV 2017.
    """
    height, width = maps.shape[-2:]
    x1, y1, x2, y2 = boxes.to(maps.dtype).unbind(dim=-1)
    rows = _bin_weights(y1, y2, height, grid_size)  # (B, K, P, H)
    columns = _bin_weights(x1, x2, width, grid_size)  # (B, K, Q, W)
    wide = product_dtype(maps)
    narrow = torch.einsum("bdhw,bkqw->bkhqd", maps.to(wide), columns.to(wide))
    bins = torch.einsum("bkph,bkhqd->bkpqd", rows.to(wide), narrow)
    return bins.flatten(2, 3).to(maps.dtype)


def _bin_weights(start: Tensor, stop: Tensor, length: int, bins: int) -> Tensor:
    """Weight of every cell in every bin of [start, stop), (…, bins, length); rows sum to 1."""
    start, stop = start.clamp_min(0), stop.clamp_max(length)
    size = ((stop - start) / bins)[..., None, None]
    points = size.ceil().clamp_min(1)
    index = _count_up(-(-length // bins), start)  # no box exceeds the map
    first = _count_up(bins, start)[:, None]
    position = start[..., None, None] - 0.5 + first * size + (index + 0.5) * (size / points)
    position = position.clamp(0, length - 1)  # cell i has its centre at i
    distance = (position[..., None] - _count_up(length, start)).abs()
    weights = torch.where((index < points)[..., None], (1 - distance).clamp_min(0), 0)
    return weights.sum(dim=-2) / points


def _count_up(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)
