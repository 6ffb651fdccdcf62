"""A memory in a file: written as a whole or not at all, and read as a whole or not at all."""

from __future__ import annotations

import os
import uuid
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arrays import optional

FORMAT = "fmkernels patch memory 1"
TABLES = ("features", "labels", "origins")


def save(op: str, path: str | PathLike[str], tables: dict[str, Tensor]) -> None:
    """Write to a file of another name in the same folder, then rename it, which is atomic."""
    safetensors = optional("safetensors.torch", op)
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise ValueError(f"{op}: path: expected a file in a folder that exists, got {path}")
    tables = {name: table.detach().cpu().contiguous() for name, table in tables.items()}
    metadata = {"format": FORMAT} | {name: _checksum(table) for name, table in tables.items()}
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode  # of any new file; safetensors lets only the owner read
        safetensors.save_file(tables, unfinished, metadata=metadata)
        unfinished.chmod(mode)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # or a crash could leave the new name on an empty file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(op: str, path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tables of a file that :func:`save` wrote."""
    safetensors = optional("safetensors", op)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{op}: path: expected a file that exists, got {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("format") != FORMAT or names != set(TABLES):
                raise ValueError(
                    f"{op}: path: expected a file that PatchMemory.save wrote, got {path} with "
                    f"{', '.join(sorted(names)) or 'nothing'}"
                )
            tables = {name: file.get_tensor(name) for name in TABLES}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{op}: path: expected a complete safetensors file, got {path}, which is damaged or "
            f"cut short ({error}); build the memory again"
        ) from error
    for name, table in tables.items():
        if _checksum(table) != metadata.get(name):
            raise ValueError(
                f"{op}: path: expected {name} as they were saved, got other bytes: {path} is "
                "damaged; build the memory again"
            )
    return tables


def _checksum(table: Tensor) -> str:
    """safetensors notices a file that is too short, but no byte that has changed."""
    if not table.numel():
        return "0"
    data: Any = table.reshape(-1).view(torch.uint8).numpy()
    return str(zlib.crc32(data))
