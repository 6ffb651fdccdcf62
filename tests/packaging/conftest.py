"""One build for all tests here: checkout -> sdist -> unpacked -> wheel -> installed in a folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (
    ".git",
    ".venv",
    ".peers",
    ".hypothesis",
    ".benchmarks",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "*_cache",
)

if not (ROOT / "setup.py").exists():
    collect_ignore_glob = ["test_*.py"]


class Built(NamedTuple):
    """A finished build."""

    tree: Path
    wheel: Path
    installed: Path
    log: str


def run(*command, cwd, env=None, check=True):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment() | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def clean_environment():
    """The caller's environment without what would steer Python or this package."""
    steering = ("FMKERNELS_", "PYTHON", "CXX", "NVCC")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering)}


def call_backend(hook, target, *, tree, env=None, check=True):
    """Calls setuptools' PEP 517 hook as pip does, without isolation and so without a network."""
    target.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    return run(sys.executable, "-c", code, target, cwd=tree, env=env, check=check)


def build_wheel(tree, target, env=None):
    log = call_backend("build_wheel", target / "dist", tree=tree, env=env).stdout
    (wheel,) = (target / "dist").glob("*.whl")
    installed = target / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--target", installed, wheel, cwd=target)
    return Built(tree, wheel, installed, log)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """Runs Python far from the checkout, on one installed folder or on the development install.

    ``-S`` leaves out the finder of the development install, which would lend the checkout's modules
    to an installation that lacks them.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run_python(*arguments, path=None, check=True, **env):
        env = {name: str(value) for name, value in env.items()}
        options = []
        if path is not None:
            options = ["-S"]
            folders = (path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
            env["PYTHONPATH"] = os.pathsep.join(map(str, folders))
        return run(sys.executable, *options, *arguments, cwd=elsewhere, env=env, check=check)

    return run_python


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Made in a copy, so that neither side sees what the other left behind."""
    work = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, work / "checkout", ignore=shutil.ignore_patterns(*NOT_COPIED))
    call_backend("build_sdist", work / "dist", tree=work / "checkout")
    (archive,) = (work / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def unpack(sdist, tmp_path_factory):
    """Unpacks the sdist into a new folder, as often as it is called."""

    def unpack():
        target = tmp_path_factory.mktemp("unpacked")
        with tarfile.open(sdist) as archive:
            if sys.version_info >= (3, 12):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(target)
        (tree,) = target.iterdir()
        return tree

    return unpack


@pytest.fixture(scope="session")
def built(unpack, tmp_path_factory):
    """The wheel with the extension; objects of the checkout that are current are reused."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    tree = unpack()
    if (ROOT / "build" / "objects").exists():
        shutil.copytree(ROOT / "build" / "objects", tree / "build" / "objects")
    return build_wheel(tree, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def pure(unpack, tmp_path_factory):
    """The wheel of a machine without a C++ compiler."""
    return build_wheel(unpack(), tmp_path_factory.mktemp("pure"), env={"PATH": os.devnull})
