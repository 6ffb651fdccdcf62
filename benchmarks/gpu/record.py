"""One JSON per suite, written anew after every result: a suite cut short leaves what it has."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch

from fmkernels import info
from gpu.target import DEVICE, DRY_RUN


class Record:
    """The file of a suite: where and when it ran, ``finished`` or not, and its ``results``."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.path = folder / f"gpu-{suite}.json"
        self.start = time.monotonic()
        self.content: dict[str, Any] = {
            "suite": suite,
            "dry_run": DRY_RUN,
            "finished": False,
            **origin(),
            "results": {},
        }
        self.write()

    @property
    def results(self) -> dict[str, Any]:
        return self.content["results"]

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.start, 1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)

    def finish(self) -> None:
        self.content["finished"] = True
        self.write()


def origin() -> dict[str, Any]:
    """What a figure belongs to; no names of hosts."""
    facts = info.collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": "none (dry run)" if DRY_RUN else torch.cuda.get_device_name(DEVICE),
        "capability": None
        if DRY_RUN
        else "{}.{}".format(*torch.cuda.get_device_capability(DEVICE)),
        "cuda": torch.version.cuda,
        **{name: facts[name] for name in ("fmkernels", "revision", "torch", "triton", "python")},
    }
