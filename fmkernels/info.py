"""What this installation is and can do: ``python -m fmkernels info``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

from fmkernels import __version__, _library

VERIFIED = Path(__file__).parent / "configs" / "verified.json"
"""{op: {backend: date}}, written by a run of the GPU suite and by nothing else."""


def collect() -> dict[str, Any]:
    """Versions, machine, backends per op with reasons, and the variables that are set."""
    native = _library.native
    return {
        "fmkernels": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "extension": "loaded" if native is not None else f"none: {_library.native_error}",
        "instruction set": native.cpu_isa() if native is not None else "none",
        "instruction sets": list(native.cpu_isas()) if native is not None else [],
        "gpu": _gpu(),
        "last GPU verification": _last_verification(),
        "ops": {name: op.backends() for name, op in sorted(_library.OPS.items())},
        "gpu verified": _verified(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FMKERNELS_")
        },
    }


def as_json() -> str:
    """``collect()`` for a bug report."""
    return json.dumps(collect(), indent=2)


def as_text() -> str:
    """``collect()`` for a reader."""
    facts = collect()
    ops, verified = facts.pop("ops"), facts.pop("gpu verified")
    environment = facts.pop("environment")
    facts["instruction sets"] = ", ".join(facts["instruction sets"]) or "none"
    facts["instruction sets that run here"] = facts.pop("instruction sets")
    lines = [f"{name:<32}{value}" for name, value in facts.items()]
    lines += [f"{name:<32}{value}" for name, value in environment.items()]
    for op, backends in ops.items():
        lines += ["", op]
        for backend, reason in backends.items():
            note = ""
            if backend in _library.OPS[op].gpu_kernels:
                note = f" (last run on a GPU: {verified.get(op, {}).get(backend, 'unverified')})"
            lines.append(f"  {backend:<12}{'yes' if reason is None else 'no: ' + reason}{note}")
    return "\n".join(lines)


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return importlib.metadata.version(package)


def _revision() -> str:
    try:
        from fmkernels._build_info import revision
    except ImportError:
        return "unknown"
    return str(revision)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda else "none (this torch is built for the CPU)"
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"


def _last_verification() -> str:
    dates = [date for backends in _verified().values() for date in backends.values()]
    return max(dates, default="never: the GPU kernels are unverified")


def _verified() -> dict[str, dict[str, str]]:
    return json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {}
