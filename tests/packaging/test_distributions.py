"""What is in the wheel and the sdist, and that an installed wheel works without the checkout."""

import json
import platform
import shutil
import sysconfig
import tarfile
import zipfile
from pathlib import PurePosixPath

import pytest

SOURCE_FOLDERS = ("csrc", "fmkernels", "python_api", "tests", "benchmarks", "examples", "docs")
SOURCE_SUFFIXES = {".cpp", ".cu", ".h", ".ini", ".json", ".md", ".png", ".py", ".typed"}
TOP_LEVEL = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "Makefile",
    "requirements-dev.txt",
    ".ci/run",
    "README.md",
    "LICENSE",
    "NOTICE",
    "CITATION.cff",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]

EVERYTHING = """
import json, sys
import torch
import fmkernels, fmkernels.api
from fmkernels import info
scores = torch.linspace(1, -1, 9).requires_grad_()
values, permutation = fmkernels.soft_sort(scores, steepness=100.0)
(values * torch.arange(9)).sum().backward()
print(json.dumps({
    "file": fmkernels.__file__,
    "api": fmkernels.api.__file__,
    "sorted": bool((values.diff() > 0).all()),
    "gradient": bool(scores.grad.isfinite().all() and scores.grad.abs().sum() > 0),
    "module": list(fmkernels.api.DiffSortNet("odd_even", 4)(torch.rand(2, 4))[0].shape),
    "info": info.collect(),
}))
"""


def last_json(done):
    return json.loads(done.stdout.splitlines()[-1])


def contents(wheel):
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    metadata = {name for name in names if name.parts[0].endswith(".dist-info")}
    return {str(name) for name in names - metadata}, {name.name for name in metadata}


def expected_files(root):
    """Every module of both packages under its installed name."""
    for source, installed in (("fmkernels", "fmkernels"), ("python_api", "fmkernels/api")):
        for path in (root / source).rglob("*"):
            module = path.suffix == ".py" or path.name == "py.typed"
            if (module and path.name != "_build_info.py") or path.parent.name == "configs":
                yield f"{installed}/{path.relative_to(root / source).as_posix()}"


def test_sdist_has_every_source_and_nothing_built(sdist, root):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name for name in TOP_LEVEL if (root / name).exists()}
    for folder in SOURCE_FOLDERS:
        for path in (root / folder).rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.suffix in SOURCE_SUFFIXES and not hidden:
                expected.add(path.relative_to(root).as_posix())
    expected.discard("fmkernels/_build_info.py")
    assert not expected - names
    assert not {name for name in names if name.endswith((".so", ".o", ".pyc", "_build_info.py"))}


def test_wheel_has_the_packages_and_nothing_else(built, root):
    files, metadata = contents(built.wheel)
    binaries = {"fmkernels/_C.abi3.so"}
    if shutil.which("nvcc") is not None:
        binaries.add("fmkernels/_cuda.abi3.so")
    assert files - {"fmkernels/_build_info.py"} == {*expected_files(root), *binaries}
    assert {"METADATA", "LICENSE", "NOTICE", "entry_points.txt"} <= metadata


def test_wheel_serves_every_python_of_this_platform(built):
    platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert built.wheel.name.endswith(f"-cp310-abi3-{platform_tag}.whl")


def test_wheel_holds_no_path_of_the_machine_that_built_it(built):
    binary = (built.installed / "fmkernels" / "_C.abi3.so").read_bytes()
    assert str(built.tree).encode() not in binary


def test_installed_wheel_works_anywhere(built, run_python):
    facts = last_json(run_python("-c", EVERYTHING, path=built.installed))
    assert facts["file"] == str(built.installed / "fmkernels" / "__init__.py")
    assert facts["api"] == str(built.installed / "fmkernels" / "api" / "__init__.py")
    assert facts["sorted"]
    assert facts["gradient"]
    assert facts["module"] == [2, 4]
    assert facts["info"]["extension"] == "loaded"
    assert facts["info"]["instruction set"] in facts["info"]["instruction sets"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert facts["info"]["instruction sets"][0] == "baseline"


def test_every_function_works_without_the_extension(built, run_python):
    done = run_python("-c", EVERYTHING, path=built.installed, FMKERNELS_NO_EXTENSION=1)
    facts = last_json(done)
    assert facts["sorted"]
    assert facts["gradient"]
    assert facts["info"]["extension"] == "none: switched off by FMKERNELS_NO_EXTENSION"


def test_development_install_imports_from_any_directory(run_python):
    code = "import fmkernels.api; print(fmkernels.__version__, fmkernels.api.DiffSortNet.__name__)"
    assert run_python("-c", code).stdout.split()[-1] == "DiffSortNet"


def test_benchmarks_of_a_wheel_say_where_they_are(built, run_python):
    done = run_python("-m", "fmkernels", "bench", "--list", path=built.installed, check=False)
    assert done.returncode == 1
    assert "source checkout" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--no-such-flag"]])
def test_wrong_calls_exit_with_2(arguments, capsys):
    from fmkernels import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m fmkernels" in capsys.readouterr().err
