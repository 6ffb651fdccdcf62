"""The file of a :class:`fmkernels.api.PatchIndex`: written whole or not at all, checked in full."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arrays import optional

FORMAT = "fmkernels.PatchIndex 1"
Built = TypeVar("Built")


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], words: dict[str, str]) -> None:
    """Write tensors and words to a safetensors file, which is replaced when all is on the disk."""
    safetensors = optional("safetensors.torch", "PatchIndex.save", "safetensors")
    target = Path(os.path.realpath(path))
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    sums = {f"crc32 of {name}": _checksum(tensor) for name, tensor in tensors.items()}
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # of a new file; safetensors would let only the owner read
        safetensors.save_file(tensors, temporary, {"format": FORMAT, **words, **sums})
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str],
    build: Callable[[dict[str, Tensor], dict[str, str]], Built],
) -> Built:
    """``build`` of what :func:`write` wrote; a ValueError that names the file if it did not."""
    safetensors = optional("safetensors", "PatchIndex.load")
    try:
        with safetensors.safe_open(path, "pt") as file:
            words = dict(file.metadata() or {})
            found = words.pop("format", None)
            if found != FORMAT:
                raise ValueError(
                    f"its format is {found!r}, not {FORMAT!r}; "
                    "fmkernels.api.open_bank searches any tensor (M, D) in a file"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if words.pop(f"crc32 of {name}", None) != _checksum(tensor):
                raise ValueError(f"{name} is not what was written")
        _check_rows(tensors.get("features"))
        return build(tensors, words)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"PatchIndex.load: path: expected a whole file that PatchIndex.save wrote, "
            f"got {os.fspath(path)}: {error}"
        ) from error


def _check_rows(rows: Any) -> None:
    if rows is None or rows.ndim != 2 or not rows.dtype.is_floating_point:
        got = "none" if rows is None else f"{rows.dtype} of shape {tuple(rows.shape)}"
        raise ValueError(f"its features are not floating rows (M, D), but {got}")


def _checksum(tensor: Tensor) -> str:
    data = tensor.contiguous().view(torch.uint8).numpy()
    return f"{zlib.crc32(data):08x}"
