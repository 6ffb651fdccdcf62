"""python -m gpu.sort FOLDER: NeCo's sort at the canonical sizes, both kernels beside their peers.

Every time is of a gradient that was checked just before (``parity.check``), and stands beside two
floors: the bytes that must move over this device's copy rate, the operations over its float32 rate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import parity
import torch
from torch import Tensor
from workloads import Features, Sorting, TrainingLoss, Workload, on_device

from gpu import clock, table
from gpu.record import Record
from gpu.target import BACKENDS, DEVICE, DRY_RUN, prepare, running

WORKLOADS: dict[str, Workload] = {
    "neco-step": Sorting(31_360, 49),
    "neco-196": Sorting(12_544, 196),
    "neco-features": Features(64),
    "neco-loss": TrainingLoss(64),
    "soft-sort-matrix": Sorting(3136, 49, "matrix"),
    "soft-sort-matrix-16": Sorting(3136, 16, "matrix"),
    "soft-sort-matrix-64": Sorting(3136, 64, "matrix"),
    "soft-sort-matrix-256": Sorting(392, 256, "matrix"),
}
PEERS = ("reference", "diffsort")


def measured(workload: Workload, provider: str, step: Callable[[], Tensor]) -> dict[str, Any]:
    """Time and memory of a step; in words, why there are none."""
    inputs = on_device(workload.inputs(seed=0), DEVICE)
    return {
        "ms": clock.milliseconds(step),
        "peak_bytes": clock.peak_bytes(step),
        "kept_bytes": measure.bytes_kept(workload.forward(provider, inputs), *inputs),
    }


def ours(workload: Workload, backend: str) -> dict[str, Any]:
    with running(backend):
        parity.check(workload, "reference", DEVICE)
        return measured(workload, "fmkernels", workload.step("fmkernels", device=DEVICE))


def peer(workload: Workload, name: str) -> dict[str, Any]:
    return measured(workload, name, workload.step(name, device=DEVICE))


def attempt(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What it returns; or why not: a missing package, a kernel's limit, too little memory."""
    try:
        return function(*arguments)
    except ModuleNotFoundError as error:
        return {"failed": f"{error.name} is not installed"}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"failed": "needs more memory than the device has"}
    except Exception as error:  # Triton's are of many classes; the rest of the suite still counts
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "sort")
    roof = record.content["roofline"] = clock.roofline()
    record.write()
    for name, full in WORKLOADS.items():
        workload = full.tiny() if DRY_RUN else full
        found = record.results[name] = {
            "rows": workload.rows,
            "floor_ms": {
                "bytes": measure.digits(workload.bytes_moved() / roof["bytes_per_s"] * 1e3),
                "operations": measure.digits(
                    workload.operations() / roof["float32_operations_per_s"] * 1e3
                ),
            },
        }
        for backend in BACKENDS:
            found[backend] = attempt(ours, workload, backend)
            record.write()
        for package in PEERS:
            found[package] = attempt(peer, workload, package)
            record.write()
        print(*table.sort({name: found}), flush=True)
    record.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
