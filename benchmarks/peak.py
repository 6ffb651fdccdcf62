"""python peak.py WORKLOAD PROVIDER: one step's peak extra memory in bytes, on Linux."""

import sys

import measure
import torch
from workloads import WORKLOADS

from fmkernels._memory import peak_extra_bytes


def main() -> None:
    name, provider = sys.argv[1:]
    torch.set_num_threads(measure.THREADS)
    workload = WORKLOADS[name]
    workload.tiny().step(provider)()  # import and initialise everything
    print(peak_extra_bytes(workload.step(provider)))


main()
