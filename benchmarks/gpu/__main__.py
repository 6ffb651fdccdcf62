"""python -m gpu [SUITE …] [--out FOLDER] [--minutes N] [--dry-run]: run the suites, show a table.

Exit codes: 0 if every suite finished and nothing failed in it, 1 if not, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import fmkernels
from fmkernels._sources import digest
from gpu import process, table
from gpu.target import DRY_RUN_ENVIRONMENT

BENCHMARKS = Path(__file__).resolve().parent.parent
TESTS = BENCHMARKS.parent / "tests" / "gpu"


class Suite(NamedTuple):
    """A program that leaves ``gpu-<name>.json``, and for how many seconds it may run."""

    limit_s: int
    command: tuple[str, ...]
    processes: bool = False
    """Whether pytest-xdist may divide it: compiling Triton's kernels takes most of its time."""


SUITES = {
    "tests": Suite(270, ("pytest", str(TESTS), "-q", "-W", "default", "--gpu-results"), True),
    "sort": Suite(150, ("gpu.sort",)),
    "knn": Suite(110, ("gpu.knn",)),
    "project_gradients": Suite(60, ("gpu.project_gradients",)),
    "vera": Suite(100, ("gpu.vera",)),
    "tune": Suite(240, ("gpu.tune",)),
    "sanitizer": Suite(300, ("gpu.sanitizer",)),
    "compiled": Suite(240, ("gpu.compiled",)),
}
"""In the order in which they are run, until the time is over, which leaves next to nothing for the
last three: they want a start of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, default=BENCHMARKS.parent / "build" / "gpu" / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: all but the numbers")
    options = parser.parse_args()
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"SUITE: expected some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    refused = why_not(options.dry_run)
    if refused is not None:
        print(f"gpu: {refused}", file=sys.stderr)
        return 1
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment |= DRY_RUN_ENVIRONMENT if options.dry_run else {}
    os.chdir(BENCHMARKS)  # where python -m finds the suites
    outcomes = {}
    for name in options.suites or SUITES:
        (folder / f"gpu-{name}.json").unlink(missing_ok=True)
        left = min(SUITES[name].limit_s, end - time.monotonic())
        outcomes[name] = run(name, folder, left, environment)
    print(table.render(folder, outcomes))
    return 0 if set(outcomes.values()) == {"finished"} else 1


def built_from() -> str | None:
    """The digest of the sources of the installed wheel."""
    try:
        from fmkernels._build_info import sources
    except ImportError:
        return None
    return sources


def why_not(dry_run: bool) -> str | None:
    if BENCHMARKS.parent in Path(fmkernels.__file__).resolve().parents[1:2]:
        return "expected an installed wheel, got the checkout; start it with `make gpu`"
    if built_from() != digest(BENCHMARKS.parent):
        return "the wheel in dist/ was built from other sources than these: make gpu-wheels"
    if not dry_run and not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU; `make gpu-dry-run` needs none"
    return None


def run(name: str, folder: Path, limit_s: float, environment: dict[str, str]) -> str:
    """How it ended, in a word or two. What it left behind when it is stopped counts."""
    if limit_s < 5:
        return "no time left"
    suite = SUITES[name]
    command = [sys.executable, "-m", *suite.command, str(folder)]
    if suite.processes and not environment.get("FMKERNELS_GPU_DRY_RUN"):
        # a worker ends itself after an error that spoils the GPU for it, and another takes over
        command += ["-n", "6", "--max-worker-restart", "1000", "-p", "no:cacheprovider"]
    print(f"\n=== {name}, at most {limit_s:.0f} s", flush=True)
    code = process.run(command, limit_s, environment)
    if code is None:
        return f"stopped after {limit_s:.0f} s"
    return "finished" if code == 0 else f"failed ({code})"


if __name__ == "__main__":
    sys.exit(main())
