"""What the binary takes from torch, and that no instruction set's code can leak into another's."""

import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("nm") and shutil.which("objdump")),
    reason="needs nm and objdump on Linux",
)

VERSIONED_BY_THE_SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
STABLE = re.compile(r"^(aoti_torch_|torch_|_?Py)")
UNSTABLE = re.compile(r"\b(at|c10|caffe2)::|\btorch::(?!stable\b|headeronly\b)")
X86 = ("avx2", "avx512")


def tool(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(path, *options):
    """(kind, name) of every symbol, demangled."""
    for line in tool("nm", "--demangle", *options, str(path)).splitlines():
        kind, name = line[16:].strip().split(" ", 1)
        yield kind, name


@pytest.fixture(scope="module")
def extension(built):
    return built.installed / "fmkernels" / "_C.abi3.so"


@pytest.fixture(scope="module")
def cuda_library(built):
    path = built.installed / "fmkernels" / "_cuda.abi3.so"
    if not path.exists():
        pytest.skip("built without nvcc")
    return path


def test_the_cuda_library_needs_only_python_and_the_system(cuda_library):
    needed = [name for kind, name in symbols(cuda_library, "-D") if kind == "U"]
    system = [name for name in needed if VERSIONED_BY_THE_SYSTEM.search(name)]
    assert all(re.match(r"_?Py", name) for name in set(needed) - set(system))
    dynamic = tool("objdump", "-p", str(cuda_library))
    assert not re.search(r"NEEDED\s+lib(python|torch|c10|cuda)", dynamic)
    assert not re.search(r"R(UN)?PATH", dynamic)


def test_the_cuda_library_exports_one_function(cuda_library):
    exported = [name for kind, name in symbols(cuda_library, "-D") if kind in "TDB"]
    assert [name for name in exported if name[:1] != "_"] == ["PyInit__cuda"]


def test_the_cuda_library_loads_without_a_gpu(built, cuda_library, run_python):
    code = "from fmkernels import _cuda; print(len(_cuda.plan('bitonic', 49)))"
    assert int(run_python("-c", code, path=built.installed).stdout.split()[-1]) > 4 * 483


@pytest.fixture(scope="module")
def objects(built):
    found = sorted(
        path
        for path in (built.tree / "build" / "objects").glob("*.o")
        if not path.name.startswith("cuda_")
    )
    assert found
    return found


def test_nothing_of_the_unstable_interface(extension):
    offending = [name for _, name in symbols(extension, "-D") if UNSTABLE.search(name)]
    assert not offending


def test_only_the_stable_interface_is_needed(extension):
    needed = [name for kind, name in symbols(extension, "-D") if kind == "U"]
    offending = [
        name
        for name in needed
        if not STABLE.match(name) and not VERSIONED_BY_THE_SYSTEM.search(name)
    ]
    assert not offending
    assert any(name.startswith(("torch_", "aoti_torch_")) for name in needed)


def test_no_python_version_and_no_folder_of_the_builder_is_linked(extension):
    dynamic = tool("objdump", "-p", str(extension))
    assert not re.search(r"NEEDED\s+lib(python|torch_python)", dynamic)
    assert not re.search(r"R(UN)?PATH", dynamic)


def test_one_function_is_exported_by_us(extension):
    ours = [name for kind, name in symbols(extension, "-D") if kind in "TDB" and name[:1] != "_"]
    assert ours == ["PyInit__C"]


def test_instruction_sets_share_no_symbol(objects):
    """The linker keeps one copy of an inline function; the AVX-512 one would crash an older CPU."""
    kernels = [path for path in objects if "_kernel." in path.name]
    assert kernels
    for path in kernels:
        isa = path.name.split(".")[1]
        for kind, name in symbols(path, "--extern-only", "--defined-only"):
            assert f"fmkernels::{isa}::" in name, f"{path.name} defines {kind} {name}"


def test_wide_registers_only_where_they_were_asked_for(objects):
    if not any(f".{isa}.o" in path.name for path in objects for isa in X86):
        pytest.skip("not an x86 build")
    for path in objects:
        code = tool("objdump", "--disassemble", "--no-show-raw-insn", str(path))
        wide, wider = "%ymm" in code, "%zmm" in code
        isa = path.name.split(".")[1] if "_kernel." in path.name else "plain"
        assert wider == (isa == "avx512"), path.name
        assert not wide or isa in X86, path.name
        assert wide or isa != "avx2", path.name
