"""python peak.py MODULE WORKLOAD PROVIDER: one step's peak extra memory in bytes, on Linux."""

import importlib
import sys

import measure
import torch

from fmkernels._memory import peak_extra_bytes


def main() -> None:
    module, name, provider = sys.argv[1:]
    torch.set_num_threads(measure.THREADS)
    workload = importlib.import_module(module).WORKLOADS[name]
    workload.tiny().step(provider)()  # import and initialise everything
    print(peak_extra_bytes(workload.step(provider)))


main()
