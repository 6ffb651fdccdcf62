"""Compiles Triton kernels ahead of time, without a GPU, and reads what they need."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import triton
from resource_usage import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


def compiled(kernel, capability, launch):
    """The kernel that ``launch()`` would start, on CPU tensors; it is not started.

    Triton's launcher makes a constant of an integer that is 1, and tells the compiler which integers
    and addresses are multiples of 16. Its own functions do that here, so this is what would run.
    """
    with mock.patch.object(kernel, "run") as run:
        launch()
    ((arguments, named),) = run.call_args_list
    named = {name: value for name, value in named.items() if name not in ("grid", "warmup")}
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound = bind(*arguments, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, *bound)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(binary):
    """What a compiled kernel needs."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        ((_, _, used),) = resource_usage(cubin)
    return used._replace(shared_bytes=binary.metadata.shared)
