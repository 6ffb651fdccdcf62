"""Compiles Triton kernels ahead of time, without a GPU, and reads what they need."""

from __future__ import annotations

import tempfile
from pathlib import Path

import triton
from resource_usage import resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(kernel, capability, arguments, **options):
    """The compiled kernel; arguments: name -> Triton type, or the value of a constexpr.

    Triton also makes a constant of an integer argument that is 1 at the call: here, too.
    """
    signature, constants = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = arguments[name]
        constant = kernel.params[index].is_constexpr or kind == 1
        signature[name] = "constexpr" if constant else kind
        if constant:
            constants[(index,)] = kind
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def resources(binary):
    """What a compiled kernel needs."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        ((_, _, used),) = resource_usage(cubin)
    return used._replace(shared_bytes=binary.metadata.shared)
