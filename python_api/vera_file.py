"""Adapters as PEFT writes and reads them: a folder of adapter_config.json and safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from .arrays import checksum, optional
from .safe_file import path_of, replacing
from .vera_config import VeraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
INIT = "fmkernels.init"
"""In the head of the tensors: how A and B were drawn; PEFT's configuration has no field for it."""
SEED = "fmkernels.projection_prng_key"
"""In the head of the tensors: with another seed beside them they would be another adapter's."""
SUM = "fmkernels.crc32"
"""In the head of the tensors: safetensors notices a missing byte, but none that has changed."""

Path_ = str | PathLike[str]


def write_adapter(
    op: str,
    folder: Path_,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    words: Mapping[str, str] | None = None,
) -> None:
    """Both files under other names first, then renamed: if anything fails, the old ones stay.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the path is that of a file.
        OSError: they cannot be written.
    """
    tables = _tables_of(tensors)
    safetensors = optional("safetensors.torch", op, "safetensors")
    target = Path(path_of(op, folder))
    if target.exists() and not target.is_dir():
        raise ValueError(
            f"{op}: path: expected a folder, or a new one's name, got a file, {target}"
        )
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    head = {"format": "pt", SUM: _sum_of(tables), **(words or {})}
    if "projection_prng_key" in config:
        head[SEED] = str(config["projection_prng_key"])
    target.mkdir(parents=True, exist_ok=True)
    files = target / WEIGHTS, target / CONFIG
    with _restored(files[0]), replacing(*files) as (weights, settings):
        safetensors.save_file(tables, weights, metadata=head)
        settings.write_text(text, encoding="utf-8")


def read_adapter(op: str, folder: Path_) -> tuple[VeraConfig, dict[str, Tensor]]:
    """The configuration and the tensors, on the CPU; no pickle is opened.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        ValueError: a file is damaged, or it is no VeRA adapter.
    """
    safetensors = optional("safetensors", op)
    target = Path(path_of(op, folder))
    weights, settings = target / WEIGHTS, target / CONFIG
    if not settings.is_file():
        raise FileNotFoundError(f"{op}: path: expected a folder with {CONFIG}, got {target}")
    if not weights.is_file():
        hint = ""
        if (target / PICKLE).is_file():
            hint = (
                f"; {PICKLE} is a pickle, which may run anything when it is loaded: save it again "
                "with PEFT's save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(f"{op}: path: expected {WEIGHTS} in {target}{hint}")
    try:
        fields = json.loads(settings.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object, got {type(fields).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: path: {settings} is damaged or cut short: {error}") from error
    try:
        config = VeraConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: path: {settings}: {error}") from error
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            head = file.metadata() or {}
            # copies: theirs are views of the file, which may be overwritten or cut short
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{op}: path: {weights} is damaged, cut short or no safetensors file: {error}"
        ) from error
    if head.get(SUM, "") not in ("", _sum_of(tensors)):
        raise ValueError(f"{op}: path: {weights} is damaged: its tensors are not what was saved")
    seed = str(config.projection_prng_key)
    if head.get(SEED, seed) != seed:
        raise ValueError(
            f"{op}: path: expected the seed {head[SEED]} of {weights} in {settings}, got {seed}; "
            "they are not of one adapter"
        )
    try:
        return dataclasses.replace(config, init=head.get(INIT, config.init)), tensors
    except ValueError as error:
        raise ValueError(f"{op}: path: {weights}: {error}") from error


def whole(tensor: Tensor) -> Tensor:
    """Outside of any graph; what is sharded (a DTensor, as of FSDP2) is gathered, on all ranks."""
    own = tensor.detach()
    return own.full_tensor() if hasattr(own, "full_tensor") else own


def _tables_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole, on the CPU, each in memory of its own: tied weights are written under each name.

    Before anything that one rank may refuse: the others would wait for its part.
    """
    tables: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        table = whole(tensor).cpu().contiguous()
        memory = table.untyped_storage().data_ptr()
        tables[name] = table.clone() if memory in taken else table
        taken.add(memory)
    return tables


@contextlib.contextmanager
def _restored(target: Path) -> Iterator[None]:
    """If what follows fails, the file is what it was: after one of two renames the other may."""
    spare = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    if target.exists():
        try:
            os.link(target, spare)
        except OSError:  # a file system without links
            shutil.copy2(target, spare)
    try:
        yield
    except BaseException:
        if not spare.exists():
            target.unlink(missing_ok=True)
        elif not spare.samefile(target):
            os.replace(spare, target)
        raise
    finally:
        spare.unlink(missing_ok=True)


def _sum_of(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    parts = (
        f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor.reshape(-1))}"
        for name, tensor in sorted(tensors.items())
    )
    return f"{zlib.crc32(chr(10).join(parts).encode()):08x}"
