"""Compiles Triton kernels ahead of time, without a GPU, and reads what they need."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Resources(NamedTuple):
    """Of one kernel on one architecture, as cuobjdump reports them."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


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
    """What ``cuobjdump --dump-resource-usage`` says of a compiled kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], binary.metadata.shared)
