"""FUNGI on digits: nearest neighbours by embeddings, by gradients of three losses, and by both.

The parts are in fmkernels/demo: digits.py has the data and the network, gradient_features.py takes
and evaluates features, gradient_similarities.py compares sketches.
"""

import argparse

import torch

from fmkernels.demo import gradient_features


def main(seeds: int = 5, steps: int = gradient_features.STEPS) -> gradient_features.Report:
    report = gradient_features.run(seeds, steps)
    for headings, *rows in gradient_features.tables(report):
        print()
        for row in (headings, ["---"] * len(headings), *rows):
            print("|", " | ".join(row), "|")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=gradient_features.STEPS, help="of training")
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.seeds, arguments.steps)
