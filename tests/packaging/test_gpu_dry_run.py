"""``make gpu`` on a machine without a GPU: from the wheel, everything but the numbers."""

import json
import os
import subprocess
import sys

import pytest

from fmkernels import _library

SUITES = ("tests", "sanitizer", "sort", "knn", "project_gradients", "vera", "tune")
"""``compiled`` is a peer alone, and takes as long as the others together."""


@pytest.fixture(scope="module")
def results(built, root, tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("gpu")
    steering = ("FMKERNELS_", "PYTHON", "PYTEST")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    done = subprocess.run(
        [sys.executable, "-m", "gpu", *SUITES, "--dry-run", "--out", folder],
        cwd=root / "benchmarks",
        env=inherited | {"PYTHONPATH": str(built.installed)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for name in SUITES:
        assert f"{name:<18}finished" in done.stdout
    return {name: json.loads((folder / f"gpu-{name}.json").read_text()) for name in SUITES}


def test_every_suite_leaves_a_small_marked_result(results):
    for content in results.values():
        assert content["dry_run"]
        assert content["finished"]
        assert len(json.dumps(content)) < 200_000


def test_every_op_with_a_triton_kernel_is_tested(results):
    tests = results["tests"]["results"].values()
    assert not [test for test in tests if test["outcome"] == "failed"]
    passed = {
        tuple(pair) for test in tests if test["outcome"] == "passed" for pair in test["verifies"]
    }
    assert passed == {(name, "triton") for name, op in _library.OPS.items() if op.gpu_kernels}


def test_every_workload_and_launch_has_a_time(results):
    for found in results["sort"]["results"].values():
        assert all("ms" in found[who] for who in ("triton", "reference", "diffsort"))
    for times in results["tune"]["results"]["triton"].values():
        assert all("ms" in launch for launch in times)
    assert results["sanitizer"]["results"]["triton"]["without"]["outcome"] == "clean"
