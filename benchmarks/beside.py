"""python beside.py WORKLOAD PEER [OURS]: how many times faster than the peer, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import measure
import parity
import torch
from workloads import WORKLOADS


def beside(
    name: str, peer: str, ours: str = "fmkernels", pairs: int | None = None
) -> dict[str, Any]:
    """Parity, then the ratio."""
    workload = WORKLOADS[name]
    found = parity.check(workload, peer, ours=ours)
    steps = {who: workload.step(who) for who in (peer, ours)}
    return measure.ratio(pairs=pairs, **steps) | found


def in_a_process(
    name: str, peer: str, limit_s: float = 600, ours: str = "fmkernels", **environment: str
) -> dict[str, Any]:
    """The same in a process of its own: for what is read at start-up, or may take for ever.

    Raises:
        subprocess.TimeoutExpired: after ``limit_s`` seconds.
    """
    output = subprocess.run(
        [sys.executable, __file__, name, peer, ours],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=limit_s,
    ).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(measure.THREADS)
    print(json.dumps(beside(*sys.argv[1:])))
