"""Batches of raw inputs: tensors, lists, mappings; datasets and folders that they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from .arrays import optional


def count(inputs: Any) -> int:
    """How many inputs there are in a tensor, a list, or a mapping of tensors."""
    if isinstance(inputs, Mapping):
        return len(next(iter(inputs.values())))
    return len(inputs)


def part(inputs: Any, start: int, stop: int) -> Any:
    """Some of the inputs."""
    if isinstance(inputs, Mapping):
        return {key: value[start:stop] for key, value in inputs.items()}
    return inputs[start:stop]


def collate(items: Sequence[Any]) -> Any:
    """A batch of single inputs, of which only the first part is taken if they are pairs.

    Tensors of one shape are stacked, mappings become a mapping; the rest stays a list.
    """
    inputs = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
    first = inputs[0]
    if isinstance(first, Mapping):
        return default_collate(inputs)
    if isinstance(first, Tensor) and all(
        isinstance(item, Tensor) and item.shape == first.shape for item in inputs
    ):
        return torch.stack(inputs)
    return inputs


class ImageFiles(Sequence[Any]):
    """The images in a folder and its folders, as PIL images, in the order of their paths."""

    def __init__(self, op: str, folder: str | Path) -> None:
        self._pillow = optional("PIL.Image", f"{op} of a folder", "pillow")
        known = self._pillow.registered_extensions()
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"{op}: dataset: expected a folder that exists, got {root}")
        files = (path for path in root.rglob("*") if path.is_file())
        self.paths = sorted(path for path in files if path.suffix.lower() in known)
        if not self.paths:
            raise ValueError(f"{op}: dataset: expected images in the folder, got none in {root}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """One image, in RGB."""
        with self._pillow.open(self.paths[index]) as image:
            return image.convert("RGB")

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._pillow = optional("PIL.Image", "a folder of images", "pillow")


def indexed(op: str, dataset: Any) -> Any:
    """A dataset with a length, whose items can be asked for; a folder's images if it is a path."""
    if isinstance(dataset, (str, Path)):
        return ImageFiles(op, dataset)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{op}: dataset: expected a folder, or a dataset with a length and items by index, "
            f"got {type(dataset).__name__}; of a DataLoader pass its dataset"
        )
    return dataset


def loaded(dataset: Any, start: int, batch_size: int, num_workers: int) -> Iterable[Any]:
    """Batches of a dataset from some item on."""
    return DataLoader(
        Subset(dataset, range(start, len(dataset))),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
    )


def checked_numbers(inputs: Any, numbers: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the inputs, from 0 on if None; there has to be at least one input."""
    size = count(inputs)
    if not size:
        raise ValueError("FungiExtractor: inputs: expected at least one, got none")
    if numbers is None:
        return range(size)
    if len(numbers) != size:
        raise ValueError(
            f"FungiExtractor: numbers: expected {size}, one for each input, got {len(numbers)}"
        )
    return numbers
