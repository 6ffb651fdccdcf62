"""What is asked of the projections."""

from __future__ import annotations

from limits import Limit, Results, exactly, ratio


def stored_share(results: Results) -> dict[str, float]:
    """Of the float32 matrix, in %: what the packed signs take."""
    stored = results["fungi-kl-b-1"]["stored"]["bytes"]
    return exactly(100 * stored["fmkernels-packed"] / stored["float32"])


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
)
