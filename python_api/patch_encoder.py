"""From images to patch tokens with any encoder, and from any dataset to batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .arrays import progress_bar
from .patch_labels import check_grid

Encoder = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> tokens (B, N, D), row by row, or maps (B, D, rows, columns)."""

Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Image (3, H, W) and mask (H, W) -> the same, changed at random."""


BATCH = "; a batch goes in a list: [(images, masks)]"


@contextlib.contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """No gradients and, if the encoder is a module, evaluation mode; it is left as it was found."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        if isinstance(encoder, nn.Module):
            encoder.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


def encode(
    op: str, encoder: Encoder, images: Tensor, grid: Any = None, patch_size: int | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, 3, H, W) -> tokens (B, N, D) in float32 (or float64), and their grid.

    Images move to the device of the encoder's parameters. Without ``grid`` or ``patch_size``, the
    grid is that of a map, or the only one by which N square patches cover the image.
    """
    if isinstance(encoder, nn.Module) and (first := next(encoder.parameters(), None)) is not None:
        images = images.to(first.device)
    output = encoder(images)
    tokens, found = _tokens(op, output, len(images))
    grid = found or _grid(op, tokens.shape[1], images, grid, patch_size)
    if not bool(tokens.isfinite().all()):
        raise ValueError(
            f"{op}: encoder: expected finite features, got NaN or infinity; is it in a half type "
            "that overflows?"
        )
    return tokens if tokens.dtype == torch.float64 else tokens.float(), grid


def _tokens(op: str, output: Any, batch: int) -> tuple[Tensor, tuple[int, int] | None]:
    """(B, N, D), and the grid if the output has one."""
    expected = "tokens (B, N, D) or maps (B, D, rows, columns)"
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{op}: encoder: expected {expected}, got {type(output).__name__}; wrap it, as in "
            "lambda images: model(images)[0], after model.eval()"
        )
    if output.ndim not in (3, 4) or len(output) != batch or not output.is_floating_point():
        raise ValueError(
            f"{op}: encoder: expected {expected}, floating, of the {batch} images, got "
            f"{output.dtype} of shape {tuple(output.shape)}"
        )
    if output.ndim == 3:
        return output, None
    return output.flatten(2).mT, (output.shape[2], output.shape[3])


def _grid(
    op: str, tokens: int, images: Tensor, grid: Any, patch_size: int | None
) -> tuple[int, int]:
    """(rows, columns) of so many tokens."""
    height, width = images.shape[2:]
    if grid is not None:
        source, (rows, columns) = "grid", check_grid(op, grid)
    elif patch_size is not None:
        source, rows, columns = "patch_size", height // patch_size, width // patch_size
    else:
        source, side = "encoder", math.isqrt(height * width // max(tokens, 1))
        rows, columns = height // max(side, 1), width // max(side, 1)
        if rows * side != height or columns * side != width:
            rows = 0  # they would not cover the image
    if rows * columns != tokens or not tokens:
        root = math.isqrt(tokens)
        hint = (
            "leave out the class token, as in tokens[:, 1:]"
            if root * root != tokens and math.isqrt(max(tokens - 1, 0)) ** 2 == tokens - 1
            else "leave out tokens that are no patches, or give grid=(rows, columns)"
        )
        wanted = "a grid of square patches" if source == "encoder" else f"{rows} x {columns}"
        raise ValueError(
            f"{op}: {source}: expected {wanted} for images of {height} x {width}, got {tokens} "
            f"tokens; {hint}"
        )
    return rows, columns


def batches(
    op: str, dataset: Iterable[Any], batch_size: int, augment: Augmentation | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) and masks (B, H, W); single images of one size are put together."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for item in dataset:
        image, mask = _pair(op, item)
        if image.ndim == 4 and augment is None:
            if waiting:
                yield _stacked(waiting)
                waiting = []
            if len(image):
                yield image, mask
            continue
        for single in [(image, mask)] if image.ndim == 3 else zip(image, mask, strict=True):
            pair = single if augment is None else _pair(op, augment(*single))
            if waiting and (len(waiting) == batch_size or _shapes(pair) != _shapes(waiting[0])):
                yield _stacked(waiting)
                waiting = []
            waiting.append(pair)
    if waiting:
        yield _stacked(waiting)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(masks)


def _shapes(pair: tuple[Tensor, Tensor]) -> tuple[torch.Size, torch.Size]:
    return pair[0].shape, pair[1].shape


def _pair(op: str, item: Any) -> tuple[Tensor, Tensor]:
    """An image and its mask, or a batch of each, as tensors."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"{op}: dataset: expected pairs (image, mask), got {type(item).__name__}"
            + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
            + (BATCH if isinstance(item, (Tensor, np.ndarray)) else "")
        )
    image, mask = (
        part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) for part in item
    )
    if mask.ndim == image.ndim and mask.ndim >= 3 and mask.shape[-3] == 1:  # (B, 1, H, W)
        mask = mask.squeeze(-3)
    fits = image.ndim in (3, 4) and mask.ndim == image.ndim - 1
    if not fits or (image.ndim == 4 and len(image) != len(mask)):
        raise ValueError(
            f"{op}: dataset: expected images (3, H, W) with masks (H, W), or batches (B, 3, H, W) "
            f"with (B, H, W), got {tuple(image.shape)} with {tuple(mask.shape)}"
        )
    return image, mask


def nothing(op: str) -> ValueError:
    """The error for a dataset without images."""
    return ValueError(
        f"{op}: dataset: expected at least one pair (image, mask), got none; an iterator such as "
        "zip(images, masks) can be read once"
    )


def length(dataset: Any) -> int | None:
    """How many images a dataset has, or the one that a DataLoader reads, if it says so."""
    try:
        images: Any = dataset.sampler if isinstance(dataset, DataLoader) else dataset
        return len(images)
    except TypeError:
        return None


def counted(
    source: Iterable[tuple[Tensor, Tensor]], progress: bool, total: int | None, label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, under a bar that counts images if one is wanted."""
    with progress_bar(progress, total or 0, label) as advance:
        for images, masks in source:
            yield images, masks
            advance(len(images))
