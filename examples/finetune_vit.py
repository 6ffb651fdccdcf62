"""VeRA, DVoRA, LoRA and full fine-tuning of a small vision transformer, for digits new to it.

No pre-trained vision transformer comes from a package index, so the program pre-trains one itself,
on the digits 0 to 4 without labels; 5 to 9 are what it is fine-tuned for (scikit-learn's digits, to
test by other writers). LoRA, and VeRA to compare with, are PEFT's: pip install peft. The parts are
in fmkernels/demo: new_digits.py, finetuning.py, finetuning_report.py, beside_peft.py.
"""

import argparse

import torch

from fmkernels.demo import finetuning_report, new_digits


def main(seeds: int = 10, pretraining: int = 150, steps: int = 100, memory: bool = True):
    problem = new_digits.problem(pretraining, steps)
    return finetuning_report.print_comparison(problem, seeds, memory=memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.seeds)
