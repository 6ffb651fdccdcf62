"""The op tests again on every other instruction set that runs here, and without the extension."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmkernels import _library

ROOT = Path(__file__).parent.parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
NUMBERS = (  # what can depend on the lane
    "(parity and float32) or finite or bitwise or layout or stays or precision or masked_row or ties"
)
EVERYTHING_ELSE = (  # but for training and compiling, which take minutes
    "(layout or stays or masked_row or ties or empty or refus or torch_func or api) "
    "and not learns and not trains and not inductor"
)

pytestmark = pytest.mark.lane


def run(*arguments, **lane):
    # PYTHONSAFEPATH: test what is installed, not what lies in the current directory
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1", **lane},
        capture_output=True,
        text=True,
    )


def passes(selection, **lane):
    options = ("-q", "-m", "not lane and not gpu", "-p", "no:cacheprovider", "-k", selection)
    result = run("-m", "pytest", *options, "tests/ops", "tests/api", **lane)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_instruction_set(isa):
    if _library.native is None:
        pytest.skip(f"no compiled kernels: {_library.native_error}")
    if isa not in _library.native.cpu_isas():
        pytest.skip(f"this CPU or build has no {isa}")
    if isa == _library.native.cpu_isa():
        pytest.skip(f"{isa} is what all the other tests run on")
    show = "import fmkernels._library as library; print(library.native.cpu_isa())"
    assert run("-c", show, FMKERNELS_CPU_ISA=isa).stdout.strip() == isa
    passes(NUMBERS, FMKERNELS_CPU_ISA=isa)


def test_without_the_extension():
    show = "import fmkernels._library as library; print(library.native)"
    assert run("-c", show, FMKERNELS_NO_EXTENSION="1").stdout.strip() == "None"
    passes(EVERYTHING_ELSE, FMKERNELS_NO_EXTENSION="1")


def test_an_instruction_set_that_cannot_run_is_refused():
    if _library.native is None:
        pytest.skip(f"no compiled kernels: {_library.native_error}")
    result = run("-c", "import fmkernels", FMKERNELS_CPU_ISA="avx1024")
    assert result.returncode != 0
    choices = ", ".join(("auto", *_library.native.cpu_isas()))
    assert (
        f"FMKERNELS_CPU_ISA: expected one that runs on this machine ({choices}), got 'avx1024'"
        in result.stderr
    )


def test_a_backend_that_does_not_exist_is_refused():
    result = run("-c", "import fmkernels", FMKERNELS_BACKEND="nonsense")
    assert result.returncode != 0
    choices = "auto, cpp, triton, cuda, reference"
    assert f"FMKERNELS_BACKEND: expected one of {choices}, got 'nonsense'" in result.stderr
