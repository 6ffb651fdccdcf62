"""The Triton kernels in the interpreter, and the gate, on the newest Triton and on the oldest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLDEST = ROOT / ".peers" / "triton-3.6"
"""With the NumPy that its interpreter needs."""

pytestmark = pytest.mark.lane


NUMPY_WARNING = "ignore:Conversion of an array with ndim:DeprecationWarning"
"""Raised inside the interpreter of Triton 3.6."""


def passes(*arguments, **environment):
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", NUMPY_WARNING, *arguments)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def oldest():
    if not (OLDEST / "triton").exists():
        pytest.skip("needs Triton 3.6 in .peers/triton-3.6")
    show = "import triton; print(triton.__version__)"
    command = [sys.executable, "-P", "-c", show]
    environment = {**os.environ, "PYTHONPATH": str(OLDEST)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("3.6.")
    return {"PYTHONPATH": str(OLDEST)}


def test_interpreter():
    pytest.importorskip("triton")
    passes("tests/interpreter", TRITON_INTERPRET="1")


def test_interpreter_of_the_oldest():
    small = "not 22 and not 33 and not 49"  # sizes that take minutes
    passes("tests/interpreter", "-k", small, TRITON_INTERPRET="1", **oldest())


def test_gate_with_the_oldest():
    passes("tests/resources", **oldest())
