"""The build: pure Python where it must be, loud where it fails, quick where little changed."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def build_script(root):
    """The functions of setup.py, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(root / "setup.py"))


def test_no_compiler_gives_a_pure_wheel_and_one_clear_line(pure):
    assert pure.wheel.name.endswith("-py3-none-any.whl")
    assert not list(pure.installed.rglob("*.so"))
    lines = [line for line in pure.log.splitlines() if line.startswith("fmkernels:")]
    assert set(lines) == {
        "fmkernels: installing without compiled kernels: "
        "no C++ compiler ('g++' not found) when it was installed"
    }


def test_pure_install_works_and_info_says_why(pure, run_python):
    code = (
        "import torch, fmkernels.api as api, fmkernels.cli as cli\n"
        "assert api.DiffSortNet('bitonic', 4)(torch.rand(2, 4))[1].shape == (2, 4, 4)\n"
        "raise SystemExit(cli.main(['info']))"
    )
    report = run_python("-c", code, path=pure.installed).stdout
    assert "none: no C++ compiler ('g++' not found) when it was installed" in report
    assert "cpp         no: no C++ compiler ('g++' not found)" in report
    assert "cuda        no: no C++ compiler ('g++' not found)" in report
    assert "reference   yes" in report


def test_reasons_for_a_pure_build(build_script, monkeypatch):
    why = build_script["why_pure_python"]
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert why() == "no C++ compiler ('no-such-compiler' not found) when it was installed"
    monkeypatch.setenv("CXX", shutil.which("false"))
    assert "did not run" in why()
    monkeypatch.setenv("CXX", f"{shutil.which('env')} true")
    assert why() is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert re.match("torch .* at build time .*--no-build-isolation", why())


def test_reasons_for_a_build_without_cuda(build_script, monkeypatch):
    why = build_script["why_no_cuda"]
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    assert why() == "no CUDA compiler ('no-such-nvcc' not found) when it was installed"
    monkeypatch.setenv("NVCC", "true")  # knows no architecture
    assert why().startswith("the CUDA compiler does not know sm_80, sm_90a")


@needs_compiler
def test_an_error_in_the_sources_fails_the_build(root, tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (root / name).exists():
            shutil.copy(root / name, tmp_path)
    for name in ("fmkernels", "python_api"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(root / name, tmp_path / name, ignore=ignore)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "broken.cpp").write_text("int broken( { return 0; }\n")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "broken.cpp:1" in failed.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_only_what_changed_is_compiled(build_script, tmp_path):
    header, source, target = (tmp_path / name for name in ("a.h", "a.cpp", "a.o"))
    header.write_text("inline int one() { return 1; }\n")
    source.write_text('#include "a.h"\nint two() { return one() + 1; }\n')
    command = ["g++", "-c", str(source), "-o", str(target), "-MD", "-MF", str(tmp_path / "a.d")]
    is_current = build_script["is_current"]
    assert not is_current(target, command)
    subprocess.run(command, check=True)
    target.with_suffix(".cmd").write_text(" ".join(command))
    assert is_current(target, command)
    assert not is_current(target, [*command, "-O3"])
    later = target.stat().st_mtime + 1
    os.utime(header, (later, later))
    assert not is_current(target, command)


def test_every_kernel_is_compiled_once_per_instruction_set(build_script):
    targets = [target.name for _, target, _ in build_script["compile_jobs"]()]
    assert len(targets) == len(set(targets))
    for isa in build_script["INSTRUCTION_SETS"]:
        assert f"soft_sort_kernel.{isa}.o" in targets


def test_flags_keep_the_meaning_of_nan_and_the_wheel_portable(build_script):
    flags = {*build_script["COMMON"], *build_script["KERNEL"]}
    flags |= {flag for job in build_script["compile_jobs"]() for flag in job[2]}
    assert not {"-ffast-math", "-ffinite-math-only", "-march=native", "-Ofast"} & flags
