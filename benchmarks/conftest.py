"""Collects and shows what the benchmarks measured; ``--save-results`` writes benchmarks/results.

A file is of one machine and one torch: ``results[workload][measurement]``, and every measurement
says of which revision and day it is. One that is taken again replaces the one before as a whole.
"""

import datetime
import json
import re
import subprocess
from pathlib import Path

import measure
import pytest
import report
import torch

import fmkernels
from fmkernels import info

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ("benchmarks/results", "docs/benchmarks", "docs/backends.md", "README.md")
COLLECTED = {}


def pytest_addoption(parser):
    parser.addoption(
        "--save-results",
        nargs="?",
        const=RESULTS,
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/sort-<machine>.json (default folder: benchmarks/results)",
    )


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(measure.THREADS)


@pytest.fixture(scope="session")
def origin():
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return {"revision": revision(), "date": today.isoformat()}


@pytest.fixture
def record(origin):
    """record(workload, measurement, **facts): what goes into the results."""

    def add(workload, measurement, **facts):
        COLLECTED.setdefault(workload, {})[measurement] = origin | facts
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


def machine():
    facts = info.collect()
    names = ("cpu", "instruction set", "threads", "torch", "numpy", "python", "system")
    return {name: facts[name] for name in names} | {"fmkernels": fmkernels.__version__}


def merged(saved, facts):
    """The saved results of this very machine with what was measured now."""
    results = saved["results"] if saved.get("machine") == facts else {}
    for workload, measurements in COLLECTED.items():
        results[workload] = results.get(workload, {}) | measurements
    return {"machine": facts, "results": dict(sorted(results.items()))}


def pytest_terminal_summary(terminalreporter):
    if COLLECTED:
        terminalreporter.write_line(report.section({"machine": machine(), "results": COLLECTED}))


def pytest_sessionfinish(session, exitstatus):
    folder = session.config.getoption("--save-results")
    if not (folder and COLLECTED):
        return
    facts = machine()
    words = f"{facts['cpu']} {facts['instruction set']}".lower()
    path = folder / f"sort-{re.sub(r'[^a-z0-9]+', '-', words).strip('-')}.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(merged(saved, facts), indent=1) + "\n")
    temporary.replace(path)
    print(f"\nwrote {path}")
