"""python -m gpu.sanitizer FOLDER: every kernel on small sizes under NVIDIA's compute-sanitizer.

memcheck finds accesses out of bounds, racecheck races in shared memory, synccheck barriers that not
every thread reaches.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fmkernels
from fmkernels.ops.dvora_linear import DVORA_SCALE, DVORA_SCALE_BACKWARD
from fmkernels.ops.knn import METRICS, search
from fmkernels.ops.project_gradients import project
from fmkernels.ops.vera_dropout import vera_dropout
from fmkernels.ops.vera_expand import VERA_EXPAND, VERA_EXPAND_BACKWARD
from fmkernels.ops.vera_linear.products import VERA_PRODUCTS
from fmkernels.ops.vera_shrink import VERA_SHRINK
from gpu import process
from gpu.record import Record
from gpu.target import BACKENDS, DEVICE, DRY_RUN, prepare, running

TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = ("soft_sort", "knn_", "project_gradients_", "vera_", "dvora_")
"""What all of their names have, one of these."""

FOUND = 86
"""The exit code that means a finding."""

LIMIT_S = 75
"""For one tool and one backend."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


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
        if backend in search.gpu_kernels:
            for rows, dim in ((3, 5), (600, 7)) if DRY_RUN else ((3, 5), (2000, 7), (3000, 64)):
                for metric in METRICS:
                    fmkernels.knn(normal(3, dim), normal(rows, dim), 3, metric=metric)
        if backend in project.gpu_kernels:
            layers = ((6, 5, 8),) if DRY_RUN else ((6, 5, 8), (9, 33, 40), (130, 257, 70))
            for layer in layers:
                small_projections(*layer)
        if backend in VERA_EXPAND.gpu_kernels:
            sizes = ((5, 4, 3, 2),) if DRY_RUN else ((5, 4, 3, 2), (70, 33, 50, 17))
            for tokens, into, out, rank in sizes:
                small_adapters(tokens, into, out, rank)


def small_adapters(tokens: int, into: int, out: int, rank: int) -> None:
    """Rows of one adapter and of several, few and many; the magnitude; dropout."""
    half = torch.float16
    x, u = normal(tokens, into).to(half), normal(tokens, rank).to(half)
    base, B = normal(tokens, out).to(half), normal(out, rank).to(half)
    for count in (1, 3):
        d, b = normal(count, rank), normal(count, out)
        ids = torch.arange(tokens, device=DEVICE) % 4 - 1 if count > 1 else None
        y = VERA_EXPAND(base, u, d, b, B, ids, False)
        assert y.isfinite().all()
        VERA_EXPAND_BACKWARD(y, u, d, b, B, ids, False, True, True)
        layer = x, normal(out, into).to(half), None, normal(rank, into).to(half)
        VERA_PRODUCTS(*layer, B, d, b, ids, False, False, False)
    VERA_SHRINK(vera_dropout(x, 0.5, seed=1), normal(rank, into).to(half))
    norms = torch.ones(out, device=DEVICE)
    DVORA_SCALE_BACKWARD(y, DVORA_SCALE(base, norms, norms, norms), norms, norms)


def small_projections(out: int, into: int, dim: int) -> None:
    """Every kind, of samples that have a row, several or none."""
    given = torch.ones(dim, out * (into + 1), device=DEVICE)
    projections = (
        fmkernels.CountSketch(out, into, dim),
        fmkernels.Rademacher(out, into, dim),
        fmkernels.Rademacher.from_matrix(given, out, into),
        fmkernels.KhatriRao(out, into, dim),
        fmkernels.Kronecker(out, into, dim),
    )
    sizes = ((3, 1), (2, 4), (1, 0))
    deltas = [normal(samples, rows, out) for samples, rows in sizes]
    activations = [normal(samples, rows, into) for samples, rows in sizes]
    for projection in projections[::2] if DRY_RUN else projections:
        for found in fmkernels.project_gradients(deltas, activations, projection):
            assert found.isfinite().all()
        fmkernels.project_gradients(deltas[0], activations[0], projection)


def check(tool: str, backend: str, command: list[str]) -> dict[str, Any]:
    start = time.monotonic()
    # PyTorch's own cache would hide what lies behind the end of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [*command, sys.executable, "-m", "gpu.sanitizer", "--small", backend]
    with tempfile.TemporaryFile("w+") as output:
        code = process.run(program, LIMIT_S, environment, output)
        output.seek(0)
        text = output.read()
    facts: dict[str, Any] = {
        "outcome": outcome(code, text),
        "seconds": round(time.monotonic() - start, 1),
    }
    if code != 0:
        facts["output"] = text[-2000:]
    return facts


def outcome(code: int | None, text: str) -> str:
    """In words. PyTorch's kernels run, too, and an error in one of theirs is not ours."""
    if code is None:
        return f"no result in {LIMIT_S} s"
    if code == FOUND:
        return (
            "found errors" if any(name in text for name in KERNELS) else "did not reach our kernels"
        )
    return "clean" if code == 0 else "did not run"


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
                if tool == "memcheck":  # libraries ask for what is not there, on purpose
                    options += ["--report-api-errors", "no"]
                record.results[backend][tool] = check(tool, backend, [program, *options])
                record.write()
                print(backend, tool, record.results[backend][tool]["outcome"], flush=True)
    record.finish()


if __name__ == "__main__":
    if sys.argv[1] == "--small":
        small(sys.argv[2])
    else:
        main(*sys.argv[1:])
