"""What is asked of the search, and of in-context segmentation on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from limits import Limit, Results, exactly, ratio

from knn.workloads import SHAPES

Figure = Callable[[Results], dict[str, Any]]


def in_low_precision(figure: Figure) -> Figure:
    """The same, where a short product was taken; KeyError, as if not measured, on another CPU."""

    def on_such_a_cpu(results: Results) -> dict[str, Any]:
        found = figure(results)
        if found["path"] not in ("int8", "bfloat16"):
            raise KeyError(found["path"])
        return found

    return on_such_a_cpu


def slowest_shape(measurement: str) -> Figure:
    """The smallest ratio of those at all shapes; KeyError if none was measured."""

    def figure(results: Results) -> dict[str, Any]:
        found = [results.get(name, {}).get(measurement) for name in SHAPES]
        ratios = [facts for facts in found if facts is not None]
        if not ratios:
            raise KeyError(measurement)
        return min(ratios, key=lambda facts: facts["median"])

    return figure


def peak_share(results: Results) -> dict[str, float]:
    peak = results["hummingbird-voc"]["memory"]["peak_bytes"]
    return exactly(100 * peak["fmkernels"] / peak["published"])


NATIVE = "AVX512-BF16 or AMX"

LIMITS = (
    Limit(
        f"`knn-100k`, prepared `PatchIndex` beside prepared faiss, {NATIVE}",
        "≥ 2.5 ×",
        in_low_precision(ratio("knn-100k", "faiss")),
    ),
    Limit(
        f"`knn-100k`, the bank's conversion included, beside prepared faiss, {NATIVE}",
        "≥ 2 ×",
        in_low_precision(ratio("knn-100k", "faiss, fmkernels-unprepared")),
    ),
    Limit(
        "`knn-100k` in float32, beside prepared faiss",
        "≥ 1 ×",
        ratio("knn-100k", "faiss, fmkernels-float32"),
    ),
    Limit("the slowest shape beside prepared faiss", "≥ 1 ×", slowest_shape("faiss")),
    Limit(
        "the slowest shape in float32, beside prepared faiss",
        "≥ 1 ×",
        slowest_shape("faiss, fmkernels-float32"),
    ),
    Limit(
        "label propagation, added to the search",
        "< 15 %",
        ratio("hummingbird-voc", "label propagation"),
    ),
    Limit(
        "`hummingbird-voc`, search and propagation, beside the published steps",
        "≥ 3.5 ×",
        ratio("hummingbird-voc", "published"),
    ),
    Limit("its peak extra memory beside theirs", "< 10 %", peak_share),
    Limit(
        "`hummingbird-voc-memory` beside the published steps",
        "≥ 5 ×",
        ratio("hummingbird-voc-memory", "published"),
    ),
)
