"""python -m gpu.compiled FOLDER: diffsort under torch.compile, which takes minutes to compile."""

from __future__ import annotations

import sys
from pathlib import Path

from gpu.record import Record
from gpu.sort import WORKLOADS, attempt, peer
from gpu.target import DRY_RUN, prepare


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "compiled")
    for name in ("neco-step",):
        workload = WORKLOADS[name].tiny() if DRY_RUN else WORKLOADS[name]
        record.results[name] = {"diffsort-compiled": attempt(peer, workload, "diffsort-compiled")}
    record.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
