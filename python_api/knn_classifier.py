"""Classification by nearest neighbours, as DINO and FUNGI are evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmkernels import _checks, knn
from fmkernels.ops.knn_label_propagation import check_temperature

from .arrays import Array, like, optional
from .evaluation_inputs import finite_rows, integer_labels

OP = "KNNClassifier"
METRICS = {"fungi": "l2", "dino": "cosine"}
VOTED = 2**24
"""Entries of the table of votes, queries × classes, that are in memory at a time."""


class _Fitted(NamedTuple):
    """What ``fit`` remembers."""

    bank: Tensor
    """(M, D'), after PCA."""
    labels: Tensor
    """(M,), int64, indices of ``classes_``."""
    width: int
    """D, before PCA."""
    pca: Any


class KNNClassifier:
    """Classify features by a vote of their k nearest training features, found exactly.

    With the labels y_j of the k nearest features of the training set, the class is

        argmax_c Σ_j w_j [y_j = c]

    | kind | neighbours | w_j |
    |---|---|---|
    | ``"fungi"`` | smallest Euclidean distance, after PCA to ``pca_dim`` dimensions | 1 |
    | ``"dino"`` | largest cosine s_j | exp(s_j / temperature) |

    Args:
        kind: ``"fungi"`` or ``"dino"``.
        k: neighbours. Each method takes other ones, also several at once from a single search:
            ``score(features, labels, k=(10, 20, 100, 200))``.
        pca_dim: of ``"fungi"`` only: dimensions after PCA (scikit-learn, fitted on the training
            features), or None for no PCA. It is left out, as published, where ``pca_dim`` is not
            smaller than both the number of features and their width; the neighbours would be the
            same.
        temperature: of ``"dino"`` only.

    Attributes:
        classes_: (C,), the labels that occur in training, ascending. Set by ``fit``.

    Raises:
        ImportError: PCA without scikit-learn.
        TypeError: features that are not floating-point, labels that are not integers.
        ValueError: shapes that do not fit, features that are not finite, a k larger than the
            training set, a method before ``fit``.

    Numerics:
        PCA in the features' precision (float32 for half types), neighbours exact
        (:func:`fmkernels.knn`), votes in float32 (float64 for float64 features). Equal votes go to
        the lower class, equal distances to the lower row.

    Source:
        Caron et al., *Emerging Properties in Self-Supervised Vision Transformers*, ICCV 2021.
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import KNNClassifier
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> classifier = KNNClassifier("dino", k=2).fit(features, torch.tensor([3, 3, 8]))
        >>> classifier.predict(torch.tensor([[2.0, 0.3], [0.1, 1.0]]))
        tensor([3, 8])
        >>> classifier.score(features, torch.tensor([3, 3, 8]), k=(1, 2))
        {1: 1.0, 2: 1.0}
    """

    classes_: Tensor

    def __init__(
        self,
        kind: str = "fungi",
        k: int = 20,
        *,
        pca_dim: int | None = 512,
        temperature: float = 0.07,
    ) -> None:
        _checks.choice(OP, "kind", kind, tuple(METRICS))
        check_temperature(OP, temperature)
        self.kind = kind
        self.k = _checks.positive_integer(OP, "k", k)
        self.pca_dim = None
        if pca_dim is not None:
            self.pca_dim = _checks.positive_integer(OP, "pca_dim", pca_dim, ", or None")
        self.temperature = float(temperature)
        self._fitted: _Fitted | None = None

    def __repr__(self) -> str:
        own = f"pca_dim={self.pca_dim}"
        if self.kind == "dino":
            own = f"temperature={self.temperature}"
        fitted = "not fitted"
        if self._fitted is not None:
            fitted = f"{len(self._fitted.bank)} features of {len(self.classes_)} classes"
        return f"KNNClassifier({self.kind!r}, k={self.k}, {own}), {fitted}"

    def fit(self, features: Array, labels: Array) -> KNNClassifier:
        """Remember training features (M, D) and their integer labels (M,); returns self.

        Without PCA the features are kept as they are, not copied.
        """
        rows = finite_rows(OP, "features", features)
        wanted = integer_labels(OP, "labels", labels, len(rows)).to(rows.device)
        if not len(rows):
            raise ValueError(
                f"{OP}: features: expected at least one row, got shape {_checks.shape(rows)}"
            )
        _check_k(self.k, len(rows))
        pca = None
        if self.kind == "fungi" and self.pca_dim is not None and self.pca_dim < min(rows.shape):
            pca = _fit_pca(rows, self.pca_dim)
        self.classes_, classes = wanted.unique(return_inverse=True)
        self._fitted = _Fitted(_reduced(rows, pca), classes, rows.shape[1], pca)
        return self

    def predict(self, features: Array, k: int | Sequence[int] | None = None) -> Any:
        """The class of every feature (Q, D): (Q,), or {k: (Q,)} for several k."""
        fitted, rows, counts = self._ready("predict", features, k)
        found: dict[int, list[Tensor]] = {count: [] for count in counts}
        for _, count, votes in self._votes(fitted, rows, counts):
            found[count].append(self.classes_[votes.argmax(dim=1)])
        empty = self.classes_[:0]
        whole = {count: torch.cat([empty, *parts]) for count, parts in found.items()}
        return _as_asked(whole, features, k)

    def predict_proba(self, features: Array, k: int | Sequence[int] | None = None) -> Any:
        """Every class's share of the votes: (Q, C) in the order of ``classes_``, or {k: (Q, C)}."""
        fitted, rows, counts = self._ready("predict_proba", features, k)
        shape, dtype = (len(rows), len(self.classes_)), _vote_dtype(rows)
        shares = {count: rows.new_empty(shape, dtype=dtype) for count in counts}
        for block, count, votes in self._votes(fitted, rows, counts):
            shares[count][block] = votes / votes.sum(dim=1, keepdim=True)
        return _as_asked(shares, features, k)

    def score(
        self,
        features: Array,
        labels: Array,
        k: int | Sequence[int] | None = None,
        *,
        top: int = 1,
    ) -> Any:
        """Accuracy: the share of features (Q, D) whose label is among the ``top`` classes.

        Classes without a vote are not among them. NaN if there are no features.
        """
        fitted, rows, counts = self._ready("score", features, k)
        top = _checks.positive_integer(OP, "top", top)
        wanted = integer_labels(OP, "labels", labels, len(rows)).to(rows.device)
        hits = dict.fromkeys(counts, 0)
        number = torch.arange(len(self.classes_), device=rows.device)
        for block, count, votes in self._votes(fitted, rows, counts):
            own = wanted[block].unsqueeze(1) == self.classes_  # all false for an unknown label
            mine = (votes * own).sum(dim=1, keepdim=True)
            place = (number * own).sum(dim=1, keepdim=True)
            ahead = (votes > mine) | ((votes == mine) & (number < place))
            hits[count] += int(((mine > 0).squeeze(1) & (ahead.sum(dim=1) < top)).sum())
        shares = {c: n / len(rows) if len(rows) else float("nan") for c, n in hits.items()}
        return shares if isinstance(k, Sequence) else shares[counts[0]]

    def _votes(
        self, fitted: _Fitted, rows: Tensor, counts: list[int]
    ) -> Iterator[tuple[slice, int, Tensor]]:
        """(block of rows, k, votes (rows, C)), by ascending k; the votes go on to be added to."""
        ascending = sorted(counts)
        queries = _reduced(rows, fitted.pca)
        scores, indices = knn(queries, fitted.bank, ascending[-1], metric=METRICS[self.kind])[:2]
        if self.kind == "fungi":
            weights = torch.ones_like(scores)
        else:  # relative to the best, so that a small temperature takes nothing out of the range
            weights = ((scores - scores[:, :1]) / self.temperature).exp()
        step = max(1, VOTED // len(self.classes_))
        for start in range(0, len(rows), step):
            block, before = slice(start, start + step), 0
            votes = weights.new_zeros(len(weights[block]), len(self.classes_))
            for count in ascending:
                for nearest in range(before, count):  # one per row: no two add to one number
                    classes = fitted.labels[indices[block, nearest]].unsqueeze(1)
                    votes.scatter_add_(1, classes, weights[block, nearest].unsqueeze(1))
                before = count
                yield block, count, votes

    def _ready(
        self, method: str, features: Array, k: int | Sequence[int] | None
    ) -> tuple[_Fitted, Tensor, list[int]]:
        fitted = self._fitted
        if fitted is None:
            raise ValueError(f"{OP}: {method}: expected fit(features, labels) before it")
        if isinstance(features, Tensor):
            _checks.same_device(OP, "features", features, "the features of fit", fitted.bank)
        rows = finite_rows(OP, "features", features).to(fitted.bank.device)
        if rows.shape[1] != fitted.width:
            raise ValueError(
                f"{OP}: features: expected shape (Q, {fitted.width}), as in fit, "
                f"got {_checks.shape(rows)}"
            )
        counts = list(k) if isinstance(k, Sequence) else [self.k if k is None else k]
        if not counts:
            raise ValueError(f"{OP}: k: expected at least one number of neighbours, got none")
        return fitted, rows, [_check_k(count, len(fitted.bank)) for count in dict.fromkeys(counts)]


def _check_k(k: Any, rows: int) -> int:
    checked = _checks.positive_integer(OP, "k", k)
    if checked > rows:
        raise ValueError(
            f"{OP}: k: expected at most {rows}, the number of training features, got {checked}"
        )
    return checked


def _reduced(rows: Tensor, pca: Any) -> Tensor:
    if pca is None:
        return rows
    return torch.from_numpy(np.ascontiguousarray(pca.transform(_numpy(rows)))).to(rows.device)


def _vote_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _numpy(rows: Tensor) -> Any:
    return rows.to("cpu", _vote_dtype(rows)).numpy()


def _fit_pca(rows: Tensor, components: int) -> Any:
    decomposition = optional("sklearn.decomposition", f"{OP}(pca_dim={components})", "scikit-learn")
    return decomposition.PCA(n_components=components, svd_solver="full").fit(_numpy(rows))


def _as_asked(results: dict[int, Tensor], features: Any, k: Any) -> Any:
    """NumPy for NumPy; the only value, unless several k were asked for."""
    converted = dict(zip(results, like(features, *results.values()), strict=True))
    return converted if isinstance(k, Sequence) else next(iter(converted.values()))
