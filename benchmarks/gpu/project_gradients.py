"""python -m gpu.project_gradients FOLDER: projections at the sizes of vision transformers.

Beside the product of gradients that are built with a matrix that is stored, in float32 and in
bfloat16. Every time is of a result that was compared just before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from fungi.parity import relative_error
from fungi.providers import build
from fungi.workloads import WORKLOADS, Projecting
from torch import Tensor

import fmkernels
from fmkernels import Projection
from gpu import clock, table
from gpu.record import Record
from gpu.sort import attempt
from gpu.target import DEVICE, DRY_RUN, prepare, running

NAMES = (
    "fungi-kl-b-1",
    "fungi-kl-b-64",
    "fungi-kl-b-1024",
    "fungi-kl-l-64",
    "fungi-simclr-32",
    "fungi-tokens",
)
CHECKED, OUTPUTS = 2, 8
"""Samples that are compared with float64, or for drawn matrices with the reference, and numbers."""
ALLOWED = 2.0**-16
"""The error that they may have, of their size."""

Project = Callable[[Tensor, Tensor], Tensor]


class Provider(NamedTuple):
    """What projects, and the exact first numbers of a result, for δ and a in float64."""

    project: Project
    exact: Project


@functools.lru_cache(maxsize=1)
def stored(dim: int, entries: int) -> Tensor:
    """Random signs (K, D), int8; the next size's takes its place."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (dim, entries)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=DEVICE)
    return signs.mul_(2).sub_(1)


def ours(make: Callable[..., Projection], problem: Projecting) -> Provider:
    projection = make(problem.out, problem.into, problem.dim)

    def project(delta: Tensor, a: Tensor) -> Tensor:
        return fmkernels.project_gradients(delta, a, projection)

    def reference(delta: Tensor, a: Tensor) -> Tensor:
        with fmkernels.backend("reference"):
            return project(delta, a)[:, :OUTPUTS]

    return Provider(project, reference)


def with_stored(project: Project, matrix: Tensor) -> Provider:
    some = matrix[:OUTPUTS].double()
    return Provider(project, lambda delta, a: build(delta, a) @ some.mT)


def packed(problem: Projecting) -> Provider:
    """A given matrix at 1 bit per entry."""
    matrix = stored(problem.dim, problem.entries)
    projection = fmkernels.Rademacher.from_matrix(matrix, problem.out, problem.into)
    return with_stored(lambda delta, a: fmkernels.project_gradients(delta, a, projection), matrix)


def product(dtype: torch.dtype, problem: Projecting) -> Provider:
    """Gradients that are built, 2³⁰ numbers at a time, and a product."""
    exact = stored(problem.dim, problem.entries)
    matrix, some = exact.to(dtype), max(1, 2**30 // problem.entries)

    def project(delta: Tensor, a: Tensor) -> Tensor:
        parts = zip(delta.split(some), a.split(some), strict=True)
        return torch.cat([build(*part).to(dtype) @ matrix.mT for part in parts]).float()

    return with_stored(project, exact)


PROVIDERS: dict[str, Callable[[Projecting], Provider]] = {
    "triton": functools.partial(ours, fmkernels.CountSketch),
    "triton-seeded": functools.partial(ours, fmkernels.Rademacher),
    "triton-khatri-rao": functools.partial(ours, fmkernels.KhatriRao),
    "triton-packed": packed,
    "torch-float32": functools.partial(product, torch.float32),
    "torch-bfloat16": functools.partial(product, torch.bfloat16),
}


def measured(problem: Projecting, name: str) -> dict[str, Any]:
    """Time and memory of a call."""
    sets = [problem.inputs(seed, DEVICE) for seed in (1, 2)]
    with running("triton" if name.startswith("triton") else "reference"):
        project, exact = PROVIDERS[name](problem)
        found = project(*sets[0])[:CHECKED, :OUTPUTS]
        error = relative_error(found, exact(*(x[:CHECKED].double() for x in sets[0])))
        if error > ALLOWED and name != "torch-bfloat16":
            raise AssertionError(f"errs by {error:.3g} of its result")
        turns = iter(range(10**9))

        def step() -> Tensor:
            return project(*sets[next(turns) % len(sets)])

        ms, peak = clock.milliseconds(step), clock.peak_bytes(step)
    return {"error": measure.digits(error), "ms": ms, "peak_bytes": peak}


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "project_gradients")
    roof = record.content["roofline"] = clock.roofline()
    record.write()
    for name in NAMES[::4] if DRY_RUN else NAMES:
        problem = WORKLOADS[name]
        assert isinstance(problem, Projecting)
        problem = problem.tiny() if DRY_RUN else problem
        rates = (roof["bytes_per_s"], roof["float32_operations_per_s"])
        work = zip(
            ("bytes", "operations"), (problem.bytes_moved(), problem.operations()), rates,
            strict=True,
        )  # fmt: skip
        floors = {what: measure.digits(amount / rate * 1e3) for what, amount, rate in work}
        found = record.results[name] = {"samples": problem.samples, "floor_ms": floors}
        for who in PROVIDERS:
            found[who] = attempt(measured, problem, who)
            record.write()
        print(*table.project_gradients({name: found}), flush=True)
    record.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
