"""python -m gpu.tune FOLDER: the loss with its gradient at every launch that could be best.

For Triton, by the number of wires: rows of X in a program, its warps, programs on a multiprocessor.
For CUDA: in how many passes a block takes its rows. Every candidate's time is recorded, the fastest
first; ``gpu.accept`` takes the first one that keeps to its budget of registers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from sort import parity
from torch import Tensor
from workloads import Sorting

from fmkernels import _tuned
from fmkernels.ops.soft_sort.config import Config, all_passes, heuristic
from fmkernels.testing import assert_parity
from gpu import clock, table
from gpu.record import Record
from gpu.target import BACKENDS, DEVICE, DRY_RUN, prepare, running

SIZES = {
    "64": (49, 31_360),
    "256": (196, 4096),
    "128": (100, 8192),
    "32": (25, 65_536),
    "16": (16, 131_072),
}
"""By wires: n, and enough queries to fill a device; the most wanted first."""

LAUNCHES = ((4, 4), (4, 2), (2, 4), (8, 2), (4, 3), (2, 8), (8, 1), (1, 8))
"""Warps of a program, programs on a multiprocessor."""

STATES = range(256, 2049)
"""Of a tile: fewer leave threads idle, more do not fit in registers."""


def triton_candidates(wires: int) -> list[dict[str, Any]]:
    """The counted one first."""
    counted = dataclasses.asdict(heuristic(wires))
    found = [
        dataclasses.asdict(Config(rows, warps, programs))
        for rows in (4, 8, 16, 32)
        if rows * wires in STATES
        for warps, programs in LAUNCHES
        if rows * wires >= 32 * warps
    ]
    return [counted, *(candidate for candidate in found if candidate != counted)]


def cuda_candidates(n: int) -> list[dict[str, Any]]:
    return [{"passes": passes} for passes in all_passes(n)]


@contextlib.contextmanager
def using(backend: str, wires: str, candidate: dict[str, Any]) -> Iterator[None]:
    """Launches of this size take the candidate's values."""
    entry = {"soft_sort": {backend: {wires: candidate}}}
    with mock.patch.dict(_tuned.TUNED, {_tuned.capability(DEVICE) or "": entry}), running(backend):
        if backend == "cuda":
            from fmkernels.ops.soft_sort import cuda

            cuda.plan.cache_clear()
        yield


@functools.cache
def float32_gradient(workload: Sorting) -> Tensor:
    """The reference's."""
    return workload.step("reference", device=DEVICE)()


def compile_ahead(job: tuple[str, str, dict[str, Any], int]) -> None:
    """In a process of its own, into Triton's cache: many at a time."""
    backend, wires, candidate, n = job
    prepare()
    with contextlib.suppress(Exception), using(backend, wires, candidate):
        Sorting(16, n).step("fmkernels", device=DEVICE)()


def takes(n: int, passes: int) -> bool:
    """Whether a block of the loss with its gradient holds the rows of a pass."""
    from fmkernels.ops.soft_sort import cuda

    plan = cuda.plan(1, n, "bitonic", DEVICE, True, True)
    return plan is not None and plan.rows == -(-n // passes)


def time_of(
    backend: str, wires: str, workload: Sorting, candidate: dict[str, Any]
) -> dict[str, Any]:
    """Of a gradient that was checked before."""
    try:
        with using(backend, wires, candidate):
            if backend == "cuda" and not takes(workload.n, candidate["passes"]):
                return {"failed": "a block does not hold so many rows", "values": candidate}
            step = workload.step("fmkernels", device=DEVICE)
            exact = parity.exact_gradient(workload, DEVICE)
            assert_parity(step(), float32_gradient(workload), exact)
            return {"ms": clock.milliseconds(step), "values": candidate}
    except Exception as error:  # a launch that the device refuses is a result
        return {
            "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200],
            "values": candidate,
        }


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "tune")
    spawn = multiprocessing.get_context("spawn")
    pool = None if DRY_RUN else ProcessPoolExecutor(8, mp_context=spawn)
    for wires, (n, queries) in SIZES.items():
        if DRY_RUN:
            n, queries = 2, 1
        candidates = {"triton": triton_candidates(int(wires)), "cuda": cuda_candidates(n)}
        if pool is None:
            candidates = {backend: some[:2] for backend, some in candidates.items()}
        else:
            jobs = [("triton", wires, candidate, n) for candidate in candidates["triton"]]
            list(pool.map(compile_ahead, jobs))
        for backend in BACKENDS:
            workload = Sorting(queries, n)
            times = [time_of(backend, wires, workload, each) for each in candidates[backend]]
            times.sort(key=lambda found: found.get("ms", {}).get("median", float("inf")))
            record.results.setdefault(backend, {})[wires] = times
            record.write()
            print(*table.tune({backend: {wires: times}}), flush=True)
    record.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
