"""Nearest neighbours by the cosines of gradients: exact ones, and those of every kind of sketch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import fmkernels
from fmkernels.demo import digits

SKETCHES = ("CountSketch", "Rademacher", "KhatriRao", "Kronecker")
KINDS = ("exact", *SKETCHES)
NEIGHBORS = 20

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Objective -> δ (N, S, out) and a (N, S, in), as ``FungiExtractor.gradients`` has them."""


def accuracies(
    train: Factors,
    test: Factors,
    embeddings: tuple[Tensor, Tensor],
    data: digits.Digits,
    seed: int,
    *,
    kinds: Sequence[str] = KINDS,
    dim: int = digits.DIM,
) -> dict[str, dict[str, float]]:
    """Of the labels of the nearest neighbours: exact or a sketch -> by which gradients -> share.

    Args:
        train: gradients of the half to learn from.
        test: of the half to test.
        embeddings: of both halves, normalised.
        data: both halves.
        seed: of the random matrices.
        kinds: of ``KINDS``.
        dim: numbers in a sketch.
    """
    by_embedding = embeddings[1] @ embeddings[0].mT
    found = {}
    for kind in kinds:
        if kind == "exact":
            cosines = exact_cosines(test, train)
        else:
            cosines = sketched_cosines(test, train, sketch(kind, dim, seed))
        # blocks of norm 1 side by side are near where the sum of their cosines is large
        cosines["embedding + all"] = by_embedding + torch.stack([*cosines.values()]).sum(dim=0)
        found[kind] = {
            name: accuracy(similarity, data.train_labels, data.test_labels)
            for name, similarity in cosines.items()
        }
    return found


def sketch(kind: str, dim: int, seed: int) -> fmkernels.Projection:
    """For the gradients of the target layer."""
    projection: fmkernels.Projection = getattr(fmkernels, kind)(
        digits.DIM, digits.DIM, dim, seed=seed
    )
    return projection


def exact_cosines(queries: Factors, bank: Factors) -> dict[str, Tensor]:
    """Objective -> (Q, N)."""
    return {
        name: fmkernels.gradient_similarity(*queries[name], *bank[name])
        / norms(*queries[name])[:, None]
        / norms(*bank[name])
        for name in bank
    }


def norms(delta: Tensor, activation: Tensor) -> Tensor:
    """‖G_b‖, (B,): the root of Σ_s Σ_t (δ_s · δ_t) (a_s · a_t + 1)."""
    products = (delta @ delta.mT) * (activation @ activation.mT + 1)
    return products.sum(dim=(1, 2)).sqrt()


def sketched_cosines(
    queries: Factors, bank: Factors, projection: fmkernels.Projection
) -> dict[str, Tensor]:
    """Objective -> (Q, N), from projections."""
    sides = [
        [F.normalize(rows, dim=1) for rows in projected(own, projection)] for own in (queries, bank)
    ]
    return {name: q @ b.mT for name, q, b in zip(bank, *sides, strict=True)}


def projected(factors: Factors, projection: fmkernels.Projection) -> list[Tensor]:
    """(N, dim) for every objective, all in one pass over the random matrix."""
    deltas, activations = map(list, zip(*factors.values(), strict=True))
    return fmkernels.project_gradients(deltas, activations, projection)


def accuracy(similarity: Tensor, labels: Tensor, truth: Tensor) -> float:
    """By a vote of the nearest, as :class:`fmkernels.api.KNNClassifier` has them vote."""
    nearest = labels[similarity.topk(NEIGHBORS, dim=1).indices]  # (Q, NEIGHBORS)
    votes = F.one_hot(nearest, int(labels.max()) + 1).sum(dim=1)
    return (votes.argmax(dim=1) == truth).double().mean().item()


def effective_ranks(delta: Tensor, activation: Tensor) -> Tensor:
    """‖G_b‖⁴ / ‖G_bᵀ G_b‖², (B,): from 1 to the number of rows."""
    with_bias = F.pad(activation, (0, 1), value=1.0)
    built = delta.mT @ with_bias  # (B, out, in + 1): this layer is small
    built = F.normalize(built.flatten(1), dim=1).view_as(built)
    return 1 / (built.mT @ built).square().sum(dim=(1, 2))


def variance_formula(kind: str, dim: int, rank: Tensor) -> Tensor:
    """Relative variance of the squared norm, as docs/ops/project_gradients.md has it."""
    if kind == "KhatriRao":
        return (2 + 6 / rank) / dim
    if kind == "Kronecker":
        left = next(n for n in range(math.isqrt(dim), 0, -1) if dim % n == 0)
        return 2 / dim + (2 / left + 2 * left / dim + 2 / dim) / rank
    return torch.full_like(rank, 2 / dim)


def variances(factors: Factors, kind: str, dim: int, seeds: int) -> dict[str, float]:
    """Objective -> relative variance of ‖p‖² over random matrices, mean over images."""
    ratios: dict[str, list[Tensor]] = {name: [] for name in factors}
    for seed in range(seeds):
        rows = projected(factors, sketch(kind, dim, seed))
        for name, own in zip(factors, rows, strict=True):
            ratios[name].append((own.norm(dim=1) / norms(*factors[name])).square())
    return {name: torch.stack(own).var(dim=0).mean().item() for name, own in ratios.items()}
