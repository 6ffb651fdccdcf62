"""How FUNGI features are evaluated: k-NN, few-shot, logistic regression, k-means, retrieval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels import _checks

from .arrays import like, optional
from .evaluation_inputs import finite_rows, integer_labels
from .knn_classifier import KNNClassifier
from .retrieval import RetrievalScore, rank_database, retrieval_map

OP = "evaluate_features"
TASKS = ("knn", "few_shot", "logistic", "kmeans")
REGULARISATION = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse strengths C that logistic regression chooses from, on a fifth of the training set."""


class FeatureScores(NamedTuple):
    """Accuracies of one set of features, 0 to 1; None for what was not asked for."""

    knn: float | None = None
    """Votes of the nearest training features."""
    few_shot: float | None = None
    """The same with the first few of each class."""
    logistic: float | None = None
    """Logistic regression."""
    kmeans: float | None = None
    """Clusters of the test features, matched with the classes one to one."""


def concatenate(*blocks: Any) -> Any:
    """Normalise each block of features and put them side by side.

        [x_1/‖x_1‖, x_2/‖x_2‖, …]

    Args:
        blocks: (N, D_i), tensors or NumPy arrays of the same rows, such as embeddings and the
            features of several extractors.

    Returns:
        (N, Σ D_i), of the kind that the first block is. Rows of zeros stay zeros.

    Raises:
        TypeError: features that are not floating-point.
        ValueError: different numbers of rows, or features that are not finite.

    Example:
        >>> import torch
        >>> from fmkernels.api import concatenate
        >>> concatenate(torch.tensor([[3.0, 4.0]]), torch.tensor([[-2.0]]))
        tensor([[ 0.6000,  0.8000, -1.0000]])
    """
    op = "concatenate"
    if not blocks:
        raise ValueError(f"{op}: blocks: expected at least one, got none")
    rows = [finite_rows(op, f"blocks[{i}]", block) for i, block in enumerate(blocks)]
    for i, own in enumerate(rows):
        if len(own) != len(rows[0]):
            raise ValueError(
                f"{op}: blocks[{i}]: expected {len(rows[0])} rows, as blocks[0] has, got {len(own)}"
            )
    (joined,) = like(blocks[0], torch.cat([F.normalize(own, dim=1) for own in rows], dim=1))
    return joined


def few_shot(labels: Any, shots: int = 5) -> Tensor:
    """Which rows are the first ``shots`` of their class: ascending indices, int64.

    Example:
        >>> import torch
        >>> from fmkernels.api import few_shot
        >>> few_shot(torch.tensor([7, 7, 3, 7, 3, 9]), shots=2)
        tensor([0, 1, 2, 4, 5])
    """
    shots = _checks.positive_integer("few_shot", "shots", shots)
    values = integer_labels("few_shot", "labels", labels, len(labels)).cpu()
    seen: dict[int, int] = {}
    chosen = []
    for row, label in enumerate(values.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= shots:
            chosen.append(row)
    return torch.tensor(chosen, dtype=torch.int64)


def evaluate_features(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    tasks: Sequence[str] = TASKS,
    k: int = 20,
    shots: int = 5,
    pca_dim: int | None = 512,
    seed: int = 42,
) -> FeatureScores:
    """FUNGI's evaluation of features: PCA fitted on the training set, then the accuracies.

    | task | |
    |---|---|
    | ``"knn"`` | :class:`KNNClassifier` of kind ``"fungi"``, k neighbours |
    | ``"few_shot"`` | the same on the first ``shots`` of each class, k at most as many rows |
    | ``"logistic"`` | L2-regularised, the strength chosen on a fifth of the training set, with at
    least one row of each class that has two |
    | ``"kmeans"`` | as many clusters of the test features as it has classes, Hungarian matching |

    Args:
        train: (N, D), such as :class:`FungiExtractor` gives; blocks are normalised already.
        train_labels: (N,), integers.
        test: (M, D).
        test_labels: (M,).
        tasks: which.
        k: neighbours. For ``"few_shot"`` alone take no more than ``shots``: of the default 20
            votes at most 5 shots are of the right class.
        shots: per class.
        pca_dim: dimensions after PCA (384 for ViT-S), or None; left out where the features have no
            more dimensions or rows. In ``"few_shot"`` it is that of the whole training set.
        seed: of k-means and of the split for logistic regression.

    Returns:
        A :class:`FeatureScores`.

    Raises:
        ImportError: scikit-learn or SciPy is not installed.
        TypeError: features that are not floating-point, labels that are not integers.
        ValueError: shapes that do not fit, features that are not finite.

    Numerics:
        float32 (float64 for float64 features); neighbours are exact.

    Source:
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import evaluate_features
        >>> centres = 5 * torch.eye(4)
        >>> labels = torch.arange(40) % 4
        >>> features = centres[labels] + 0.1 * torch.randn(40, 4)
        >>> evaluate_features(features, labels, features, labels, k=5)
        FeatureScores(knn=1.0, few_shot=1.0, logistic=1.0, kmeans=1.0)
    """
    if isinstance(tasks, str):
        raise TypeError(f"{OP}: tasks: expected a sequence such as ({tasks!r},), got {tasks!r}")
    k = _checks.positive_integer(OP, "k", k)
    for i, task in enumerate(tasks):
        _checks.choice(OP, f"tasks[{i}]", task, TASKS)
    rows = finite_rows(OP, "train", train).cpu()
    queries = finite_rows(OP, "test", test).cpu()
    if rows.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{OP}: test: expected rows of {rows.shape[1]} numbers, as train has, got shape "
            f"{_checks.shape(queries)}"
        )
    labels = integer_labels(OP, "train_labels", train_labels, len(rows)).cpu()
    wanted = integer_labels(OP, "test_labels", test_labels, len(queries)).cpu()
    if "knn" in tasks and k > len(rows):
        raise ValueError(f"{OP}: k: expected at most the {len(rows)} rows of train, got {k}")
    rows, queries = _reduced(rows, queries, pca_dim)
    found: dict[str, float] = {}
    if "knn" in tasks:
        found["knn"] = _nearest(rows, labels, queries, wanted, k)
    if "few_shot" in tasks:
        chosen = few_shot(labels, shots)
        found["few_shot"] = _nearest(rows[chosen], labels[chosen], queries, wanted, k)
    if "logistic" in tasks:
        found["logistic"] = _logistic(rows, labels, queries, wanted, seed)
    if "kmeans" in tasks:
        found["kmeans"] = _kmeans(queries, wanted, seed)
    return FeatureScores(**found)


