"""Segment scenes of digits by retrieval: by bank size, as pictures, before and after NeCo.

The parts are in fmkernels/demo: scenes.py makes the data, in_context.py trains and evaluates.
"""

import argparse
from pathlib import Path

import torch

from fmkernels.demo import in_context


def main(seeds: int = 3, steps: int = 250, neco_steps: int = 40, pictures: Path | None = None):
    return in_context.run(seeds, steps, neco_steps, pictures=pictures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, default=Path(), help="folder for two PNG files")
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.seeds, pictures=arguments.pictures)
