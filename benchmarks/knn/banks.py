"""Features whose nearest neighbours are more or less hard to tell apart in low precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from workload import normal

DIM = 384
OUTLIER = 100.0
"""Times as large as the others, as in vision transformers."""
PATCH = 8
"""Pixels, each way."""


def random(queries: int, rows: int) -> tuple[Tensor, Tensor]:
    return normal(1, queries, DIM), normal(0, rows, DIM)


def outlier_channel(queries: int, rows: int) -> tuple[Tensor, Tensor]:
    scale = torch.ones(DIM)
    scale[DIM // 2] = OUTLIER
    return tuple(scale * features for features in random(queries, rows))


def photographs(queries: int, rows: int) -> tuple[Tensor, Tensor]:
    """Raw pixels of patches, of which every second pixel begins one: neighbours overlap by three
    quarters. They are less the mean colour of their photograph, as an encoder would see them."""
    from sklearn.datasets import load_sample_images

    patches = []
    for image in load_sample_images().images:
        pixels = image.astype(np.float32) / 255
        windows = np.lib.stride_tricks.sliding_window_view(
            pixels - pixels.mean(axis=(0, 1)), (PATCH, PATCH), axis=(0, 1)
        )[::2, ::2]
        patches.append(torch.from_numpy(windows.reshape(-1, 3 * PATCH**2).copy()))
    every = torch.cat(patches)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return every[order[-queries:]], every[order[:rows]]


KINDS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "random": random,
    "outlier channel": outlier_channel,
    "photographs": photographs,
}
"""Queries and rows."""
