"""Registers, stack and memory of compiled GPU code, as cuobjdump reports them; no GPU needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Resources(NamedTuple):
    """Of one kernel on one architecture."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def resource_usage(path):
    """[(architecture, mangled kernel, Resources), …] of an object, a cubin or a library."""
    text = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found, architecture = [], None
    for line in text.splitlines():
        if named := re.match(r"arch = (\w+)", line):
            architecture = named[1]
        elif named := re.match(r" *Function (\S+):", line):
            kernel = named[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            resources = Resources(used["REG"], used["STACK"], used["LOCAL"], used["SHARED"])
            found.append((architecture, kernel, resources))
    return found
