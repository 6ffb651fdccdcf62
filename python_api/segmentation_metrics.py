"""Intersection over union of segmentations, from one confusion matrix that is filled in batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmkernels import _checks

from .arrays import optional
from .evaluation_inputs import integer_classes

MATCHINGS = ("hungarian", "many_to_one", "many_to_one_iou")
ABSENT = ("skip", "zero")
PIXELS = 2**20
"""Pixels that are counted at a time: their indices take 8 bytes each, labels often only one."""


class Matching(NamedTuple):
    """Which target class every predicted class stands for, and the overlap that follows."""

    assignment: Tensor
    """(num_predicted,), int64: a target class, or −1 for none."""
    iou: Tensor
    """(num_classes,), float64, NaN where a class is in neither target nor prediction."""

    def miou(self, absent: str = "skip") -> float:
        """Mean of ``iou``; see :meth:`ConfusionMatrix.miou`."""
        return _mean(self.iou, absent)


class ConfusionMatrix:
    """Count, over batches of pixels, as what every class of the target was predicted.

        IoU_c = |target = c and prediction = c| / |target = c or prediction = c|

    and mIoU is the mean over the classes for which the denominator is not 0.

    Args:
        num_classes: C, classes of the target, numbered from 0.
        ignore_index: pixels with this target are left out, whatever is predicted there; None
            leaves nothing out.
        num_predicted: K, predicted classes or clusters; C if None. Where K is not C, use
            :meth:`matched`.

    Attributes:
        matrix: (C, K), int64, on the CPU: targets in rows, predictions in columns. Processes add
            theirs up with ``torch.distributed.all_reduce(confusion.matrix)`` (Gloo).

    Raises:
        TypeError: labels that are not integers.
        ValueError: shapes that differ, classes out of range; nothing of such a batch is counted.

    Numerics:
        Counts are exact; ratios and means are float64.

    Source:
        Everingham et al., *The PASCAL Visual Object Classes Challenge*, IJCV 2010.

    Example:
        >>> import torch
        >>> from fmkernels.api import ConfusionMatrix
        >>> confusion = ConfusionMatrix(3)
        >>> confusion.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]))
        >>> confusion.iou()
        tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
        >>> confusion.miou()
        0.5
    """

    def __init__(
        self, num_classes: int, ignore_index: int | None = 255, *, num_predicted: int | None = None
    ) -> None:
        op = "ConfusionMatrix"
        self.num_classes = _checks.positive_integer(op, "num_classes", num_classes)
        self.num_predicted = self.num_classes
        if num_predicted is not None:
            self.num_predicted = _checks.positive_integer(op, "num_predicted", num_predicted)
        if ignore_index is not None and (
            isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer))
        ):
            raise TypeError(
                f"{op}: ignore_index: expected an integer or None, got {ignore_index!r}"
            )
        self.ignore_index = None if ignore_index is None else int(ignore_index)
        self.matrix = torch.zeros(self.num_classes, self.num_predicted, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count a batch: two integer tensors of the same shape, whichever it is."""
        _check_labels(prediction, target)
        counts = torch.zeros_like(self.matrix)
        pairs = zip(
            prediction.detach().reshape(-1).split(PIXELS),
            target.detach().reshape(-1).split(PIXELS),
            strict=True,
        )
        for predicted, wanted in pairs:
            predicted, wanted = predicted.long(), wanted.long()
            if self.ignore_index is not None:
                kept = wanted != self.ignore_index
                predicted, wanted = predicted[kept], wanted[kept]
            if not len(wanted):
                continue
            otherwise = "" if self.ignore_index is None else f", or {self.ignore_index} (left out)"
            _check_range("target", wanted, self.num_classes, otherwise)
            _check_range("prediction", predicted, self.num_predicted, "")
            cells = wanted * self.num_predicted + predicted
            counted = torch.bincount(cells, minlength=self.matrix.numel())
            counts += counted.view(self.matrix.shape).to(counts.device)
        self.matrix += counts

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix of the same shape."""
        if other.matrix.shape != self.matrix.shape:
            raise ValueError(
                f"ConfusionMatrix: other: expected {_checks.shape(self.matrix)} (target, "
                f"predicted) classes, got {_checks.shape(other.matrix)}"
            )
        self.matrix += other.matrix

    def iou(self) -> Tensor:
        """(C,), float64: of every class; NaN for one that is in neither target nor prediction."""
        self._check_square("iou")
        return _iou(self.matrix)

    def miou(self, absent: str = "skip") -> float:
        """Mean of :meth:`iou`; NaN where nothing was counted.

        A class that is in neither target nor prediction is left out of the mean
        (``absent="skip"``), or counts as 0 (``"zero"``), as in the published evaluations.
        """
        self._check_square("miou")
        return _mean(_iou(self.matrix), absent)

    def accuracy(self) -> float:
        """Share of the counted pixels whose class was predicted; NaN where nothing was counted."""
        self._check_square("accuracy")
        counted = int(self.matrix.sum())
        return int(self.matrix.diagonal().sum()) / counted if counted else float("nan")

    def matched(self, kind: str = "hungarian", *, unmatched: int | None = 0) -> Matching:
        """Take predicted classes for what they overlap with most, and measure again.

        Args:
            kind: ``"hungarian"``: one to one, so that the sum of the IoUs is the largest possible
                (SciPy). ``"many_to_one"``: every predicted class is its most frequent target class
                (the largest pixel precision, which is what overclustering uses).
                ``"many_to_one_iou"``: the target class with which its IoU is largest. The lower
                class where two are equal; class 0 for a class that is never predicted.
            unmatched: the target class of the predicted classes that ``"hungarian"`` leaves over
                where K > C: 0, the background, as published; or None: their pixels count as missed.

        Returns:
            A :class:`Matching`, the pair of assignment (K,) and IoU (C,).

        Raises:
            ImportError: ``"hungarian"`` without SciPy.
            ValueError: another kind, or ``unmatched`` is not a class.
        """
        op, classes = "ConfusionMatrix", self.num_classes
        _checks.choice(op, "kind", kind, MATCHINGS)
        if unmatched is not None and not 0 <= unmatched < classes:
            raise ValueError(
                f"{op}: unmatched: expected a class from 0 to {classes - 1}, or None, "
                f"got {unmatched}"
            )
        predicted = self.matrix.sum(dim=0, keepdim=True)  # (1, K)
        union = self.matrix.sum(dim=1, keepdim=True) + predicted - self.matrix
        size = predicted if kind == "many_to_one" else union
        score = (self.matrix.double() / size.clamp(min=1)).numpy()  # (C, K)
        if kind == "hungarian":
            assigned = np.full(self.num_predicted, -1 if unmatched is None else unmatched)
            optimize = optional("scipy.optimize", f'{op}.matched("hungarian")')
            rows, columns = optimize.linear_sum_assignment(score, maximize=True)
            assigned[columns] = rows
        else:
            assigned = score.argmax(axis=0)  # the first of equal ones
        assignment = torch.from_numpy(assigned.astype(np.int64))
        folded = self.matrix.new_zeros(classes, classes + 1)  # the last column: no class
        folded.index_add_(1, assignment.where(assignment >= 0, classes), self.matrix)
        return Matching(assignment, _iou(folded))

    def _check_square(self, method: str) -> None:
        if self.num_predicted != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix: {method}: expected as many predicted classes as target classes, "
                f"got {self.num_predicted} and {self.num_classes}; use matched(), which pairs them"
            )

    def __repr__(self) -> str:
        return (
            f"ConfusionMatrix(num_classes={self.num_classes}, ignore_index={self.ignore_index}, "
            f"num_predicted={self.num_predicted}): {int(self.matrix.sum())} pixels"
        )


def _iou(matrix: Tensor) -> Tensor:
    """(C, C) or (C, C + 1), whose last column is no class -> (C,)."""
    hits = matrix.diagonal()
    union = matrix.sum(dim=1) + matrix.sum(dim=0)[: len(matrix)] - hits
    return hits.double() / union  # 0 / 0 is the NaN of an absent class


def _mean(iou: Tensor, absent: str) -> float:
    _checks.choice("miou", "absent", absent, ABSENT)
    if iou.isnan().all():
        return float("nan")
    return float(iou.nanmean() if absent == "skip" else iou.nan_to_num(0).mean())


def _check_labels(prediction: Any, target: Any) -> None:
    for name, labels in (("prediction", prediction), ("target", target)):
        hint = "of scores (B, C, H, W) take scores.argmax(dim=1)"
        integer_classes("ConfusionMatrix", name, labels, hint)
    _checks.same_device("ConfusionMatrix", "target", target, "prediction", prediction)
    if prediction.shape != target.shape:
        raise ValueError(
            f"ConfusionMatrix: target: expected the shape of prediction, "
            f"{_checks.shape(prediction)}, got {_checks.shape(target)}"
        )


def _check_range(name: str, labels: Tensor, classes: int, otherwise: str) -> None:
    smallest, largest = (int(value) for value in labels.aminmax())
    if smallest < 0 or largest >= classes:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(
            f"ConfusionMatrix: {name}: expected classes from 0 to {classes - 1}{otherwise}, "
            f"got {wrong}"
        )
