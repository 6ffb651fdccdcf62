"""Part 4: the most alike among patches of photographs, by fmkernels and by faiss.

A patch without its mean colour has with another one the cosine that is called their normalised
cross-correlation. Rows are from the right two thirds of the photographs, queries from the left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import fmkernels
from fmkernels.api import PatchIndex
from fmkernels.demo import photographs
from fmkernels.demo.report import is_there, table
from fmkernels.demo.timing import Times, interleaved, spare_threads

HEIGHT, WIDTH = 8, 16
"""Of a patch in pixels: rows of 3 · 8 · 16 = 384 numbers, as wide as the tokens of a ViT-S."""
ROWS, QUERIES, K = 20_000, 1024, 30
PAIRS, BUDGET_S = 9, 5.0


class Found(NamedTuple):
    """The same search by both."""

    recall: float
    """Share of our neighbours that faiss has, too."""
    difference: float
    """The largest of two scores."""
    candidates: float
    """Rows that were scored in float64, mean over the queries."""
    path: str
    ready: Times
    """With the bank made ready before."""
    whole: Times
    """With making it ready."""


def run(console: Console) -> bool:
    """Compare; whether the scores are the same up to faiss's rounding, or faiss is missing."""
    console.print(
        f"The {K} most alike of {ROWS:,} patches of the photographs, for {QUERIES:,} others"
    )
    if not is_there(console, "faiss", "faiss-cpu"):
        return True
    with console.status("searching, some ten seconds"), spare_threads() as note:
        found = compare(*patches())
    console.print(_table(found))
    if note:
        console.print(f"{note}.")
    # D products of parts of unit vectors, summed in float32, and the roundings of both norms
    return found.difference <= (3 * HEIGHT * WIDTH + 4) * 2**-24


def patches() -> tuple[Tensor, Tensor]:
    """(ROWS, D) and (QUERIES, D): overlapping patches without their mean colour."""
    photos = photographs.load().values()
    draw = torch.Generator().manual_seed(0)

    def some(parts: list[Tensor], count: int) -> Tensor:
        rows = torch.cat([_cut(part) for part in parts])
        return rows[torch.randperm(len(rows), generator=draw)[:count]]

    bank = [photo[:, :, photographs.border(photo) :] for photo in photos]
    queries = [photo[:, :, : photographs.border(photo)] for photo in photos]
    return some(bank, ROWS), some(queries, QUERIES)


def _cut(image: Tensor) -> Tensor:
    """(3, height, width) -> (patches, D), half a patch apart."""
    windows = image.unfold(1, HEIGHT, HEIGHT // 2).unfold(2, WIDTH, WIDTH // 2)
    windows = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)
    return (windows - windows.mean(dim=(2, 3), keepdim=True)).flatten(1)


def compare(bank: Tensor, queries: Tensor) -> Found:
    """Cosines of queries (Q, D) and rows (M, D) by both: first the answers, then the times."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        return _compare(bank, queries, faiss.IndexFlatIP)
    finally:
        faiss.omp_set_num_threads(before)


def _compare(bank: Tensor, queries: Tensor, flat: Callable[[int], Any]) -> Found:
    def theirs_made() -> Any:
        index = flat(bank.shape[1])
        index.add(F.normalize(bank, dim=1).numpy())
        return index

    def theirs(index: Any) -> tuple[Any, Any]:
        scores, rows = index.search(F.normalize(queries, dim=1).numpy(), K)
        return scores, rows

    index = PatchIndex(bank.shape[1])
    index.add(bank)
    index.build()
    other = theirs_made()
    scores, rows, info = index.search(queries, K, return_info=True)
    their_scores, their_rows = map(torch.from_numpy, theirs(other))
    same = (rows.unsqueeze(2) == their_rows.unsqueeze(1)).any(dim=2)
    timed = functools.partial(interleaved, pairs=PAIRS, budget_s=BUDGET_S)
    return Found(
        same.double().mean().item(),
        (scores - their_scores).abs().max().item(),
        info.candidates.double().mean().item(),
        info.path,
        timed(lambda: theirs(other), lambda: index.search(queries, K)),
        timed(lambda: theirs(theirs_made()), lambda: fmkernels.knn(queries, bank, K)),
    )


def _table(found: Found) -> Table:
    import faiss

    made = table(
        f"{QUERIES:,} queries, {ROWS:,} rows of {3 * HEIGHT * WIDTH}",
        f"faiss {faiss.__version__} IndexFlatIP",
        "fmkernels",
        "",
        caption=f"medians of {found.ready.pairs} and {found.whole.pairs} interleaved pairs",
    )
    for words, times in (("search", found.ready), ("make the bank ready, search", found.whole)):
        made.add_row(
            words,
            f"{times.theirs * 1e3:.0f} ms",
            f"{times.ours * 1e3:.0f} ms",
            f"{times.speed_ratio:.1f} × as fast",
        )
    made.add_row("neighbours that are the same (recall)", "", "", f"{found.recall:.2%}")
    made.add_row("largest difference of two scores", "", "", f"{found.difference:.0e}")
    made.add_row(
        f"rows scored again in float64, of {ROWS:,}", "", f"{found.candidates:.0f}", found.path
    )
    return made
