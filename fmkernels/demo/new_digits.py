"""Five digits that a small vision transformer has never seen, 5 to 9, after it has learnt 0 to 4.

It is scikit-learn's digits and the network of ``digits.py``: no pre-trained vision transformer
can be had from a package index, so it is pre-trained here, without labels, on 0 to 4 of the first
half. Then it is fine-tuned on 5 to 9 of that half, and tested on 5 to 9 of the second, by other
writers.
"""

from __future__ import annotations

from torch import Tensor

from fmkernels.demo import digits
from fmkernels.demo.finetuning import ALONE, Examples, Problem

KNOWN = 5
"""The first digit that pre-training does not show."""
VALIDATION = 150
"""Of the examples of the first half, that choose the learning rates."""


def problem(pretraining: int = 150, steps: int = 100) -> Problem:
    """Pre-trains for so many steps."""
    model, data = digits.start(0)
    known = data.train[data.train_labels < KNOWN]
    digits.pretrain(model, known, pretraining)
    learnt = _new(data.train, data.train_labels)
    return Problem(
        "digits",
        model,
        dim=digits.DIM,
        classes=10 - KNOWN,
        train=Examples(*(column[VALIDATION:] for column in learnt)),
        validation=Examples(*(column[:VALIDATION] for column in learnt)),
        test=_new(data.test, data.test_labels),
        targets=["qkv", "proj", "mlp.0", "mlp.2"],
        rank=64,
        batch=32,
        steps=steps,
        head_rate=3e-2,
        rates={
            ALONE: (1e-2, 3e-2, 1e-1),
            "VeRA": (3e-2, 1e-1, 3e-1),
            "DVoRA": (3e-2, 1e-1, 3e-1),
            "LoRA by PEFT": (1e-3, 3e-3, 1e-2),
            "everything": (3e-4, 1e-3, 3e-3),
        },
    )


def _new(images: Tensor, labels: Tensor) -> Examples:
    is_new = labels >= KNOWN
    return Examples(images[is_new], labels[is_new] - KNOWN)
