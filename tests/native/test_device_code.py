"""The header-only numerics compile as device code, where there is a CUDA compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_the_numerics_are_device_code(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    include = HERE.parent.parent / "csrc" / "include"
    options = ("-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", f"-I{include}")
    result = subprocess.run(
        [nvcc, *options, "-c", HERE / "header.cu", "-o", tmp_path / "header.o"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
