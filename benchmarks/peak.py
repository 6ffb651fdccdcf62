"""python peak.py MODULE WORKLOAD PROVIDER: one step's peak extra memory in bytes, on Linux."""

import importlib
import sys
from pathlib import Path

import torch


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def main() -> None:
    module, workload, provider = sys.argv[1:]
    torch.set_num_threads(2)
    bench = importlib.import_module(module)
    bench.WORKLOADS["warm-up"].step(provider)()  # import and initialise everything
    step = bench.WORKLOADS[workload].step(provider)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step()
    print(max(0, status("VmHWM") - before))


main()
