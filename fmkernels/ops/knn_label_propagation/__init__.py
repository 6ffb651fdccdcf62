"""Labels of a bank's rows, carried over to queries by their nearest neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.knn import check_arguments, public_scores, search

GATHERED = 2**18
"""Label entries that are gathered at a time."""


def knn_label_propagation(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    k: int = 30,
    temperature: float = 0.02,
    metric: str = "cosine",
    num_classes: int | None = None,
) -> Tensor:
    """Give every query the mean label of its k nearest rows, weighted by similarity.

    With the scores s_j and labels y_j of the k nearest rows of the bank
    (:func:`fmkernels.knn`), the label of the query is

        Σ_j w_j y_j,    w = softmax(s / temperature)

    where s is the cosine, the inner product, or minus the squared distance.

    Args:
        queries: (…, D), of any floating dtype and strides.
        bank: (M, D), M at least 1.
        labels: of the bank's rows, on the same device: (M,) integer classes; (M, C) soft labels,
            floating, taken as they are; or (M, C) counts, integer, such as the pixels of a patch in
            each class, divided by their sum (a row without counts is zeros).
        k: neighbours; with fewer rows, as many as there are.
        temperature: > 0, in units of the score.
        metric: ``"cosine"``, ``"inner_product"`` or ``"l2"``.
        num_classes: C for integer classes; one more than the largest label if None.

    Returns:
        (…, C), float32, or float64 if queries or bank are. It is not differentiable. A query with
        no neighbour (all of its scores are NaN) gets zeros.

    Raises:
        TypeError: a tensor has the wrong dtype, or a number is expected.
        ValueError: an argument does not fit, or a class is out of range; the message names it.

    Numerics:
        Neighbours are exact; weights and sums are computed in the dtype of the result. Neither the
        neighbours' labels of all queries nor a one-hot table is ever in memory.

    Source:
        Balažević et al., *Towards In-Context Scene Understanding*, NeurIPS 2023.

    Example:
        >>> import torch, fmkernels
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fmkernels.knn_label_propagation(bank, bank, torch.tensor([0, 1]), k=2)
        tensor([[1.0000e+00, 1.9287e-22],
                [1.9287e-22, 1.0000e+00]])
    """
    op = "knn_label_propagation"
    k = check_arguments(op, queries, bank, k, metric)
    if not len(bank):
        raise ValueError(f"{op}: bank: expected at least one row, got shape {tuple(bank.shape)}")
    check_temperature(op, temperature)
    num_classes = check_labels(op, labels, bank, num_classes)
    flat = queries.detach().reshape(-1, queries.shape[-1])
    found, indices, _, _ = search(flat, bank.detach(), min(k, len(bank)), metric, "exact")
    scores = public_scores(found, queries, bank, "cosine")
    votes = vote(weights(scores, indices, temperature), indices, labels.detach(), num_classes)
    return votes.reshape(*queries.shape[:-1], num_classes)


def check_temperature(op: str, temperature: Any) -> None:
    """A number larger than zero."""
    _checks.non_negative(op, "temperature", temperature)
    if temperature == 0:
        raise ValueError(f"{op}: temperature: expected a number > 0, got {temperature}")


def check_labels(op: str, labels: Any, bank: Tensor, num_classes: int | None) -> int:
    """Refuse labels that do not fit the bank; returns the number of classes."""
    if not isinstance(labels, Tensor):
        raise _checks.no_tensor(op, "labels", labels)
    _checks.same_device(op, "labels", labels, "bank", bank)
    if labels.ndim not in (1, 2) or len(labels) != len(bank):
        raise ValueError(
            f"{op}: labels: expected shape ({len(bank)},) or ({len(bank)}, C), one row for each of "
            f"the bank, got {_checks.shape(labels)}"
        )
    if num_classes is not None:
        num_classes = _checks.positive_integer(op, "num_classes", num_classes)
    if labels.ndim == 2:
        if labels.dtype == torch.bool or labels.dtype.is_complex:
            raise TypeError(f"{op}: labels: expected numbers, got {labels.dtype}")
        if num_classes not in (None, labels.shape[1]) or not labels.shape[1]:
            raise ValueError(
                f"{op}: labels: expected {num_classes or 'at least 1'} columns, one for each "
                f"class, got shape {_checks.shape(labels)}"
            )
        signed = labels.dtype.is_signed and not labels.dtype.is_floating_point
        if signed and not labels.is_meta and (labels < 0).any():
            raise ValueError(f"{op}: labels: expected counts >= 0, got {int(labels.min())}")
        return labels.shape[1]
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(
            f"{op}: labels: expected integer classes of shape (M,), got {labels.dtype}; "
            "soft labels have shape (M, C)"
        )
    if labels.is_meta:
        if num_classes is None:
            raise ValueError(f"{op}: num_classes: expected a number for labels without data")
        return num_classes
    smallest, largest = (int(value) for value in labels.long().aminmax())
    classes = largest + 1 if num_classes is None else num_classes
    if smallest < 0 or largest >= classes:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{op}: labels: expected classes from 0 to {classes - 1}, got {wrong}")
    return classes


def weights(scores: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """softmax(scores / temperature) over the neighbours there are; zeros where there are none."""
    absent = indices < 0
    # less the best, so that a small temperature takes nothing out of the range; two infinite scores
    # are equal, although their difference is NaN
    behind = (scores - scores[:, :1]).nan_to_num(nan=0.0, neginf=-torch.inf)
    return (behind / temperature).masked_fill(absent, -torch.inf).softmax(-1).masked_fill(absent, 0)


def vote(weights: Tensor, indices: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Weighted sums (Q, C) of the labels of the rows (Q, k), without gathering all of them."""
    result = weights.new_zeros(len(weights), num_classes)
    indices = indices.clamp(min=0)  # whose weight is zero
    if labels.ndim == 1:
        for weight, index in zip(weights.mT, indices.mT, strict=True):  # one per row: no collisions
            result.scatter_add_(1, labels[index].long().unsqueeze(1), weight.unsqueeze(1))
        return result
    step = max(1, GATHERED // (num_classes * max(1, indices.shape[1])))
    for start in range(0, len(weights), step):
        block = slice(start, start + step)
        rows = labels[indices[block]].to(weights.dtype)  # (step, k, C)
        share = weights[block]
        if not labels.dtype.is_floating_point:
            share = share / rows.sum(dim=-1).clamp(min=1)
        result[block] = (share.unsqueeze(-1) * rows).sum(dim=1)
    return result
