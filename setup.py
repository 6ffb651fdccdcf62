"""The whole build: csrc/cpu into _C.abi3.so, csrc/cuda into _cuda.abi3.so; or pure Python.

``*_kernel.cpp`` is compiled once per instruction set; the best one that the CPU can run is chosen
when the extension is loaded. LibTorch's stable ABI and CPython's limited API make one wheel serve
every torch >= 2.10 and Python >= 3.10. Without a C++ compiler or without torch the build goes on
without the extension, says so, and leaves the reason where ``python -m fmkernels info`` finds it;
without nvcc, likewise, without the CUDA kernels. Those know nothing of torch, only addresses.
"""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OBJECTS = Path("build", "objects")  # every kind of build shares it: editable, in place, wheel
X86 = platform.machine().lower() in ("x86_64", "amd64")

DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# no -ffast-math: NaN, Inf and signed zeros keep their meaning
KERNEL = [
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]
INSTRUCTION_SETS = {"baseline": []}
if X86:
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mfma", *AVX512]}
else:
    DEFINES.append("-DFMKERNELS_ONLY_BASELINE")

CUDA = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
CUDA += ["-Werror", "all-warnings"]
GPUS = ("80", "90a", "100", "120")
"""With machine code: A100, H100 and H200, B200, RTX 50; PTX for what follows."""
CUDA += [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
CUDA += [f"-gencode=arch=compute_{GPUS[-1]},code=compute_{GPUS[-1]}"]


def why_pure_python():
    """The reason why the extension cannot be built here, or None."""
    command = compiler()
    if shutil.which(command[0]) is None:
        return f"no C++ compiler ({command[0]!r} not found) when it was installed"
    if subprocess.run([*command, "--version"], capture_output=True).returncode != 0:
        return f"the C++ compiler {shlex.join(command)!r} did not run when it was installed"
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return "torch did not import at build time (install it first, then --no-build-isolation)"
    return None


def why_no_cuda():
    """The reason why the CUDA kernels cannot be built here, or None."""
    nvcc = cuda_compiler()
    if shutil.which(nvcc) is None:
        return f"no CUDA compiler ({nvcc!r} not found) when it was installed"
    help_text = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = help_text.split()  # without the architecture-specific ones, such as sm_90a
    missing = [gpu for gpu in GPUS if f"sm_{gpu.rstrip('a')}" not in known]
    if missing:
        return f"the CUDA compiler does not know sm_{', sm_'.join(missing)} (13.0 does)"
    return None


def revision():
    """Of the sources, so that a result of the installed package says what it is a result of."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    only_here = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    try:
        told = subprocess.run(
            command, cwd=ROOT, env=only_here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


def cuda_compiler():
    """The CUDA compiler."""
    return os.environ.get("NVCC", "nvcc")


def compiler():
    """The C++ compiler's command line, such as ``["ccache", "g++"]``."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def compile_jobs():
    """(source, object, flags) for every object of the CPU; paths are relative to ROOT."""
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        source = path.relative_to(ROOT)
        if source.stem.endswith("_kernel"):
            for isa, flags in INSTRUCTION_SETS.items():
                target = OBJECTS / f"{source.stem}.{isa}.o"
                yield source, target, [*KERNEL, f"-DFMKERNELS_ISA={isa}", *flags]
        else:
            yield source, OBJECTS / f"{source.stem}.o", ["-O2"]


def is_current(target, command):
    """Whether the object is newer than everything it was made from, by the same command."""
    target = ROOT / target
    record, depends = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and depends.exists() and record.exists()):
        return False
    if record.read_text() != " ".join(command):
        return False
    made_from = [ROOT / word for word in depends.read_text().replace("\\\n", " ").split()[1:]]
    made = target.stat().st_mtime
    return all(path.exists() and path.stat().st_mtime <= made for path in made_from)


class BuildExtension(build_ext):
    """Compiles the objects in parallel, only those that are out of date, and links them."""

    def run(self):
        record = ROOT / "fmkernels" / "_build_info.py"
        reason = why_pure_python()
        cuda_reason = reason or why_no_cuda()
        facts = {"reason": reason, "cuda_reason": cuda_reason, "revision": revision()}
        facts["sources"] = runpy.run_path(str(ROOT / "fmkernels" / "_sources.py"))["digest"](ROOT)
        lines = ['"""Written by the build."""', ""]
        lines += [f"{name} = {value!r}" for name, value in facts.items()]
        record.write_text("\n".join(lines) + "\n")
        if reason is not None:
            print(f"fmkernels: installing without compiled kernels: {reason}", file=sys.stderr)
            self.extensions = []
        elif cuda_reason is not None:
            print(f"fmkernels: installing without CUDA kernels: {cuda_reason}", file=sys.stderr)
            self.extensions = [ext for ext in self.extensions if ext.name != "fmkernels._cuda"]
        super().run()

    def build_extension(self, ext):
        (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == "fmkernels._cuda":
            self.build_cuda(output)
        else:
            self.build_cpu(output)

    @staticmethod
    def compile(source, target, command):
        """Compile one file, unless its object is current; the object's path."""
        command = [*command, "-MD", "-MF", str(target.with_suffix(".d"))]
        command += ["-c", str(source), "-o", str(target)]
        if not is_current(target, command):
            print("fmkernels: compiling", target.name, flush=True)
            record = (ROOT / target).with_suffix(".cmd")
            record.unlink(missing_ok=True)
            subprocess.run(command, check=True, cwd=ROOT)
            record.write_text(" ".join(command))
        return str(ROOT / target)

    def build_cuda(self, output):
        includes = ["-Icsrc/include", "-Icsrc/cuda", f"-I{sysconfig.get_paths()['include']}"]
        command = [cuda_compiler(), *CUDA, *includes]
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.c*"))
        linked = [
            self.compile(path.relative_to(ROOT), OBJECTS / f"cuda_{path.stem}.o", command)
            for path in sources
        ]
        link = [cuda_compiler(), "-shared", "-cudart=static", *linked, "-Xlinker", "-s"]
        subprocess.run([*link, "-o", str(output)], check=True)

    def build_cpu(self, output):
        from torch.utils import cpp_extension

        includes = [Path("csrc", "include"), Path("csrc", "cpu")]
        system = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        include_flags = [f"-I{path}" for path in includes] + [f"-isystem{path}" for path in system]

        def compile_one(job):
            source, target, flags = job
            command = [*compiler(), *COMMON, *DEFINES, *flags, *include_flags]
            return self.compile(source, target, command)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            linked = list(pool.map(compile_one, compile_jobs()))
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-ltorch", "-ltorch_cpu"]
        link = [*compiler(), "-shared", *linked, *libraries, "-Wl,--as-needed", "-Wl,-s"]
        if sys.platform == "darwin":
            link = [*compiler(), "-shared", *linked, *libraries, "-undefined", "dynamic_lookup"]
        subprocess.run([*link, "-o", str(output)], check=True)


class Wheel(bdist_wheel):
    """cp310-abi3 with the extension, py3-none-any without."""

    def finalize_options(self):
        if why_pure_python() is None:
            self.py_limited_api = "cp310"
        else:
            self.distribution.has_ext_modules = lambda: False
            self.distribution.ext_modules = []
            BuildExtension(self.distribution).run()
        super().finalize_options()


setup(
    ext_modules=[
        Extension("fmkernels._C", sources=[], py_limited_api=True),
        Extension("fmkernels._cuda", sources=[], py_limited_api=True),
    ],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
