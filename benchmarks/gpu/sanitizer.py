"""python -m gpu.sanitizer FOLDER: every kernel on small sizes under NVIDIA's compute-sanitizer.

memcheck finds accesses out of bounds, racecheck races in shared memory, synccheck barriers that not
every thread reaches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fmkernels
from gpu.record import Record
from gpu.target import BACKENDS, DEVICE, DRY_RUN, prepare, running

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86
"""The exit code that means a finding."""

LIMIT_S = 75
"""For one tool and one backend."""


def small(backend: str) -> None:
    """Forward and backward of every op, on sizes that leave threads, wires and rows over."""
    prepare()
    with running(backend):
        for n in (2, 3) if DRY_RUN else (2, 7, 49):
            x = (0.15 * torch.randn(3, n, device=DEVICE)).requires_grad_()
            values, permutation = fmkernels.soft_sort(x)
            torch.autograd.grad([values.sum() + permutation.square().sum()], [x])
            loss = fmkernels.soft_sort_cross_entropy(x, x.detach().flip(0))
            (gradient,) = torch.autograd.grad([loss], [x])
            assert gradient.isfinite().all()
            fmkernels.soft_sort_cross_entropy(x.detach(), x.detach().flip(0))


def check(tool: str, backend: str, command: list[str]) -> dict[str, Any]:
    start = time.monotonic()
    # PyTorch's own cache would hide what lies behind the end of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, sys.executable, "-m", "gpu.sanitizer", "--small", backend],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": f"no result in {LIMIT_S} s"}
    outcome = {0: "clean", FOUND: "found errors"}.get(done.returncode, "did not run")
    facts: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    if done.returncode != 0:
        facts["output"] = done.stdout[-2000:]
    return facts


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "sanitizer")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    program = shutil.which("compute-sanitizer") or shutil.which(home / "bin" / "compute-sanitizer")
    for backend in BACKENDS:
        if program is None:
            without = check("none", backend, [])
            record.results[backend] = {
                tool: {"outcome": "compute-sanitizer is not installed"} for tool in TOOLS
            } | {"without": without}
        else:
            record.results[backend] = {}
            for tool in TOOLS:
                options = ["--tool", tool, "--error-exitcode", str(FOUND)]
                record.results[backend][tool] = check(tool, backend, [program, *options])
                record.write()
                print(backend, tool, record.results[backend][tool]["outcome"], flush=True)
    record.finish()


if __name__ == "__main__":
    if sys.argv[1] == "--small":
        small(sys.argv[2])
    else:
        main(*sys.argv[1:])
