"""Photographs that come with scikit-learn and scikit-image, cut into patches.

The left third of every photograph is held out, the rest is for training.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

PATCH = 32
GRID = 7
"""A crop is a grid of 7 × 7 patches, as in NeCo."""


def load() -> dict[str, Tensor]:
    """Name -> (3, height, width) in [0, 1]; only files inside the installed packages."""
    images: dict[str, np.ndarray] = {}
    if importlib.util.find_spec("sklearn") is not None:
        from sklearn.datasets import load_sample_image

        images |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    if importlib.util.find_spec("skimage") is not None:
        from skimage import data

        names = ("astronaut", "chelsea", "coffee", "rocket")
        images |= {name: getattr(data, name)() for name in names}
    return {
        name: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        for name, image in images.items()
    }


def border(photo: Tensor) -> int:
    """The column where the held-out third ends."""
    return photo.shape[2] // 3


def cut(image: Tensor) -> Tensor:
    """(3, height, width) -> (rows, columns, 3, PATCH, PATCH); what is left over is dropped."""
    return image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)


def held_out(photo: Tensor) -> Tensor:
    """The patches of the left third, (rows, columns, 3, PATCH, PATCH)."""
    return cut(photo[:, :, : border(photo)])


def for_training(photo: Tensor) -> Tensor:
    """The patches of the right two thirds, likewise."""
    return cut(photo[:, :, border(photo) :])


def random_crop(photo: Tensor) -> Tensor:
    """The patches of a random crop of the right two thirds, (GRID², 3, PATCH, PATCH)."""
    size = GRID * PATCH
    top = int(torch.randint(photo.shape[1] - size + 1, ()))
    left = int(torch.randint(border(photo), photo.shape[2] - size + 1, ()))
    return cut(photo[:, top : top + size, left : left + size]).flatten(0, 1)
