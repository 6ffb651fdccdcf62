"""Adapters as PEFT writes and reads them: a folder of adapter_config.json and safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from .arrays import optional
from .safe_file import path_of, replacing
from .vera_config import VeraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
INIT = "fmkernels.init"
"""In the head of the tensors: how A and B were drawn; PEFT's configuration has no field for it."""

Path_ = str | PathLike[str]


def write_adapter(
    op: str,
    folder: Path_,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    words: Mapping[str, str] | None = None,
) -> None:
    """Both files under other names first, then renamed: what was there stays until they are whole.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the path is that of a file.
        OSError: they cannot be written.
    """
    safetensors = optional("safetensors.torch", op, "safetensors")
    target = Path(path_of(op, folder))
    if target.exists() and not target.is_dir():
        raise ValueError(
            f"{op}: path: expected a folder, or a new one's name, got a file, {target}"
        )
    tables = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / WEIGHTS, target / CONFIG) as (weights, settings):
        safetensors.save_file(tables, weights, metadata={"format": "pt", **(words or {})})
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
    except ValueError as error:
        raise ValueError(f"{op}: path: {settings} is damaged or cut short: {error}") from error
    try:
        config = VeraConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: path: {settings}: {error}") from error
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            init = (file.metadata() or {}).get(INIT, config.init)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{op}: path: {weights} is damaged, cut short or no safetensors file: {error}"
        ) from error
    return dataclasses.replace(config, init=init), tensors


def is_adapter(folder: Path_) -> bool:
    """Whether a folder holds an adapter's configuration."""
    return os.path.isfile(os.path.join(folder, CONFIG))
