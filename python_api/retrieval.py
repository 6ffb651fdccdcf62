"""Retrieval of landmarks: mean average precision of revisited Oxford and Paris."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmkernels import _checks, knn

from .evaluation_inputs import finite_rows, integers

SETUPS = {  # what counts as found, and what is taken out of the ranking
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
SEARCHED = 2048
"""Rows of the database, and queries, that are scored at a time; knn takes no larger k."""


class RetrievalScore(NamedTuple):
    """How well the images of one difficulty were found."""

    mean_ap: float
    """Mean of ``aps`` over the queries that have something to be found, 0 to 1."""
    mean_precision: dict[int, float]
    """mP@k for every k, over the same queries."""
    aps: Tensor
    """(Q,), float64: average precision; NaN for a query with nothing to be found."""
    precision: Tensor
    """(Q, number of k), float64: precision at k; NaN likewise."""


def rank_database(queries: Any, database: Any) -> Tensor:
    """Order all images of a database by the cosine of their features with each query's.

    Args:
        queries: (Q, D), floating-point, a tensor or a NumPy array.
        database: (M, D), on the same device.

    Returns:
        (Q, M), int64: indices of the database, nearest first, equal ones by the lower index.

    Raises:
        TypeError: features that are not floating-point.
        ValueError: shapes that do not fit, features that are not finite.

    Numerics:
        By :func:`fmkernels.knn` in float64, so near ties are resolved.

    Example:
        >>> import torch
        >>> from fmkernels.api import rank_database
        >>> rank_database(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[1, 0]])
    """
    op = "rank_database"
    queries = finite_rows(op, "queries", queries)
    database = finite_rows(op, "database", database)
    _checks.same_device(op, "database", database, "queries", queries)
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"{op}: database: expected rows of {queries.shape[1]} numbers, as queries has, "
            f"got shape {_checks.shape(database)}"
        )
    shape = (len(queries), len(database))
    ranking = torch.empty(shape, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), SEARCHED):
        block = queries[start : start + SEARCHED].double()
        scores = block.new_empty(len(block), len(database))
        for first in range(0, len(database), SEARCHED):
            rows = database[first : first + SEARCHED]
            found, indices = knn(block, rows, len(rows))[:2]
            scores[:, first : first + SEARCHED].scatter_(1, indices, found)
        ranking[start : start + SEARCHED] = scores.argsort(dim=1, descending=True, stable=True)
    return ranking


def retrieval_map(
    ranking: Any, ground_truth: Sequence[Mapping[str, Any]], ks: int | Sequence[int] = (1, 5, 10)
) -> dict[str, RetrievalScore]:
    """Mean average precision and precision at k of rankings, as for revisited Oxford and Paris.

    Junk is taken out of each ranking. With r_1 < r_2 < … the positions, from 0, of the n images to
    be found in what is left, the average precision is the area under the trapezoids

        AP = 1/n Σ_j (p_j + q_j) / 2,    p_j = (j − 1) / r_j (1 if r_j = 0),    q_j = j / (r_j + 1)

    and the precision at k is the share of found images in the first min(k, r_last + 1).

    | difficulty | to be found | junk |
    |---|---|---|
    | ``"easy"`` | easy | junk, hard |
    | ``"medium"`` | easy, hard | junk |
    | ``"hard"`` | hard | junk, easy |

    Args:
        ranking: (Q, R) integers, a tensor or a NumPy array: for each query indices of the database,
            nearest first, such as :func:`rank_database` gives. R may be smaller than the database:
            what is not in it is not found. −1 is no image.
        ground_truth: for each query a mapping with the indices ``easy``, ``hard`` and, if there is
            any, ``junk``, as in the published ``gnd_roxford5k.pkl`` under the key ``gnd``.
        ks: of the precisions, one or several.

    Returns:
        A :class:`RetrievalScore` for each of ``"easy"``, ``"medium"`` and ``"hard"``. Queries with
        nothing to be found are left out of the means; NaN if all are.

    Raises:
        TypeError: rankings or indices that are not integers, a ground truth that is no list.
        ValueError: shapes that do not fit, an image twice in a ranking, a missing key.

    Numerics:
        float64.

    Source:
        Radenović et al., *Revisiting Oxford and Paris*, CVPR 2018.

    Example:
        >>> import torch
        >>> from fmkernels.api import retrieval_map
        >>> ground_truth = [{"easy": [2], "hard": [0], "junk": [3]}]
        >>> scores = retrieval_map(torch.tensor([[3, 2, 1, 0]]), ground_truth)
        >>> scores["easy"].mean_ap, scores["hard"].mean_ap
        (1.0, 0.25)
        >>> scores["medium"].mean_precision
        {1: 1.0, 5: 0.6666666666666666, 10: 0.6666666666666666}
    """
    op = "retrieval_map"
    _check_list(op, ground_truth)
    ranks = _check_ranking(op, ranking, len(ground_truth))
    several = ks if isinstance(ks, Iterable) else (ks,)
    counts = [_checks.positive_integer(op, "ks", k) for k in several]
    parts = [_check_truth(op, query, truth) for query, truth in enumerate(ground_truth)]
    results = {}
    for setup, (positive, junk) in SETUPS.items():
        aps = np.full(len(ranks), np.nan)
        precision = np.full((len(ranks), len(counts)), np.nan)
        for query, (order, truth) in enumerate(zip(ranks, parts, strict=True)):
            wanted = np.concatenate([truth[key] for key in positive])
            if len(wanted):
                left_out = np.concatenate([truth[key] for key in junk])
                places = _places(order, wanted, left_out)
                aps[query] = _average_precision(places, len(wanted))
                precision[query] = [_precision_at(places, k) for k in counts]
        means = _mean(precision)
        results[setup] = RetrievalScore(
            float(_mean(aps)),
            dict(zip(counts, map(float, means), strict=True)),
            torch.from_numpy(aps),
            torch.from_numpy(precision),
        )
    return results


def _places(order: Any, wanted: Any, junk: Any) -> Any:
    """Positions, from 0 and ascending, of the wanted images in a ranking without the junk."""
    places = np.flatnonzero(np.isin(order, wanted))
    return places - np.searchsorted(np.flatnonzero(np.isin(order, junk)), places)


def _average_precision(places: Any, number: int) -> float:
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    return float(((before + (found + 1) / (places + 1)) / 2).sum() / number)


def _precision_at(places: Any, k: int) -> float:
    if not len(places):
        return 0.0
    last = min(k, int(places[-1]) + 1)
    return float((places < last).sum() / last)


def _mean(values: Any) -> Any:
    """Over the queries that have a value."""
    kept = values[~np.isnan(values).any(axis=tuple(range(1, values.ndim)))]
    return kept.mean(axis=0) if len(kept) else np.full(values.shape[1:], np.nan)


def _check_ranking(op: str, ranking: Any, queries: int) -> Any:
    ranking = integers(op, "ranking", ranking)
    if ranking.ndim != 2 or len(ranking) != queries:
        hint = ""
        if ranking.ndim == 2 and ranking.shape[1] == queries:
            hint = "; the published code has queries in columns: pass its ranks transposed"
        raise ValueError(
            f"{op}: ranking: expected shape ({queries}, R), one row for each query of "
            f"ground_truth, got {_checks.shape(ranking)}{hint}"
        )
    ranks = ranking.cpu().numpy()
    for query, order in enumerate(ranks):
        images = np.sort(order[order >= 0])
        if (images[1:] == images[:-1]).any():
            raise ValueError(
                f"{op}: ranking: expected each image at most once, got one twice in row {query}"
            )
    return ranks


def _check_list(op: str, ground_truth: Any) -> None:
    if isinstance(ground_truth, Mapping):
        hint = "; pass ground_truth['gnd']" if "gnd" in ground_truth else ""
        raise TypeError(
            f"{op}: ground_truth: expected a list with a mapping for each query, "
            f"got {type(ground_truth).__name__}{hint}"
        )


def _check_truth(op: str, query: int, truth: Any) -> dict[str, Any]:
    checked = {}
    for key in ("easy", "hard", "junk"):
        if key not in truth and key != "junk":
            raise ValueError(
                f"{op}: ground_truth[{query}]: expected the keys easy, hard and junk, "
                f"got {', '.join(map(str, truth))}"
            )
        given, name = truth.get(key, ()), f"ground_truth[{query}][{key!r}]"
        if not len(given):  # NumPy takes an empty list for floating-point
            given = np.empty(0, dtype=np.int64)
        indices = integers(op, name, given).reshape(-1).numpy()
        if (indices < 0).any():
            raise ValueError(f"{op}: {name}: expected indices >= 0, got {indices.min()}")
        checked[key] = indices
    return checked
