"""Segmentation by one linear layer on frozen patch features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels import _checks

from .evaluation_inputs import sides

OP = "LinearSegmentationHead"


class LinearSegmentationHead(nn.Module):
    """Classify the patches of frozen features, and only then enlarge the scores to pixels.

        head(x) = upsample(W x + b)  =  W upsample(x) + b

    The two are equal because the weights of a bilinear interpolation add up to 1. The left one
    interpolates C scores instead of D features, and keeps for backward the h·w patches instead of
    the H·W pixels of every feature.

    Args:
        dim: D, the width of the features.
        num_classes: C.

    Attributes:
        weight: (C, D, 1, 1), with ``nn.Conv2d``'s first values, as published.
        bias: (C,)

    Raises:
        ValueError: features of another width or shape, a size that is none.
        TypeError: features that are not floating-point.

    Numerics:
        The product in the head's precision, or autocast's; the interpolation in float32 at least,
        so a half type gives float32 scores where it is enlarged.

    Source:
        Ziegler and Asano, *Self-Supervised Learning of Object Parts*, CVPR 2022; Pariza et al.,
        *NeCo*, ICLR 2025.

    Example:
        >>> import torch
        >>> from fmkernels.api import LinearSegmentationHead
        >>> head = LinearSegmentationHead(384, 21)
        >>> head(torch.randn(2, 28 * 28, 384), size=(100, 100)).shape
        torch.Size([2, 21, 100, 100])
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.dim = _checks.positive_integer(OP, "dim", dim)
        self.num_classes = _checks.positive_integer(OP, "num_classes", num_classes)
        first = nn.Conv2d(self.dim, self.num_classes, 1)
        self.weight, self.bias = first.weight, first.bias

    def forward(
        self,
        features: Tensor,
        size: int | tuple[int, int] | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Scores of every class at every pixel.

        Args:
            features: maps (B, D, h, w), or tokens (B, h·w, D) in rows from the top left, without
                CLS and registers.
            size: (H, W) of the result, or one number for both; None leaves the grid.
            grid: (h, w) of tokens; a square if None.

        Returns:
            (B, C, H, W)
        """
        maps = token_maps(OP, features, grid)
        if maps.shape[1] != self.dim:
            raise ValueError(
                f"{OP}: features: expected width {self.dim}, maps (B, {self.dim}, h, w) or tokens "
                f"(B, N, {self.dim}), got {_checks.shape(features)}"
            )
        scores = F.conv2d(maps.to(self.weight.dtype), self.weight, self.bias)
        if size is None:
            return scores
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.interpolate(
            scores, size=sides(OP, "size", size), mode="bilinear", align_corners=False
        )

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"{self.dim}, {self.num_classes}"


def token_maps(op: str, features: Any, grid: tuple[int, int] | None) -> Tensor:
    """Tokens (B, h·w, D) or maps (B, D, h, w) -> maps; ``grid`` is (h, w), a square if None."""
    _checks.floating_tensor(op, "features", features)
    maps: Tensor = features
    if maps.ndim == 4:
        if grid is not None and tuple(maps.shape[2:]) != tuple(grid):
            raise ValueError(
                f"{op}: grid: expected {tuple(maps.shape[2:])}, that of features, or None, "
                f"got {tuple(grid)}"
            )
        return maps
    if maps.ndim != 3:
        raise ValueError(
            f"{op}: features: expected maps (B, D, h, w) or tokens (B, N, D), "
            f"got {_checks.shape(maps)}"
        )
    number = maps.shape[1]
    if grid is None:
        side = round(number**0.5)
        if side * side != number:
            raise ValueError(
                f"{op}: features: expected a square number of tokens, got {number}; pass "
                "grid=(h, w), and leave out CLS and registers"
            )
        grid = (side, side)
    if grid[0] * grid[1] != number:
        raise ValueError(
            f"{op}: grid: expected h·w = {number}, the number of tokens, got {tuple(grid)}"
        )
    return maps.mT.reshape(len(maps), -1, *grid)
