"""Builds ``fmkernels_native``: the header-only numerics, compiled by g++ through ninja."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import ninja
import pybind11
import pytest
from filelock import FileLock
from ninja import ninja_syntax

from fmkernels import _library

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
REGISTER_BYTES = {"scalar": 0, "bytes16": 16, "bytes32": 32, "bytes64": 64}
# the flags of setup.py, at an optimisation level that compiles in a third of the time
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-O1", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wno-psabi", "-Wno-unused-function"]


def write_build(path, compiler, output):
    includes = [
        CSRC / "include",
        CSRC / "cpu",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    flags = [*FLAGS, *(f"-I{folder}" for folder in includes)]
    if _library.native is not None and "avx2" in _library.native.cpu_isas():
        flags += ["-mavx2", "-mfma"]
    with path.open("w") as file:
        build = ninja_syntax.Writer(file)
        build.rule(
            "compile",
            f"{compiler} {' '.join(flags)} $define -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compiling $out",
        )
        build.rule("link", f"{compiler} -shared $in -o $out", description="linking $out")
        objects = ["module.o", "block.o"]
        for name in objects:
            build.build(name, "compile", str(HERE / name.replace(".o", ".cpp")))
        for name, register_bytes in REGISTER_BYTES.items():
            define = f"-DFMKERNELS_ISA={name} -DREGISTER_BYTES={register_bytes}"
            for source, target in (("lanes.cpp", f"{name}.o"), ("philox.cpp", f"philox_{name}.o")):
                objects.append(target)
                build.build(target, "compile", str(HERE / source), variables={"define": define})
        build.build(output, "link", objects)


@pytest.fixture(scope="session")
def native(request):
    """The module, built into pytest's cache; ninja makes a second run quick."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler; {compiler!r} was not found")
    folder = request.config.cache.mkdir("native")
    output = "fmkernels_native" + sysconfig.get_config_var("EXT_SUFFIX")
    program = Path(ninja.BIN_DIR) / "ninja"
    with FileLock(folder / "lock"):  # pytest may run in several processes
        write_build(folder / "build.ninja", compiler, output)
        built = subprocess.run([program, "-C", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    spec = importlib.util.spec_from_file_location("fmkernels_native", folder / output)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=list(REGISTER_BYTES.values()), ids=list(REGISTER_BYTES))
def register_bytes(request):
    return request.param
