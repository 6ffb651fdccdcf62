"""Launch configurations that were measured on a GPU, as data: ``configs/tuned.json``.

    {capability: {op: {backend: {size: {what: value}}}}}

written from the committed result of a tuning run, never by hand and never at import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).parent / "configs" / "tuned.json"

TUNED: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}


def tuned(capability: str | None, *keys: str) -> dict[str, Any] | None:
    """What was measured for this key on such a device, or None."""
    found: Any = TUNED.get(capability or "", {})
    for key in keys:
        found = found.get(key, {})
    return found or None


def capability(device: torch.device) -> str | None:
    """Of a GPU, such as ``"9.0"``; None of anything else."""
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))
