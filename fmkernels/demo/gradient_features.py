"""FUNGI features of digits: nearest neighbours by embedding, by gradients, and by both.

A small vision transformer learns one half of scikit-learn's digits without their labels and is then
frozen. Digits of the other half get the labels of their nearest neighbours among the first, or
among five of each class: by the embedding, by the projected gradient of each objective, and by
both. Then the same gradients are compared exactly, and by each kind of sketch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fmkernels.api import (
    DINO,
    KL,
    FungiExtractor,
    ImageViews,
    SimCLR,
    concatenate,
    evaluate_features,
)
from fmkernels.demo import digits, gradient_similarities

STEPS = 250
"""Of training without labels."""
OBJECTIVES = ("KL", "DINO", "SimCLR")
VIEWS = ImageViews(
    size=digits.SIZE,
    resize="none",
    mean=(0.0,),
    std=(1.0,),
    global_scale=(0.5, 1.0),
    local_scale=(0.25, 0.5),
    stride_scale=2,
)
"""1 plain view, 12 crops that show more than those of a photograph, and 9 patches."""

Sides = tuple[Tensor, Tensor]
"""Features of the half to learn from, and of the half to test."""


class Report(NamedTuple):
    """Accuracies on the half to test: name -> one for each seed."""

    full: dict[str, list[float]]
    """By features, with all of the half to learn from."""
    few_shot: dict[str, list[float]]
    """The same with five of each class."""
    similarities: dict[str, dict[str, list[float]]]
    """Exact or a sketch -> by which gradients, with all of the half to learn from."""

    def gains(self, name: str, few: bool = False) -> list[float]:
        """Of some features over the embedding, with the same network."""
        scores = self.few_shot if few else self.full
        return [a - b for a, b in zip(scores[name], scores["embedding"], strict=True)]


def extractor(model: nn.Module, seed: int) -> FungiExtractor:
    """All three objectives with the paper's settings."""
    return FungiExtractor(
        model,
        digits.TARGET_LAYER,
        [KL(), DINO(), SimCLR()],
        views=VIEWS,
        seed=seed,
        batch_size=600,
    )


def run(seeds: int = 5, steps: int = STEPS, *, say: Callable[[str], object] = print) -> Report:
    """Train, take gradients and classify, once for each seed.

    Args:
        seeds: repetitions, with other weights, heads, projections, and other five of each class.
        steps: of training without labels.
        say: where the lines go.
    """
    start = time.perf_counter()
    report = Report({}, {}, {})
    for seed in range(seeds):
        model, data = digits.start(seed)
        untrained = embeddings(model, data)
        digits.pretrain(model, data.train, steps)
        fungi = extractor(model, seed).fit_negatives(data.train)
        sets = {"pixels": pixels(data), "untrained embedding": untrained, **features(fungi, data)}
        for name, (train, test) in sets.items():
            for task, k, scores in (("knn", 20, report.full), ("few_shot", 5, report.few_shot)):
                score = evaluate_features(
                    train, data.train_labels, test, data.test_labels, tasks=(task,), k=k
                )
                _append(scores, name, getattr(score, task))
        found = gradient_similarities.accuracies(
            *gradients(fungi, data), embeddings(model, data), data, seed
        )
        for kind, of_gradients in found.items():
            for name, accuracy in of_gradients.items():
                _append(report.similarities.setdefault(kind, {}), name, accuracy)
        say(
            f"seed {seed}: {report.full['embedding'][-1]:.1%} by embedding, "
            f"{report.full['embedding + all'][-1]:.1%} with gradients, "
            f"{time.perf_counter() - start:.0f} s"
        )
    return report


def _append(scores: dict[str, list[float]], name: str, score: float | None) -> None:
    assert score is not None
    scores.setdefault(name, []).append(score)


def pixels(data: digits.Digits) -> Sides:
    """The images themselves."""
    return data.train.flatten(1), data.test.flatten(1)


@torch.no_grad()
def embeddings(model: nn.Module, data: digits.Digits) -> Sides:
    """Normalised, (N, DIM)."""
    return concatenate(model(data.train)), concatenate(model(data.test))


def gradients(
    fungi: FungiExtractor, data: digits.Digits
) -> tuple[gradient_similarities.Factors, gradient_similarities.Factors]:
    """Of the half to learn from, and of the half to test."""
    return fungi.gradients(data.train), fungi.gradients(data.test)


def features(fungi: FungiExtractor, data: digits.Digits) -> dict[str, Sides]:
    """The blocks of FUNGI features, and concatenations of them."""
    train, test = (fungi.extract(images, batch_size=200) for images in (data.train, data.test))
    names = ("embedding", *OBJECTIVES)
    split = [dict(zip(names, side.split(digits.DIM, dim=1), strict=True)) for side in (train, test)]

    def joined(*chosen: str) -> Sides:
        first, second = (concatenate(*(side[name] for name in chosen)) for side in split)
        return first, second

    found = {name: joined(name) for name in names}
    found |= {f"embedding + {name}": joined("embedding", name) for name in OBJECTIVES}
    return found | {"all gradients": joined(*OBJECTIVES), "embedding + all": (train, test)}


def spread(values: list[float], sign: str = "") -> str:
    """Mean in percent, and the deviation over seeds where there are several."""
    mean = f"{100 * statistics.mean(values):{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def tables(report: Report) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of text, headings first: accuracies by features, and by exact and sketched gradients."""
    shots = (False, True)
    by_features = [["accuracy in %", "all digits", "gain", "5 of a class", "gain"]]
    for name in report.full:
        cells = []
        for few, scores in zip(shots, (report.full, report.few_shot), strict=True):
            gain = spread(report.gains(name, few), "+") if "+" in name else ""
            cells += [spread(scores[name]), gain]
        by_features.append([name, *cells])
    columns = list(report.similarities["exact"])
    by_gradients = [[f"accuracy in %, {digits.DIM} numbers", *columns]]
    for kind, scores in report.similarities.items():
        by_gradients.append([kind, *(spread(scores[name]) for name in columns)])
    return by_features, by_gradients
