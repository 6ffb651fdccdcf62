"""Collects what the benchmarks measured; ``--save-results`` writes it to benchmarks/results."""

import json
import re
from pathlib import Path

import pytest
import torch

import fmkernels
from fmkernels import info

RESULTS = Path(__file__).parent / "results"
COLLECTED = {}


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/*.json")


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def record(request):
    """record(name, **facts): what goes into the results under this name."""

    def add(name, **facts):
        COLLECTED.setdefault(name, {}).update(facts)
        print(f"\n{name}: {facts}")

    return add


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # no host names


def machine():
    facts = info.collect()
    names = ("cpu", "instruction set", "threads", "torch", "numpy", "python", "system")
    return {name: facts[name] for name in names} | {"fmkernels": fmkernels.__version__}


def pytest_sessionfinish(session, exitstatus):
    if not (session.config.getoption("--save-results") and COLLECTED):
        return
    facts = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {facts['instruction set']}".lower()).strip(
        "-"
    )
    path = RESULTS / f"sort-{slug}.json"
    saved = json.loads(path.read_text())["results"] if path.exists() else {}
    RESULTS.mkdir(exist_ok=True)
    for name, measured in COLLECTED.items():
        saved[name] = saved.get(name, {}) | measured
    content = {"machine": facts, "results": dict(sorted(saved.items()))}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    print(f"\nwrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
