"""What is asked of NeCo's sort."""

from __future__ import annotations

from limits import Limit, Results, exactly, ratio


def peak_share(results: Results) -> dict[str, float]:
    peak = results["neco-step"]["memory"]["peak_bytes"]
    return exactly(100 * peak["fmkernels"] / peak["diffsort"])


def peak_megabytes(results: Results) -> dict[str, float]:
    return exactly(results["neco-196"]["memory"]["peak_bytes"]["fmkernels"] / 1e6)


def worst_log_error(results: Results) -> dict[str, float]:
    return exactly(max(errors["fmkernels"]["mean"] for errors in results["accuracy"].values()))


def host_time(what: str, prefix: str, direction: str, asked: str) -> Limit:
    name = f"host time of a 2 × 8 {what} beside `F.softmax`, {direction}"
    return Limit(name, asked, ratio("host-time", prefix + direction))


LIMITS = (
    Limit(
        "`neco-step` beside diffsort, AVX-512", "≥ 200 ×", ratio("neco-step", "diffsort, avx512")
    ),
    Limit("`soft-sort-matrix` beside diffsort", "≥ 100 ×", ratio("soft-sort-matrix", "diffsort")),
    host_time("loss", "", "forward", "≤ 3 ×"),
    host_time("loss", "", "forward + backward", "≤ 1.2 ×"),
    host_time("`soft_sort`", "soft_sort, ", "forward", "≤ 3 ×"),
    host_time("`soft_sort`", "soft_sort, ", "forward + backward", "≤ 1.2 ×"),
    Limit("`neco-step`, peak extra memory beside diffsort's", "< 2 %", peak_share),
    Limit("`neco-196`, peak extra memory", "< 100 MB", peak_megabytes),
    Limit(
        "mean error of log P in float32, the worst distribution", "≤ 0.001 nats", worst_log_error
    ),
)
