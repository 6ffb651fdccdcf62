"""Tests of what runs on a GPU; ``make gpu`` runs them and keeps the outcomes.

Without a GPU they are not collected, but for a dry run, which goes through them on the CPU (see
benchmarks/gpu/target.py).
"""

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from gpu.record import Record
from gpu.target import BACKENDS, DEVICE, DRY_RUN, prepare, synchronize

if not DRY_RUN and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--gpu-results", type=Path, metavar="FOLDER", help="write gpu-tests.json there"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    folder = config.getoption("--gpu-results", None)
    if folder is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Record(folder, "tests")))


class Outcomes:
    """Every test's outcome, and the kernels that it verifies, as (op, backend)."""

    def __init__(self, record):
        self.record = record
        self.collected = set()

    def pytest_collection_finish(self, session):
        self.collected |= {item.nodeid for item in session.items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.collected |= set(ids)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            verifies = [pair for name, pair in report.user_properties if name == "verifies"]
            name = name_of(report.nodeid)
            # a process that died does not say what it was about
            verifies = verifies or self.record.results.get(name, {}).get("verifies", [])
            facts = {"outcome": report.outcome, "verifies": verifies}
            if report.failed:
                facts["why"] = report.longreprtext[-600:]
            self.record.results[name] = facts
            self.record.write()

    def pytest_sessionfinish(self, exitstatus):
        """It has come to its end if every test has an outcome, whatever stopped it."""
        if exitstatus in (0, 1) and {*map(name_of, self.collected)} == self.record.results.keys():
            self.record.finish()


def name_of(nodeid):
    return nodeid.rpartition("gpu/")[2]


@pytest.fixture(autouse=True)
def prepared():
    prepare()
    yield
    try:
        synchronize()
    except RuntimeError:  # after an illegal access every later call of this process fails
        os._exit(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def verifies(record_property, backend):
    """verifies("soft_sort", …): if the test passes, these kernels have run and were right."""

    def verifies(*ops):
        for op in ops:
            record_property("verifies", (op, backend))

    return verifies


@pytest.fixture
def alone(tmp_path_factory):
    """While it runs, no other test of its kind does: each takes a good part of the memory."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "large.lock"):
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def device():
    return DEVICE
