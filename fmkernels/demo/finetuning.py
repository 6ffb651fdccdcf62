"""A classifier over a pre-trained encoder, fine-tuned in six ways with the same steps and batches.

The encoder stays in its evaluation mode: without dropout, and with the statistics of pre-training,
so that two implementations of the same method can be compared step by step.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels.api import VeraConfig, get_vera_model

HEAD = "head"
ALONE = "the new layer alone"


class Examples(NamedTuple):
    """Inputs (N, ...) of the encoder, and labels (N)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Problem:
    """A pre-trained encoder and what it is to learn."""

    name: str
    encoder: nn.Module
    """Inputs (B, ...) -> (B, dim). Every training has its own copy."""
    dim: int
    classes: int
    train: Examples
    validation: Examples
    test: Examples
    targets: Sequence[str]
    """The layers that get adapters."""
    rank: int
    """Of VeRA; LoRA has 8, PEFT's default."""
    batch: int
    steps: int
    head_rate: float
    """The new layer's learning rate, with every method that trains more than it."""
    rates: dict[str, tuple[float, ...]]
    """Method -> learning rates of all else, from which validation chooses."""

    def classifier(self, seed: int) -> Classifier:
        """The encoder with a new layer, which the seed draws."""
        torch.manual_seed(seed)
        return Classifier(copy.deepcopy(self.encoder), self.dim, self.classes).eval()


class Classifier(nn.Module):
    """Inputs (B, ...) -> logits (B, classes)."""

    def __init__(self, encoder: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dim, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Of the encoder's features."""
        logits: Tensor = self.head(self.encoder(inputs))
        return logits


def _head(model: nn.Module, problem: Problem) -> nn.Module:
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)
    return model


def _full(model: nn.Module, problem: Problem) -> nn.Module:
    return model.requires_grad_(True)


def _vera(model: nn.Module, problem: Problem) -> nn.Module:
    return get_vera_model(model, VeraConfig(**_settings(problem), r=problem.rank))


def _dvora(model: nn.Module, problem: Problem) -> nn.Module:
    return get_vera_model(model, VeraConfig(**_settings(problem), r=problem.rank, use_dora=True))


def _peft_vera(model: nn.Module, problem: Problem) -> nn.Module:
    import peft

    config = peft.VeraConfig(**_settings(problem), r=problem.rank)
    return peft.get_peft_model(model, config)


def _lora(model: nn.Module, problem: Problem) -> nn.Module:
    import peft

    config = peft.LoraConfig(**_settings(problem), r=8, lora_alpha=16)
    return peft.get_peft_model(model, config)


def _settings(problem: Problem) -> dict[str, Any]:
    return {"target_modules": list(problem.targets), "modules_to_save": [HEAD]}


METHODS: dict[str, Callable[[nn.Module, Problem], nn.Module]] = {
    ALONE: _head,
    "VeRA": _vera,
    "VeRA by PEFT": _peft_vera,
    "DVoRA": _dvora,
    "LoRA by PEFT": _lora,
    "everything": _full,
}


class Training(NamedTuple):
    """A trained classifier and how it came about."""

    model: nn.Module
    losses: list[float]
    step_s: float
    """Median over the steps."""
    parameters: int
    """Trained, those of the new layer included."""


def fine_tune(
    problem: Problem,
    method: str,
    rate: float,
    seed: int,
    *,
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Training:
    """Train by AdamW without decay, with rates that fall to 0 in a line.

    Args:
        problem: what.
        method: a name in ``METHODS``.
        rate: the learning rate of all but the new layer, or of it if it is trained alone.
        seed: draws the new layer and the order of the batches.
        steps: the first so many; by default all.
        dtype: of the weights and the inputs.
    """
    model = METHODS[method](problem.classifier(seed).to(dtype), problem)
    model.eval()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if HEAD in name.split(".")]
    others = [p for name, p in trained if HEAD not in name.split(".")]
    groups = [{"params": head, "lr": rate if method == ALONE else problem.head_rate}]
    groups += [{"params": others, "lr": rate}] if others else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / problem.steps)
    losses, times = [], []
    for rows in itertools.islice(batches(problem, seed), problem.steps if steps is None else steps):
        start = time.perf_counter()
        inputs, labels = (column[rows] for column in problem.train)
        loss = F.cross_entropy(model(_cast(inputs, dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return Training(model, losses, statistics.median(times), sum(p.numel() for _, p in trained))


def _cast(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in the dtype of the weights; token numbers as they are."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def batches(problem: Problem, seed: int) -> Iterator[Tensor]:
    """Rows of the training set, every example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    count = len(problem.train.labels)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < problem.batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[: problem.batch], order[problem.batch :]
        yield rows


@torch.no_grad()
def scores(model: nn.Module, examples: Examples, batch: int = 64) -> tuple[float, float]:
    """Accuracy and mean loss."""
    logits = torch.cat([model(inputs) for inputs in examples.inputs.split(batch)])
    accuracy = (logits.argmax(dim=1) == examples.labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, examples.labels).item()