def retrieval_scores(
    queries: Any,
    database: Any,
    ground_truth: Sequence[Mapping[str, Any]],
    *,
    pca_dim: int | None = None,
) -> dict[str, RetrievalScore]:
    """Retrieval by features, scored as revisited Oxford and Paris are.

    Args:
        queries: (Q, D).
        database: (M, D).
        ground_truth: as :func:`retrieval_map` takes it.
        pca_dim: dimensions after PCA, fitted on the database, or None.

    Returns:
        As :func:`retrieval_map`.

    Example:
        >>> import torch
        >>> from fmkernels.api import retrieval_scores
        >>> scores = retrieval_scores(torch.eye(2), torch.eye(2), [
        ...     {"easy": [0], "hard": [], "junk": []}, {"easy": [1], "hard": [], "junk": []}])
        >>> scores["easy"].mean_ap
        1.0
    """
    op = "retrieval_scores"
    rows = finite_rows(op, "database", database).cpu()
    asked = finite_rows(op, "queries", queries).cpu()
    rows, asked = _reduced(rows, asked, pca_dim)
    return retrieval_map(rank_database(asked, rows), ground_truth)


def _reduced(rows: Tensor, queries: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """PCA fitted on the first, applied to both."""
    if dim is None or dim >= min(rows.shape):
        return rows, queries
    dim = _checks.positive_integer(OP, "pca_dim", dim, ", or None")
    decomposition = optional("sklearn.decomposition", f"{OP}(pca_dim={dim})", "scikit-learn")
    pca = decomposition.PCA(n_components=dim, svd_solver="full").fit(_numpy(rows))
    return tuple(torch.from_numpy(pca.transform(_numpy(own))) for own in (rows, queries))  # type: ignore[return-value]


def _nearest(rows: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, k: int) -> float:
    classifier = KNNClassifier("fungi", k=min(k, len(rows)), pca_dim=None)
    return float(classifier.fit(rows, labels).score(queries, wanted))


def _logistic(rows: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, seed: int) -> float:
    linear = optional("sklearn.linear_model", f'{OP}(tasks=("logistic",))', "scikit-learn")
    selection = optional("sklearn.model_selection", f'{OP}(tasks=("logistic",))', "scikit-learn")
    x, y = _numpy(rows), labels.numpy()
    counts = np.unique(y, return_counts=True)[1]
    each = counts.min() > 1
    number = max(math.ceil(0.2 * len(y)), len(counts) if each else 1)
    fitting: Any = None
    if len(y) > number:
        fitting = selection.train_test_split(
            x, y, test_size=number, random_state=seed, stratify=y if each else None
        )
    if fitting is None or len(np.unique(fitting[2])) < 2:
        raise ValueError(
            f'{OP}: train_labels: expected at least two classes with two rows each for "logistic", '
            f"got rows per class {counts.tolist()}; leave it out of tasks"
        )
    own, held, own_labels, held_labels = fitting

    def fitted(strength: float, features: Any, classes: Any) -> Any:
        model = linear.LogisticRegression(C=strength, max_iter=2000)
        return model.fit(features, classes)

    scores = [fitted(C, own, own_labels).score(held, held_labels) for C in REGULARISATION]
    best = REGULARISATION[int(np.argmax(scores))]
    return float(fitted(best, x, y).score(_numpy(queries), wanted.numpy()))


def _kmeans(queries: Tensor, wanted: Tensor, seed: int) -> float:
    """Accuracy of clusters under the best one-to-one matching with the classes."""
    cluster = optional("sklearn.cluster", f'{OP}(tasks=("kmeans",))', "scikit-learn")
    optimize = optional("scipy.optimize", f'{OP}(tasks=("kmeans",))', "scipy")
    classes, truth = wanted.unique(return_inverse=True)
    number = len(classes)
    means = cluster.KMeans(n_clusters=number, n_init=10, random_state=seed)
    found = torch.from_numpy(means.fit_predict(_numpy(queries))).long()
    table = torch.bincount(truth * number + found, minlength=number**2).view(number, number)
    matched = optimize.linear_sum_assignment(table.numpy(), maximize=True)
    return float(table[matched].sum() / len(wanted))


def _numpy(rows: Tensor) -> Any:
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide.numpy()
