"""``python finetuning_memory.py {text,digits} METHOD``: bytes by which training raises the peak.

Over the first three steps on Linux: the trained copy of the model, gradients, activations and the
optimizer's moments. The same method trains a small network first, which loads and starts
everything.
"""

import dataclasses
import sys

from fmkernels._memory import peak_extra_bytes
from fmkernels.demo import new_digits, text_encoder
from fmkernels.demo.finetuning import Problem, fine_tune

STEPS = 3


def problem(name: str) -> Problem:
    """By its name; the weights' values do not matter here."""
    if name == "digits":
        return new_digits.problem(pretraining=0)
    path = text_encoder.folder()
    assert path is not None, text_encoder.HOW_TO_GET_IT
    return text_encoder.problem(path)


if __name__ == "__main__":
    _, name, method = sys.argv
    small = dataclasses.replace(new_digits.problem(pretraining=0), batch=1)
    fine_tune(small, method, 1e-3, 0, steps=1)
    chosen = problem(name)
    print(peak_extra_bytes(lambda: fine_tune(chosen, method, 1e-3, 0, steps=STEPS)))
