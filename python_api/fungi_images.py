"""Images of all kinds as float tensors from 0 to 1; what is none is refused in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

OP = "ImageViews"


def in_rgb(name: str, picture: Any) -> Any:
    """A PIL image of 8 bits per channel in RGB; others would be cut off at 255."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        raise ValueError(
            f"{OP}: {name}: expected a picture with 8 bits per channel, got mode {picture.mode!r}; "
            "make a tensor of it, of 16 bits with torch.from_numpy(numpy.asarray(picture) / 65535)"
            ".expand(3, -1, -1)"
        )
    return picture.convert("RGB")


def image_groups(
    inputs: Any, device: torch.device, channels: int | None
) -> list[tuple[list[int], Tensor]]:
    """Positions and images (B', C, H, W) of each size, float32 from 0 to 1, on the device."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        _check_channels("images", inputs.shape[1], channels, inputs.shape)
        return [(list(range(len(inputs))), _unit("images", inputs.to(device)))]
    if isinstance(inputs, (Tensor, np.ndarray, Mapping, str)):
        what = f"{inputs.ndim} dimensions" if isinstance(inputs, Tensor) else None
        hint = "; one image goes in a list"
        if isinstance(inputs, np.ndarray):
            hint = "; of an array (B, H, W, 3) pass list(array)"
        raise TypeError(
            f"{OP}: images: expected a tensor (B, 3, H, W) or a list of images, got "
            f"{what or type(inputs).__name__}{hint}. For other inputs take CustomViews or TextViews"
        )
    groups: dict[tuple[int, ...], tuple[list[int], list[Tensor]]] = {}
    for position, given in enumerate(inputs):
        name = f"images[{position}]"
        image = _unit(name, _image(name, given, channels).to(device))
        positions, images = groups.setdefault(tuple(image.shape), ([], []))
        positions.append(position)
        images.append(image)
    return [(positions, torch.stack(images)) for positions, images in groups.values()]


def _image(name: str, image: Any, channels: int | None) -> Tensor:
    """(C, H, W) of a tensor, a NumPy array (H, W, C) or a PIL image."""
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"{OP}: {name}: expected shape (3, H, W), got {tuple(image.shape)}")
        _check_channels(name, image.shape[0], channels, image.shape)
        return image
    if hasattr(image, "convert"):  # PIL's
        image = in_rgb(name, image)
    array = np.array(None if isinstance(image, (str, tuple, list)) else image)
    if array.ndim < 2 or array.dtype == object:
        raise TypeError(
            f"{OP}: {name}: expected a tensor (3, H, W), an array (H, W, 3) or a PIL image, got "
            f"{type(image).__name__}{_hint(image)}"
        )
    if array.ndim != 3:
        raise ValueError(
            f"{OP}: {name}: expected an array of shape (H, W, 3), got {array.shape}; of a grey "
            "one make numpy.stack([array] * 3, axis=-1)"
        )
    _check_channels(name, array.shape[2], channels, array.shape)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _hint(image: Any) -> str:
    if isinstance(image, str):
        return "; for texts take views=TextViews(tokenizer), and give a folder's name to extract"
    if isinstance(image, (tuple, list)):
        return "; of pairs pass the images alone, or the dataset of them to extract"
    return ""


def _check_channels(name: str, found: int, wanted: int | None, shape: Any) -> None:
    if wanted in (None, found):
        return
    hints = {
        1: "repeat a grey image's, as tensor.expand(3, -1, -1) does",
        4: "leave out the last one, which is how opaque a pixel is",
    }
    hint = hints.get(found, "they come first in a tensor and last in an array")
    raise ValueError(
        f"{OP}: {name}: expected {wanted} channels, as mean has, got {found} in shape "
        f"{tuple(shape)}; {hint}"
    )


def _unit(name: str, images: Tensor) -> Tensor:
    """float32 from 0 to 1."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise TypeError(
            f"{OP}: {name}: expected uint8 or floats, got {images.dtype}; convert it with .to("
            "torch.uint8) if it counts to 255"
        )
    floats = images.float()
    low, high = floats.aminmax() if floats.numel() else (0, 1)
    if not (low >= 0 and high <= 1):  # or there is a NaN, which is nobody else's
        outside = floats[(floats < 0) | (floats > 1)]
        if len(outside):
            raise ValueError(
                f"{OP}: {name}: expected floats from 0 to 1, got {float(outside[0]):g}; divide by "
                "255 what counts to it, clamp what a resizing took beyond, and for images that are "
                "normalised already take CustomViews"
            )
    return floats
