"""python peak.py MODULE WORKLOAD PROVIDER: one step's peak extra memory in bytes, on Linux."""

import importlib
import sys
from pathlib import Path

import measure
import torch


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def main() -> None:
    module, name, provider = sys.argv[1:]
    torch.set_num_threads(measure.THREADS)
    workload = importlib.import_module(module).WORKLOADS[name]
    workload.tiny().step(provider)()  # import and initialise everything
    step = workload.step(provider)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step()
    print(max(0, status("VmHWM") - before))


main()
