"""Run as a program by every rank: rank 1 ends, or stops, while the others wait for it."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from fmkernels.api import PatchIndex, sharded_search


class Ending(PatchIndex):
    """Ends or stops the process when it is searched, after the ranks have agreed."""

    def _find(self, queries, k, progress=False):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    index = Ending(4) if rank == 1 else PatchIndex(4)
    index.add(torch.eye(4))
    began = time.monotonic()
    try:
        sharded_search(index, torch.eye(4), 2, timeout=3)
    except RuntimeError as error:
        print(f"{time.monotonic() - began:.1f} s: {error}", flush=True)
        dist.destroy_process_group()
        sys.exit(7)  # neither waits for the group's own timeout


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
