"""Views of images for self-supervised losses: crops and patches, made on the model's device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels import _checks

from .fungi_images import OP, image_groups

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZED = 256 / 224
"""Images are resized to this many times the size of the central crop that follows."""
ATTEMPTS = 10
"""Random boxes that are tried before the central one is taken, as torchvision does."""


class Views(Protocol):
    """What makes the inputs of the model from raw inputs.

    ``counts`` has the number V of views of each kind. ``make`` returns what the model is called on:
    a tensor, or a mapping of tensors that become keyword arguments, with B·V rows, all views of one
    input after the other. ``seeds`` has an integer for each input, and is all that randomness may
    depend on.
    """

    @property
    def counts(self) -> Mapping[str, int]:
        """Kind -> V."""

    def make(self, kind: str, inputs: Any, device: torch.device, seeds: Sequence[int]) -> Any:
        """The views of one kind."""


@dataclasses.dataclass(frozen=True)
class ImageViews:
    """FUNGI's views: a central crop, random resized crops, and a grid of overlapping patches.

    Images are a tensor (B, 3, H, W), or a list of tensors (3, H, W), NumPy arrays (H, W, 3) or PIL
    images of any sizes. Numbers of uint8 count to 255, floats are from 0 to 1 (NaN gives features
    of NaN), and others are refused. All resampling is antialiased and done in float32 on the
    model's device.

    | kind | V | what it is |
    |---|---|---|
    | ``"plain"`` | 1 | resized to 256/224 · ``size``, central crop |
    | ``"crops"`` | ``global_crops`` + ``local_crops`` | random boxes, resized, bicubic |
    | ``"patches"`` | 49 by default | resized to ``size``; windows of size/``grid`` at a stride of a
    ``stride_scale``-th of that; each resized to ``size``, bicubic |

    Args:
        size: pixels along each side of what the model sees.
        resize: before the central crop: ``"shorter"`` side (bicubic; what most models' own
            transforms do), ``"square"`` (both sides, bilinear; FUNGI's library), ``"none"`` (plain
            views are the images as given), or None for the preset's: shorter in ``"paper"``, square
            in ``"library"``.
        mean: per channel, or one number; subtracted in the end. Images have as many channels.
        std: per channel, or one number; divided by in the end.
        global_crops: how many.
        local_crops: how many.
        global_scale: share of the image's area, smallest and largest.
        local_scale: likewise.
        grid: windows along each side if they did not overlap.
        stride_scale: strides in a window.

    Numerics:
        float32 throughout; PIL, which the published code uses, rounds to 8 bits after each pass, a
        difference of up to 1/255 per pass.

    Source:
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import ImageViews
        >>> ImageViews().counts
        {'plain': 1, 'crops': 12, 'patches': 49}
        >>> images = torch.rand(2, 3, 40, 60)
        >>> ImageViews(size=32).make("crops", images, torch.device("cpu"), seeds=[0, 1]).shape
        torch.Size([24, 3, 32, 32])
    """

    size: int = 224
    resize: str | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    global_crops: int = 2
    local_crops: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    grid: int = 2
    stride_scale: int = 6

    def __post_init__(self) -> None:
        for name in ("size", "global_crops", "grid", "stride_scale"):
            _checks.positive_integer(OP, name, getattr(self, name))
        if self.resize is not None:
            _checks.choice(OP, "resize", self.resize, ("shorter", "square", "none"))
        if self.size % self.grid:
            raise ValueError(
                f"{OP}: grid: expected a divisor of size, {self.size}, got {self.grid}"
            )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{OP}: {name}: expected shares 0 < low <= high <= 1, got {(low, high)}"
                )
        mean, std = (self._numbers(name, torch.device("cpu")) for name in ("mean", "std"))
        if not bool((std > 0).all()):
            raise ValueError(f"{OP}: std: expected numbers > 0, got {self.std}")
        if 1 not in (len(mean), len(std)) and len(mean) != len(std):
            raise ValueError(
                f"{OP}: std: expected one number or {len(mean)}, as mean has, got {len(std)}"
            )

    def _numbers(self, name: str, device: torch.device) -> Tensor:
        """(C, 1, 1), of a setting for each channel."""
        values = torch.tensor(getattr(self, name), dtype=torch.float32, device=device)
        return values.view(-1, 1, 1)

    def with_resize(self, resize: str) -> ImageViews:
        """The same with another ``resize``."""
        return dataclasses.replace(self, resize=resize)

    @property
    def window(self) -> int:
        """Pixels along each side of a patch."""
        return self.size // self.grid

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return max(1, self.window // self.stride_scale)

    @property
    def counts(self) -> Mapping[str, int]:
        """Kind -> V."""
        patches = ((self.size - self.window) // self.stride + 1) ** 2
        crops = self.global_crops + self.local_crops
        return {"plain": 1, "crops": crops, "patches": patches}

    def make(self, kind: str, inputs: Any, device: torch.device, seeds: Sequence[int]) -> Tensor:
        """Views (B·V, 3, size, size), normalised; those of one image follow each other."""
        _checks.choice(OP, "kind", kind, tuple(self.counts))
        shift, scale = self._numbers("mean", device), self._numbers("std", device)
        channels = max(len(shift), len(scale))
        groups = image_groups(inputs, device, channels if channels > 1 else None)
        if kind == "plain":
            views = _in_order(groups, self._plain)
        elif kind == "patches":
            views = _in_order(groups, self._patches)
        else:
            numbered = [
                (position, image)
                for positions, batch in groups
                for position, image in zip(positions, batch, strict=True)
            ]
            numbered.sort(key=lambda pair: pair[0])
            views = torch.stack([self._crops(image, seeds[i]) for i, image in numbered])
        return views.flatten(0, 1).sub_(shift).div_(scale)

    def _plain(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, 3, size, size)"""
        if self.resize == "none":
            return images.unsqueeze(1).clone()
        height, width = images.shape[-2:]
        side = round(self.size * RESIZED)
        if self.resize == "square":
            images = _resized(images, (side, side), "bilinear")
        else:
            share = side / min(height, width)
            sides = (max(side, int(height * share)), max(side, int(width * share)))
            images = _resized(images, sides, "bicubic").clamp_(0, 1)
        top, left = (round((length - self.size) / 2) for length in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size].unsqueeze(1).clone()

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, V, 3, size, size), patches row by row."""
        whole = _resized(images, (self.size, self.size), "bicubic").clamp_(0, 1)
        windows = whole.unfold(2, self.window, self.stride).unfold(3, self.window, self.stride)
        patches = windows.permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, 3, window, window)
        resized = _resized(patches.flatten(0, 2), (self.size, self.size), "bicubic")
        return resized.view(len(images), -1, *resized.shape[1:])

    def _crops(self, image: Tensor, seed: int) -> Tensor:
        """(3, H, W) -> (V, 3, size, size), the global crops first."""
        generator = torch.Generator().manual_seed(seed)
        scales = [self.global_scale] * self.global_crops + [self.local_scale] * self.local_crops
        crops = image.new_empty(len(scales), len(image), self.size, self.size)
        for crop, scale in zip(crops, scales, strict=True):
            sides = image.shape[-2], image.shape[-1]
            top, left, height, width = random_box(generator, sides, scale)
            box = image[None, :, top : top + height, left : left + width]
            crop.copy_(_resized(box, (self.size, self.size), "bicubic")[0].clamp_(0, 1))
        return crops


@dataclasses.dataclass(frozen=True)
class CustomViews:
    """Views by functions of yours: for audio, for tensors that need no preparation, for anything.

    Args:
        plain: inputs -> what the model is called on. None hands the inputs over: a tensor, or a
            mapping of tensors.
        kinds: further kinds of views: kind -> (V, function of (inputs, seeds)), as
            :class:`fmkernels.api.fungi_views.Views` describes; ``"crops"`` is DINO's and
            ``"patches"`` is SimCLR's.

    Example:
        >>> import torch
        >>> from fmkernels.api import CustomViews
        >>> def noisy(sounds, seeds):  # four views of every sound
        ...     draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        ...     noise = [torch.randn(4, sounds.shape[1], generator=draw) for draw in draws]
        ...     return (sounds.unsqueeze(1) + 0.1 * torch.stack(noise)).flatten(0, 1)
        >>> views = CustomViews(kinds={"patches": (4, noisy)})
        >>> views.make("patches", torch.zeros(2, 100), torch.device("cpu"), [0, 1]).shape
        torch.Size([8, 100])
    """

    plain: Callable[[Any], Any] | None = None
    kinds: Mapping[str, tuple[int, Callable[[Any, Sequence[int]], Any]]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def counts(self) -> Mapping[str, int]:
        """Kind -> V."""
        return {"plain": 1, **{kind: count for kind, (count, _) in self.kinds.items()}}

    def make(self, kind: str, inputs: Any, device: torch.device, seeds: Sequence[int]) -> Any:
        """What the function of that kind returns, on the device."""
        if kind == "plain":
            if self.plain is None and not isinstance(inputs, (Tensor, Mapping)):
                raise TypeError(
                    "CustomViews: inputs: expected a tensor or a mapping of tensors, which "
                    f"plain=None hands over, got {type(inputs).__name__}; stack them, or give a "
                    "function plain= that does"
                )
            return on_device(inputs if self.plain is None else self.plain(inputs), device)
        return on_device(self.kinds[kind][1](inputs, seeds), device)


def on_device(views: Any, device: torch.device) -> Any:
    """A tensor, or a mapping with tensors, moved."""
    if isinstance(views, Tensor):
        return views.to(device)
    if isinstance(views, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in views.items()}
    return views


def random_box(
    generator: torch.Generator, sides: tuple[int, int], scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of an image, as ``RandomResizedCrop`` draws it.

    The area is a uniform share of the image's, the aspect ratio log-uniform from 3/4 to 4/3.
    """
    height, width = sides
    drawn = torch.rand(
        4, ATTEMPTS, generator=generator, dtype=torch.float32, device=generator.device
    )
    shares, ratios, tops, lefts = drawn.double().tolist()
    low, high = scale
    bound = math.log(4 / 3)
    for share, ratio, top, left in zip(shares, ratios, tops, lefts, strict=True):
        area = height * width * (low + share * (high - low))
        aspect = math.exp((2 * ratio - 1) * bound)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized(images: Tensor, sides: tuple[int, int], mode: str) -> Tensor:
    """Antialiased; the taps of a crop do not reach beyond it."""
    return F.interpolate(images, size=sides, mode=mode, antialias=True)


def _in_order(groups: list[tuple[list[int], Tensor]], make: Callable[[Tensor], Tensor]) -> Tensor:
    """The views of all groups, (B, V, …), in the order of the images."""
    if len(groups) == 1:
        return make(groups[0][1])
    made = [(positions, make(images)) for positions, images in groups]
    if len({tuple(views.shape[1:]) for _, views in made}) > 1:
        raise ValueError(f'{OP}: images: expected one size with resize="none", got several')
    first = made[0][1]
    ordered = first.new_empty(sum(len(views) for _, views in made), *first.shape[1:])
    for positions, views in made:
        ordered[positions] = views
    return ordered
