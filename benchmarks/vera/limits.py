"""What is asked of layers with an adapter."""

from __future__ import annotations

from collections.abc import Callable

from limits import Limit, Results, exactly, ratio

from vera import models
from vera.workloads import SHAPES

Figure = Callable[[Results], dict[str, float]]


def in_bfloat16(name: str, measurement: str) -> Figure:
    """A ratio; nothing on a CPU without such instructions."""

    def figure(results: Results) -> dict[str, float]:
        found = results[name][measurement]
        if not found["native_bfloat16"]:
            raise KeyError(name)
        return found

    return figure


def kept(name: str) -> Figure:
    """For backward, in % of what PEFT keeps."""

    def figure(results: Results) -> dict[str, float]:
        found = results[name]["peft"]["kept_bytes"]
        return exactly(100 * found["fmkernels"] / found["peft"])

    return figure


def norms(peer: str) -> Figure:
    return ratio(peer, "peft-dora")


def step(name: str) -> tuple[str, Figure]:
    """What is asked, and the figure: more in bfloat16, in which PEFT computes in float32."""
    if name.endswith("float32"):
        return "≥ 1 ×", ratio(name, "peft")
    return "≥ 1.3 ×", in_bfloat16(name, "peft")


def peak(name: str) -> Figure:
    """Of a step of a model, in % of PEFT's."""

    def figure(results: Results) -> dict[str, float]:
        found = results[name]["memory"]["peak_bytes"]
        return exactly(100 * found["fmkernels"] / found["peft"])

    return figure


ASKED = {"vera-roberta": (4, 33.4, 2), "vera-vit-l": (3, 12.5, 1), "vera-llama-q": (2, 12.5, 1)}
"""Times faster than PEFT in bfloat16; kept, in % of PEFT's; times faster in float32."""

ADAPTERS = tuple(
    limit
    for name, (faster, share, in_float32) in ASKED.items()
    for limit in (
        Limit(f"`{name}`, beside PEFT", f"≥ {faster} ×", in_bfloat16(name, "peft")),
        Limit(f"`{name}`, beside PEFT under autocast", "≥ 1 ×", in_bfloat16(name, "peft-autocast")),
        Limit(f"`{name}`, beside the stock products", "≥ 1 ×", ratio(name, "stock")),
        Limit(
            f"`{name}` in float32, beside PEFT",
            f"≥ {in_float32} ×",
            ratio(f"{name}-float32", "peft"),
        ),
        Limit(
            f"`{name}` in float32, beside the stock products",
            "≥ 1 ×",
            ratio(f"{name}-float32", "stock"),
        ),
        Limit(f"`{name}`, kept for backward, of what PEFT keeps", f"≤ {share} %", kept(name)),
    )
)

MIXED = tuple(
    limit
    for name in SHAPES
    for limit in (
        Limit(
            f"`{name}`, 64 adapters beside one, the layer",
            "≤ 1.15 ×",
            ratio(name, "64 adapters, the layer"),
        ),
        Limit(
            f"`{name}`, 64 adapters beside one, the adapter's part",
            "≤ 1.6 ×",
            ratio(name, "64 adapters, the adapter's part"),
        ),
        Limit(
            f"`{name}`, 64 adapters, beside a loop over them",
            "≥ 10 ×",
            ratio(name, "looped, fmkernels-mixed"),
        ),
    )
)

MODELS = tuple(
    limit
    for name in models.WORKLOADS
    for limit in (
        Limit(f"`{name}`, a step beside PEFT's", *step(name)),
        Limit(f"`{name}`, peak memory, of PEFT's", "< 100 %", peak(name)),
    )
)

LIMITS = (
    Limit(
        "`vera-roberta` merged, beside PEFT",
        "≥ 7 ×",
        in_bfloat16("vera-roberta", "peft, fmkernels-merged"),
    ),
    *ADAPTERS,
    *MIXED,
    *MODELS,
    *(
        Limit(
            f"`{name.replace('vera', 'dvora-norm')}`, beside PEFT's DoRA",
            "≥ 20 ×",
            norms(name.replace("vera", "dvora-norm")),
        )
        for name in SHAPES
    ),
)
