"""Batches of raw inputs: tensors, lists, mappings; datasets and folders that they come from."""

from __future__ import annotations

import contextlib
import operator
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from .arrays import optional
from .fungi_images import in_rgb

PARTS = (Tensor, np.ndarray, np.number, int, float, str)
"""Of which the batches of mappings are made."""


def crc(data: Any) -> str:
    """CRC-32 of bytes, as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def without_addresses(value: object) -> str:
    """As text, the same in another process: a function is told by its name alone."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


@contextlib.contextmanager
def explained(note: Callable[[], str]) -> Iterator[None]:
    """Adds a note to an error (from Python 3.11 on), which stays what it was."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"FungiExtractor: {note()}")
        raise


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


def first_part(item: Any) -> Any:
    """An item of a dataset, or the first part of a pair."""
    return item[0] if isinstance(item, (tuple, list)) else item


def collate(items: Sequence[Any]) -> Any:
    """A batch of single inputs, of which only the first part is taken if they are pairs.

    Tensors of one shape are stacked, mappings become a mapping; the rest stays a list.
    """
    inputs = [first_part(item) for item in items]
    first = inputs[0]
    if isinstance(first, Mapping):
        foreign = [key for key, value in first.items() if not isinstance(value, PARTS)]
        if foreign:
            kind = type(first[foreign[0]]).__name__
            raise TypeError(
                "FungiExtractor: dataset: expected items that are inputs, tuples that begin with "
                f"one, or mappings of tensors, got a mapping with {kind} for {foreign[0]!r}; wrap "
                "the dataset in one that gives the input alone"
            )
        return default_collate(inputs)
    if isinstance(first, Tensor) and all(
        isinstance(item, Tensor) and item.shape == first.shape for item in inputs
    ):
        return torch.stack(inputs)
    return inputs


class ImageFiles(Sequence[Any]):
    """The images in a folder and its folders, as PIL images, in the order of their paths."""

    def __init__(self, op: str, folder: str | Path) -> None:
        self._op, self._pillow = op, optional("PIL.Image", f"{op} of a folder", "pillow")
        kinds = self._pillow.registered_extensions()
        read = {suffix for suffix, kind in kinds.items() if kind in self._pillow.OPEN}
        self.root = Path(folder)
        if not self.root.is_dir():
            raise ValueError(f"{op}: dataset: expected a folder that exists, got {self.root}")
        files = (path for path in self.root.rglob("*") if path.is_file())
        self.paths = sorted(path for path in files if path.suffix.lower() in read)
        if not self.paths:
            raise ValueError(
                f"{op}: dataset: expected images in the folder, got none in {self.root}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        """One image, in RGB."""
        path = self.paths[index]
        try:
            with self._pillow.open(path) as image:
                return in_rgb(path.name, image)
        except Exception as error:  # of which PIL has many kinds
            raise ValueError(
                f"{self._op}: dataset: expected images, got {path}, which cannot be read: {error}; "
                "repair it, or take it out of the folder"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "paths": self.paths, "_op": self._op}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pillow=optional("PIL.Image", "a folder of images", "pillow"))


def indexed(op: str, dataset: Any) -> Any:
    """A dataset with a length, whose items can be asked for; a folder's images if it is a path."""
    if isinstance(dataset, (str, Path)):
        return ImageFiles(op, dataset)
    by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not by_index or isinstance(dataset, Mapping):
        raise TypeError(
            f"{op}: dataset: expected a folder, or a dataset with a length and items by index, "
            f"got {type(dataset).__name__}; of a DataLoader pass its dataset"
        )
    return dataset


def marks(dataset: Any) -> dict[str, str]:
    """What tells a dataset from most others of its kind, without reading all of it."""
    number = {"number of inputs": str(len(dataset))}
    if isinstance(dataset, ImageFiles):
        files = ((path, path.stat()) for path in dataset.paths)
        lines = [
            f"{path.relative_to(dataset.root)} {about.st_size} {about.st_mtime_ns}"
            for path, about in files
        ]
        return {**number, "files (names, sizes, times)": crc("\n".join(lines).encode())}
    ends = {"first input": dataset[0], "last input": dataset[len(dataset) - 1]}
    return number | {name: _mark(first_part(item)) for name, item in ends.items()}


def _mark(item: Any) -> str:
    if isinstance(item, Mapping):
        return " ".join(f"{key}: {_mark(value)}" for key, value in item.items())
    if isinstance(item, Tensor):
        return crc(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    if hasattr(item, "tobytes"):  # NumPy's and PIL's
        return crc(item.tobytes())
    return crc(without_addresses(item).encode())


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
    one = isinstance(inputs, (str, bytes, Path)) or hasattr(inputs, "convert")
    if one or not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__"):
        raise TypeError(
            "FungiExtractor: inputs: expected a batch (a tensor, a list, or a mapping of tensors), "
            f"got {type(inputs).__name__}; put one input in a list, and give a folder to extract"
        )
    size = count(inputs)
    if not size:
        raise ValueError("FungiExtractor: inputs: expected at least one, got none")
    if numbers is None:
        return range(size)
    try:
        found = [operator.index(number) for number in numbers]
    except TypeError as error:
        raise TypeError(
            f"FungiExtractor: numbers: expected {size} integers, one for each input, "
            f"got {reprlib.repr(numbers)}"
        ) from error
    if len(found) != size:
        raise ValueError(
            f"FungiExtractor: numbers: expected {size}, one for each input, got {len(found)}"
        )
    return found
