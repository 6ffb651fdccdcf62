"""Whether the rows that were found are the nearest: against float64, and everybody's cosines."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from workload import Device

from fmkernels.ops.knn.reference import unit
from knn.providers import PROVIDERS

if TYPE_CHECKING:
    from knn.workloads import Search

CHECKED = 128
"""Queries whose cosines with all rows are computed in float64."""

ROUNDED = 2.0**-45
"""Two float64 cosines of the same rows, computed in another order, differ by less."""


def sample(queries: int) -> slice:
    """Of the queries: about ``CHECKED`` of them, evenly spread."""
    return slice(0, None, -(-queries // CHECKED))


@functools.lru_cache(maxsize=4)
def exact_cosines(search: Search, device: Device) -> Tensor:
    """(sampled queries, k) in float64, the largest first."""
    queries, bank = search.inputs(0, device)[sample(search.queries)], search.bank(device)
    return (unit(queries.double()) @ unit(bank.double()).mT).topk(search.k).values


def true_cosines(search: Search, indices: Tensor, device: Device) -> Tensor:
    """Those of the rows that were found for the sampled queries, in float64."""
    queries, bank = search.inputs(0, device)[sample(search.queries)], search.bank(device)
    return torch.stack(
        [
            unit(bank[found].double()) @ unit(query.double())
            for query, found in zip(queries, indices, strict=True)
        ]
    )


def check(search: Search, peer: str, device: Device, ours: str) -> dict[str, Any]:
    """Fail unless our rows are the nearest in float64, and all cosines agree with the peer's.

    Returns:
        The path of our search, how many rows it scored in float64 for a query, how many queries
        needed a second product; the share of the nearest rows that the peer found, if below 1.
    """
    options = {"return_info": True} if PROVIDERS[ours].informed else {}
    scores, indices, *info = search.step(ours, device=device)(**options)
    peer_scores, peer_indices = search.step(peer, device=device)()[:2]
    allowed = PROVIDERS[peer].error(search.dim) + PROVIDERS[ours].error(search.dim)
    difference = (scores.double() - peer_scores.double()).abs().max().item()
    assert difference <= allowed, (
        f"cosines beside {peer} differ by {difference:.3g}, expected at most {allowed:.3g}"
    )
    picked = sample(search.queries)
    exact, found = exact_cosines(search, device), indices[picked]
    missing = (exact - true_cosines(search, found, device)).abs().max().item()
    assert missing <= ROUNDED, f"{ours}: its rows are not the nearest, by a cosine of {missing:.3g}"
    facts = {"path": info[0].path} if info else {}
    if info:
        facts["candidates"] = round(info[0].candidates.double().mean().item(), 1)
        facts["fallbacks"] = info[0].fallbacks
    recall = recall_of(peer_indices[picked], found)
    return facts | ({"peer_recall": recall} if recall < 1 else {})


def recall_of(found: Tensor, wanted: Tensor) -> float:
    """The share of the rows wanted (Q, k) that were found, in any order."""
    hits = sum(int(torch.isin(row, other).sum()) for row, other in zip(wanted, found, strict=True))
    return hits / wanted.numel()
