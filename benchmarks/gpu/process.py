"""A program that ends in time, with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO


def run(
    command: Sequence[str],
    limit_s: float,
    environment: Mapping[str, str],
    output: IO[str] | None = None,
) -> int | None:
    """The exit code, or None if it was stopped after ``limit_s`` seconds.

    It runs in a session of its own, all of which is killed: at the limit, and whenever this process
    is interrupted, because what went on would take the GPU from whoever comes next.
    """
    stream = {} if output is None else {"stdout": output, "stderr": subprocess.STDOUT}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **stream)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
