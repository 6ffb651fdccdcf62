"""Handwritten digits on photographs, with exact masks: a small segmentation dataset.

The digits are scikit-learn's, 8 × 8 pixels, enlarged and coloured; the textures are cut from the
photographs of :mod:`fmkernels.demo.photographs`. Training and test scenes share neither a digit nor
a pixel of a photograph. Nothing is downloaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels.demo import photographs

DIGITS = (0, 1, 2, 3, 4, 7)
CLASSES = ("background", *map(str, DIGITS))
MIN_SIDE, MAX_SIDE = 24, 36
"""Of an enlarged digit."""
TRAIN_SHARE = 0.7


class Scenes(NamedTuple):
    """Scenes and their masks: 0 is background, c is the digit ``CLASSES[c]``."""

    images: Tensor
    """(B, 3, size, size), from 0 to 1"""
    masks: Tensor
    """(B, size, size), uint8"""

    def tags(self) -> Tensor:
        """Which digits are in a scene: (B, len(DIGITS)), 0 or 1."""
        classes = torch.arange(1, len(CLASSES), dtype=torch.uint8)[:, None]
        return (self.masks.flatten(1)[:, None] == classes).any(dim=2).float()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(image, mask) of every scene."""
        return list(zip(self.images, self.masks, strict=True))


def make(count: int, seed: int, *, test: bool = False, size: int = 48, attempts: int = 4) -> Scenes:
    """Draw scenes; the same ones for the same arguments.

    Args:
        count: of scenes.
        seed: of everything that is random.
        test: digits and textures that are in no training scene.
        size: pixels along each side of a scene.
        attempts: digits that are tried; one that would hide another is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    textures = list(photographs.load().values())
    digits = _digits(test)
    scenes = [_scene(textures, digits, size, attempts, test, generator) for _ in range(count)]
    images, masks = zip(*scenes, strict=True)
    return Scenes(torch.stack(images), torch.stack(masks))


def _digits(test: bool) -> list[Tensor]:
    """For every class but the background the drawings of its digit, (n, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    drawings, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    drawings = drawings.float().view(-1, 8, 8) / 16
    first = int(TRAIN_SHARE * len(drawings))  # later drawings are by other writers
    part = slice(first, None) if test else slice(first)
    return [drawings[part][digits[part] == digit] for digit in DIGITS]


def _scene(
    textures: list[Tensor],
    digits: list[Tensor],
    size: int,
    attempts: int,
    test: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    image = _texture(textures, size, test, generator)
    mask = torch.zeros(size, size, dtype=torch.uint8)
    for _ in range(attempts):
        c = _integer(0, len(digits), generator)
        drawing = digits[c][_integer(0, len(digits[c]), generator)]
        side = _integer(MIN_SIDE, MAX_SIDE + 1, generator)
        top, left = (_integer(0, size - side + 1, generator) for _ in range(2))
        place = (slice(top, top + side), slice(left, left + side))
        if mask[place].any():  # it would hide another digit
            continue
        large = F.interpolate(drawing[None, None], (side, side), mode="bicubic")[0, 0]
        cover = ((large - 0.25) / 0.2).clamp(0, 1)
        colour = torch.rand(3, 1, 1, generator=generator)
        dark = image[(slice(None), *place)].mean() > 0.5
        colour = 0.35 * colour if dark else 1 - 0.35 * colour
        image[(slice(None), *place)] = torch.lerp(image[(slice(None), *place)], colour, cover)
        mask[place][cover > 0.5] = c + 1
    return image, mask


def _texture(textures: list[Tensor], size: int, test: bool, generator: torch.Generator) -> Tensor:
    """A random crop of a photograph, from the left third for tests, (3, size, size)."""
    photo = textures[_integer(0, len(textures), generator)]
    border = photographs.border(photo)
    part = photo[:, :, :border] if test else photo[:, :, border:]
    side = _integer(size, 2 * size + 1, generator)
    top = _integer(0, part.shape[1] - side + 1, generator)
    left = _integer(0, part.shape[2] - side + 1, generator)
    crop = part[None, :, top : top + side, left : left + side]
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """From low to high − 1."""
    return int(torch.randint(low, high, (), generator=generator))
