"""python -m gpu.accept FOLDER: make the results of a GPU run those of the project.

Copies the JSON of every suite that it finds to benchmarks/results, named after the device, and
writes from them what the package ships: ``verified.json`` (which kernels have run, and when),
``tuned.json`` (launch configurations) and ``gpu_order.json`` (which kernel is preferred). Needs no
GPU. Results of a dry run are refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = ROOT / "fmkernels" / "configs"

Json = dict[str, Any]


def verified(before: Json, tests: Json, sanitizer: Json | None = None) -> Json:
    """{op: {backend: date}}: kernels all of whose tests passed; one that failed loses its date.

    Only a suite that came to its end counts, without a failure that could be any kernel's; and a
    kernel in which the sanitizer found an error does not.
    """
    after = {op: dict(backends) for op, backends in before.items()}
    outcomes: dict[tuple[str, str], set[str]] = {}
    finished = tests["finished"]
    for test in tests["results"].values():
        if test["outcome"] == "failed" and not test["verifies"]:
            finished = False
        for op, backend in test["verifies"]:
            outcomes.setdefault((op, backend), set()).add(test["outcome"])
    for (op, backend), found in outcomes.items():
        flawed = any(
            facts["outcome"] == "found errors"
            for facts in (sanitizer or {"results": {}})["results"].get(backend, {}).values()
        )
        if "failed" in found or flawed:
            after.get(op, {}).pop(backend, None)
        elif "passed" in found and finished:
            after.setdefault(op, {})[backend] = tests["date"]
    return {op: backends for op, backends in sorted(after.items()) if backends}


def verified_by(results: Path) -> Json:
    """What all committed results say, the oldest first."""
    dates: Json = {}
    found = [read(path) for path in results.glob("gpu-tests-*.json")]
    for tests in sorted(found, key=lambda content: content["date"]):
        sanitizer = read(results / f"gpu-sanitizer-{slug(tests)}.json")
        dates = verified(dates, tests, sanitizer or None)
    return dates


def tuned(before: Json, tune: Json, within_budget: Callable[[str, str, Json], bool]) -> Json:
    """The fastest launches of the device, of those that keep to the budget."""
    device: Json = {}
    for backend, sizes in tune["results"].items():
        for size, times in sizes.items():
            for found in times:
                if "ms" in found and within_budget(backend, size, found["values"]):
                    device.setdefault(backend, {})[size] = found["values"]
                    break
    known = before.get(tune["capability"], {}).get("soft_sort", {})
    for backend, sizes in device.items():
        known = known | {backend: known.get(backend, {}) | sizes}
    return before | {tune["capability"]: {"soft_sort": known}}


def gpu_order(sort: Json) -> Json | None:
    """The faster kernel of the canonical step first; None if not both were measured."""
    step = sort["results"].get("neco-step", {})
    times = {
        backend: step[backend]["ms"]["median"]
        for backend in ("cuda", "triton")
        if "ms" in step.get(backend, {})
    }
    if len(times) < 2:
        return None
    return {
        "order": sorted(times, key=lambda backend: times[backend]),
        "basis": "measured",
        "op": "soft_sort_cross_entropy",
        "workload": f"neco-step: 31,360 queries of 49, forward and backward, {sort['device']}",
        "ms": times,
        "date": sort["date"],
    }


def triton_within_budget(capability: str) -> Callable[[str, str, Json], bool]:
    """Compiles the loss for the device with these values, as the gate of the tests does."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("support", "resources")]
    from budgets import violations
    from triton_aot import resources
    from triton_sort import BY_NAME, compile_for

    from fmkernels.ops.soft_sort.config import Config

    number = round(10 * float(capability))

    def keeps(backend: str, size: str, values: Json) -> bool:
        if backend != "triton":
            return True
        for name in BY_NAME:
            for n in (int(size), int(size) - 1):  # a multiple of 16 is compiled on its own
                kernel = compile_for(name, number, n, config=Config(**values))
                if violations(name, capability, resources(kernel)):
                    return False
        return True

    return keeps


def accept(folder: Path, results: Path = RESULTS, configs: Path = CONFIGS) -> list[Path]:
    """Write everything; returns what was written.

    Raises:
        ValueError: there is no result, one is of a dry run, or the tests did not come to their end;
            nothing has been written then.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))}
    if not found:
        raise ValueError(f"accept: FOLDER: expected gpu-*.json in it, got none in {folder}")
    dry = [name for name, content in found.items() if content["dry_run"]]
    if dry:
        raise ValueError(f"accept: expected results of a GPU, got a dry run's: {', '.join(dry)}")
    empty = [name for name, content in found.items() if not content["results"]]
    if empty:
        raise ValueError(f"accept: {', '.join(empty)}: expected results in it, got none")
    if not found.get("gpu-tests", {"finished": True})["finished"]:
        raise ValueError("accept: gpu-tests: expected tests that came to their end, got a part")
    outputs: dict[Path, Json] = {}
    for name, content in found.items():
        outputs[results / f"{name}-{slug(content)}.json"] = content
    if "gpu-tune" in found:
        path, tune = configs / "tuned.json", found["gpu-tune"]
        outputs[path] = tuned(read(path), tune, triton_within_budget(tune["capability"]))
    order = gpu_order(found["gpu-sort"]) if "gpu-sort" in found else None
    if order is not None:
        outputs[configs / "gpu_order.json"] = order
    for path, content in outputs.items():
        write(path, content)
    if {"gpu-tests", "gpu-sanitizer"} & found.keys():
        write(configs / "verified.json", verified_by(results))
        return [*outputs, configs / "verified.json"]
    return [*outputs]


def slug(content: Json) -> str:
    """The device as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")


def write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> Json:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m gpu.accept FOLDER")
    try:
        for written in accept(Path(sys.argv[1])):
            print("wrote", written.relative_to(ROOT))
    except ValueError as error:
        sys.exit(str(error))
