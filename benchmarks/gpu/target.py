"""The device that is tested and measured: a GPU or, in a dry run, the CPU in its place.

In a dry run the Triton kernels take CPU tensors, in Triton's interpreter, and there is no CUDA
kernel. Whatever needs the device itself is left out.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

import fmkernels
from fmkernels import _library

DRY_RUN = os.environ.get("FMKERNELS_GPU_DRY_RUN", "0") not in ("", "0")

DEVICE = torch.device("cpu" if DRY_RUN else "cuda", None if DRY_RUN else 0)

DRY_RUN_ENVIRONMENT = {
    "FMKERNELS_GPU_DRY_RUN": "1",
    "FMKERNELS_NO_EXTENSION": "1",
    "TRITON_INTERPRET": "1",
}
"""Of the processes of a dry run: without the extension no other kernel takes CPU tensors."""

BACKENDS = ("triton",) if DRY_RUN else ("cuda", "triton")


def prepare() -> None:
    """Once per process: float32 products in float32; in a dry run, kernels for CPU tensors."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if DRY_RUN and not _prepared:
        torch.cuda.device = lambda _: contextlib.nullcontext()
        for name, op in _library.OPS.items():
            if op.gpu:
                _library.LIBRARY.impl(name, op._run_gpu, "CPU")
    _prepared.append(True)


_prepared: list[bool] = []


def running(backend: str) -> AbstractContextManager[Any]:
    """``fmkernels.backend``; a dry run has but one that is not the reference."""
    return fmkernels.backend("auto" if DRY_RUN and backend != "reference" else backend)


def synchronize() -> None:
    if not DRY_RUN:
        torch.cuda.synchronize()
