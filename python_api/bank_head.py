"""Where the rows lie in a .npy or safetensors file, from its head; what does not fit is refused."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fmkernels.ops.knn.reference import METRICS

from .safe_file import NUMPY_MAGIC, format_of

NUMPY_DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}
SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
LARGEST_HEAD = 100 * 2**20
"""Of a safetensors file, as its format has it."""


class Place(NamedTuple):
    """Rows in a file, one after the other."""

    offset: int
    """Of the first, in bytes."""
    rows: int
    dim: int
    dtype: torch.dtype
    size: int
    """Of the whole file, in bytes."""
    metric: str | None = None
    """That of a saved PatchIndex."""

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.dim * self.dtype.itemsize


class _Entry(NamedTuple):
    """A tensor in the head of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def place_of(path: Path, tensor: str | None) -> Place:
    """Read the head of a file; ``tensor`` is the name of one in a safetensors file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(NUMPY_MAGIC))
        file.seek(0)
        if start != NUMPY_MAGIC:
            return _in_safetensors(path, file, size, tensor)
        if tensor is not None:
            raise ValueError(
                f"open_bank: tensor: expected None for a .npy file, which has one, got {tensor!r}"
            )
        return _in_numpy(path, file, size)


def _refusal(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(f"open_bank: path: expected {expected}, got {got} in {path}")


def _of_size(path: Path, place: Place, expected: int) -> Place:
    if place.size != expected:
        raise _refusal(path, f"the {expected} bytes that its head tells of", f"{place.size} bytes")
    return place


def _in_numpy(path: Path, file: io.BufferedReader, size: int) -> Place:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:  # version 3 has names in other alphabets, of structured arrays, which are refused
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, TypeError, SyntaxError) as error:
        raise _refusal(path, "a .npy file", f"a corrupt head ({error})") from error
    known = NUMPY_DTYPES.get(dtype.str)
    if known is None:
        raise TypeError(
            f"open_bank: path: expected rows of little-endian float32, float16 or float64, "
            f"got {dtype} in {path}; convert them with .astype(numpy.float32)"
        )
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise _refusal(path, "an array (M, D)", f"shape {shape}")
    if fortran and min(shape) > 1:
        hint = "Fortran order; save numpy.ascontiguousarray(bank)"
        raise _refusal(path, "rows one after the other (C order)", hint)
    place = Place(file.tell(), *shape, known, size)
    return _of_size(path, place, place.offset + place.rows * place.row_bytes)


def _in_safetensors(path: Path, file: io.BufferedReader, size: int, tensor: str | None) -> Place:
    what = "a .npy or safetensors file"
    if not size:
        raise _refusal(path, what, "an empty file")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LARGEST_HEAD, size - 8):
        raise _refusal(path, what, f"the head of neither, or only its start, {size} bytes,")
    try:
        head: dict[str, Any] = json.loads(file.read(length))
        words = head.pop("__metadata__", {})
        entries = {name: _entry(**fields) for name, fields in head.items()}
        metric = words["metric"] if words.get("format") == format_of("PatchIndex") else None
        if metric not in (None, *METRICS):
            raise ValueError(f"metric {metric!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refusal(path, what, f"a corrupt head ({error!r})") from error
    name, entry = _chosen(path, entries, tensor)
    if entry.dtype not in SAFETENSORS_DTYPES:
        raise TypeError(
            f"open_bank: tensor: expected float32, float16, bfloat16 or float64, got {entry.dtype} "
            f"for {name!r} in {path}"
        )
    if len(entry.shape) != 2 or entry.shape[1] < 1:
        raise _refusal(path, f"{name!r} of shape (M, D)", f"shape {entry.shape}")
    dtype = SAFETENSORS_DTYPES[entry.dtype]
    place = Place(8 + length + entry.begin, *entry.shape, dtype, size, metric)
    if place.rows * place.row_bytes != entry.end - entry.begin:
        expected = f"{place.rows * place.row_bytes} bytes of {name!r}"
        raise _refusal(path, expected, f"{entry.end - entry.begin}")
    return _of_size(path, place, 8 + length + max(entry.end for entry in entries.values()))


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
    begin, end = data_offsets
    numbers = [*shape, begin, end - begin]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"shape {shape}, data_offsets {data_offsets}")
    return _Entry(dtype, tuple(shape), begin, end)


def _chosen(path: Path, entries: dict[str, _Entry], tensor: str | None) -> tuple[str, _Entry]:
    """The tensor of that name; without one, the only one of two dimensions."""
    rows = [name for name, entry in entries.items() if len(entry.shape) == 2]
    name = rows[0] if tensor is None and len(rows) == 1 else tensor
    if name is None or name not in entries:
        shapes = ", ".join(f"{name!r} {entry.shape}" for name, entry in entries.items())
        raise ValueError(
            f"open_bank: tensor: expected the name of a tensor (M, D) in {path}, got {tensor!r}; "
            f"there are {shapes or 'none'}"
        )
    return name, entries[name]
