"""Collects and shows what the benchmarks measured; ``--save-results`` writes benchmarks/results.

A file is of one suite (``SUITE`` of the bench file), machine and torch:
``results[workload][measurement]``, and every measurement says of which revision and day it is. One
that is taken again replaces the one before as a whole.
"""

import datetime
import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

import measure
import pytest
import torch
from suites import SUITES

import fmkernels
from fmkernels import info
from fmkernels.ops.knn.config import has_fast_bfloat16

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ("benchmarks/results", "docs/benchmarks", "docs/backends.md", "README.md")
COLLECTED = {}
"""Results by suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--save-results",
        nargs="?",
        const=RESULTS,
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/<suite>-<machine>.json (default folder: benchmarks/results)",
    )


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(measure.THREADS)


@pytest.fixture(scope="session")
def origin():
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return {"revision": revision(), "date": today.isoformat()}


@pytest.fixture
def record(origin, request):
    """record(workload, measurement, **facts): what goes into the results of the suite."""
    results = COLLECTED.setdefault(request.module.SUITE, {})

    def add(workload, measurement, **facts):
        results.setdefault(workload, {})[measurement] = origin | facts
        print(f"\n{workload}, {measurement}: {facts}")

    return add


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # no host names


def revision():
    """Of what is measured: the files that a measurement writes do not make it dirty."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in GENERATED))
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(suite):
    facts = info.collect()
    names = ("cpu", "instruction set", "threads", "torch", "numpy", "python", "system")
    package = SUITES[suite].package
    return {name: facts[name] for name in names} | {
        "fmkernels": fmkernels.__version__,
        "bfloat16": bfloat16(),
        package: importlib.metadata.version(package),
    }


def bfloat16():
    """What multiplies it here; on it depends which product a search takes."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if has_fast_bfloat16() else "no bfloat16 in hardware"


def merged(saved, facts, measured):
    """The saved results of this very machine, of which less may be known, with those of now."""
    same = saved and saved["machine"].items() <= facts.items()
    results = saved["results"] if same else {}
    for workload, measurements in measured.items():
        results[workload] = results.get(workload, {}) | measurements
    return {"machine": facts, "results": dict(sorted(results.items()))}


def pytest_terminal_summary(terminalreporter):
    for suite, results in COLLECTED.items():
        if results:
            shown = SUITES[suite].section({"machine": machine(suite), "results": results})
            terminalreporter.write_line("\n".join(shown))


def pytest_sessionfinish(session, exitstatus):
    folder = session.config.getoption("--save-results")
    for suite, results in COLLECTED.items():
        if folder and results:
            save(suite, results, folder)


def save(suite, results, folder):
    facts = machine(suite)
    words = f"{facts['cpu']} {facts['instruction set']}".lower()
    path = folder / f"{suite}-{re.sub(r'[^a-z0-9]+', '-', words).strip('-')}.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(merged(saved, facts, results), indent=1) + "\n")
    temporary.replace(path)
    print(f"\nwrote {path}")
