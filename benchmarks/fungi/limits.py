"""What is asked of the projections."""

from __future__ import annotations

from collections.abc import Callable

from limits import Limit, Results, exactly, ratio

from fungi.e2e import WORKLOADS, measurement


def stored_share(results: Results) -> dict[str, float]:
    """Of the float32 matrix, in %: what the packed signs take."""
    stored = results["fungi-kl-b-1"]["stored"]["bytes"]
    return exactly(100 * stored["fmkernels-packed"] / stored["float32"])


def of_forwards(name: str) -> Callable[[Results], dict[str, float]]:
    """Of the time of the plain forward passes, what ours takes."""

    def figure(results: Results) -> dict[str, float]:
        found = results[name][measurement("forwards")]
        turned = {"low": "high", "median": "median", "high": "low"}
        return found | {end: 1 / found[other] for end, other in turned.items()}

    return figure


def in_bfloat16(name: str, fact: str = "") -> Callable[[Results], dict[str, float]]:
    """The ratio to fungivision, or another fact; nothing on a CPU without such instructions."""

    def figure(results: Results) -> dict[str, float]:
        found = results[name][measurement("fungivision", "fmkernels-bfloat16")]
        if not found["native_bfloat16"]:
            raise KeyError(name)
        return exactly(found[fact]) if fact else found

    return figure


END_TO_END = tuple(
    limit
    for name in WORKLOADS
    for limit in (
        Limit(f"`{name}`, beside the plain forward passes", "≤ 1.08 ×", of_forwards(name)),
        Limit(f"`{name}`, beside fungivision", "≥ 1 ×", ratio(name, measurement("fungivision"))),
        Limit(f"`{name}` in bfloat16, beside fungivision", "≥ 2.2 ×", in_bfloat16(name)),
        Limit(f"its cosine to float32, `{name}`", "≥ 0.99 cosine", in_bfloat16(name, "cosine")),
    )
)

LIMITS = (
    Limit(
        "`fungi-kl` of ViT-B, one image, count sketch",
        "≥ 1000 ×",
        ratio("fungi-kl-b-1", "float32"),
    ),
    Limit("the same, 64 images", "≥ 500 ×", ratio("fungi-kl-b-64", "float32")),
    Limit(
        "`fungi-simclr` of ViT-S, 4 images, count sketch, beside all of fungivision's steps",
        "≥ 150 ×",
        ratio("fungi-simclr-4", "fungivision"),
    ),
    Limit(
        "`fungi-kl` of ViT-B, one image, packed signs",
        "≥ 8 ×",
        ratio("fungi-kl-b-1", "float32, fmkernels-packed"),
    ),
    Limit(
        "the same, 64 images",
        "≥ 1 ×",
        ratio("fungi-kl-b-64", "float32, fmkernels-packed"),
    ),
    Limit("packed signs beside the float32 matrix", "≤ 3.34 %", stored_share),
    Limit(
        "time per image, 1,024 images beside 64, count sketch",
        "≤ 1.2 ×",
        ratio("fungi-kl-b-64", "linear in images"),
    ),
    Limit(
        "time per row, 49 rows an image beside one, count sketch",
        "≤ 1.2 ×",
        ratio("fungi-simclr-32", "linear in rows"),
    ),
    *END_TO_END,
)
