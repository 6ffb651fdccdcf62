"""Neither gradients nor random matrices are in memory, in the kernel nor in the reference."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import KINDS, pair, projections
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels import _library
from fmkernels.ops.project_gradients import reference

ROOT = Path(__file__).parent.parent.parent


PEAK = """
import ctypes
import torch, fmkernels
from fmkernels._memory import peak_extra_bytes

torch.set_num_threads(2)

def peak(kind, out, into, dim, samples):
    if kind == "from_matrix":
        matrix = torch.ones(dim, out * (into + 1), dtype=torch.int8)
        projection = fmkernels.Rademacher.from_matrix(matrix, out, into)
    else:
        projection = getattr(fmkernels, kind)(out, into, dim)
    delta, a = torch.randn(samples, out), torch.randn(samples, into)
    small = delta[:1], a[:1]
    fmkernels.project_gradients(*small, projection)
    ctypes.CDLL(None).malloc_trim(0)  # what is free counts as used until then
    return peak_extra_bytes(lambda: fmkernels.project_gradients(delta, a, projection))

fmkernels.project_gradients(torch.randn(1, 8), torch.randn(1, 8), fmkernels.CountSketch(8, 8, 8))
for kind in ("CountSketch", "Rademacher", "from_matrix", "KhatriRao", "Kronecker"):
    sizes = (64, 64, 64, 64), (512, 512, 512, 64), (512, 512, 512, 512)
    print(kind, *(peak(kind, *size) for size in sizes))
"""


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc, trims the heap")
def test_neither_gradients_nor_matrices_are_in_memory():
    """One gradient would take 1.05 MB, the matrix 538 MB."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 5
    for kind, *peaks in lines:
        small, large, many = map(int, peaks)
        # rows of two groups, 115 kB more of the result, and pages that were not touched before
        assert large - small < 0.5e6, (kind, small, large)
        assert many - large < 0.25e6 + 448 * 512 * 4, (kind, large, many)  # which the result takes


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, (tuple, list)) else [found]
        sizes = [
            x.untyped_storage().nbytes() // x.itemsize for x in made if isinstance(x, torch.Tensor)
        ]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_the_reference_have_them_in_memory(kind, monkeypatch):
    """One gradient has 10,100 numbers, the matrix 161,600; a given one is packed."""
    monkeypatch.setattr(reference, "TILE", 2**10)
    projection = projections(100, 100, 16)[kind]
    for samples, rows in ((8, 1), (2, 4)):
        delta, a = pair(samples * rows, None, 100, 100)
        with Largest() as largest:
            reference.project_gradients(delta, a, None, rows, *projection.settings())
        assert largest.numbers <= 4 * 2**10
