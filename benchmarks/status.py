"""Which kernel runs what, and which have run on a GPU: the parts of README and docs that say so."""

from __future__ import annotations

import json
from typing import Any

from markdown import table

from fmkernels import _library, info
from fmkernels.ops.soft_sort import MAX_KERNEL_SIZE
from fmkernels.ops.soft_sort.config import MAX_CUDA_SIZE, MAX_TRITON_SIZE

TITLES = {
    "reference": "`reference` (PyTorch)",
    "cpp": "`cpp` (CPU)",
    "triton": "`triton` (GPU)",
    "cuda": "`cuda` (GPU)",
}

SORTING = {
    "reference": "every device",
    "cpp": f"n ≤ {MAX_KERNEL_SIZE:,}",
    "triton": f"n ≤ {MAX_TRITON_SIZE}, not float64",
    "cuda": f"n ≤ {MAX_CUDA_SIZE}, not float64",
}
"""Limits of every op on a sorting network."""

LIMITS = {
    "knn": {"reference": "every device", "cpp": "any size", "triton": "k ≤ 2,048"},
    "project_gradients": {"reference": "every device", "cpp": "any size", "triton": "any size"},
    "vera_matrices": {"reference": "every device", "cpp": "any size", "triton": "any size"},
    "vera_shrink": {"reference": "every device", "triton": "T ≤ 64, not float64"},
    "vera_shrink_backward": {"reference": "every device"},
    **{
        name: {"reference": "every device", "cpp": "any size", "triton": "not float64"}
        for name in (
            "vera_expand",
            "vera_expand_backward",
            "vera_expanded",
            "vera_products",
            "vera_products_backward",
            "vera_dropout",
        )
    },
    **{
        name: {"reference": "every device", "cpp": "any size"}
        for name in ("vera_dense", "vera_dense_backward")
    },
    **{
        name: {"reference": "every device", "triton": "not float64"}
        for name in ("dvora_scale", "dvora_scale_backward")
    },
}
"""Of the others."""

COMPOSED = {
    "patch_neighbor_loss": "composed of PyTorch products and `soft_sort_cross_entropy`",
    "knn_label_propagation": "composed of `knn` and PyTorch's gathers",
    "gradient_similarity": "composed of PyTorch products",
}


def verified() -> dict[str, dict[str, str]]:
    return json.loads(info.VERIFIED.read_text()) if info.VERIFIED.exists() else {}


def backends(dates: dict[str, dict[str, str]]) -> list[str]:
    """A Markdown table: for every op and backend its limit, and when it last ran on a GPU."""
    rows = []
    for name, op in sorted(_library.OPS.items()):
        limits = LIMITS.get(name, SORTING)
        cells = [f"`{name}`"]
        for backend in TITLES:
            limit = limits.get(backend, "")
            if backend in op.gpu_kernels:
                date = dates.get(name, {}).get(backend, "unverified")
                cells.append("; ".join(filter(None, (limit, date))))
            else:
                cells.append(limit)
        rows.append(cells)
    for name, words in COMPOSED.items():
        rows.append([f"`{name}`", words, "", "", ""])
    return table(("op", *TITLES.values()), rows)[1:]


def sentence(dates: dict[str, dict[str, str]], gpu_results: list[dict[str, Any]]) -> str:
    """For the README: what has been seen of the GPU kernels."""
    waiting = [
        f"`{name}` ({backend})"
        for name, op in sorted(_library.OPS.items())
        for backend in op.gpu_kernels
        if backend not in dates.get(name, {})
    ]
    if not dates:
        return (
            "The CUDA and Triton kernels have been compiled, and run in emulation, but never on a "
            "GPU; `info` calls them *unverified*, and no GPU figure is claimed."
        )
    newest = max(date for op in dates.values() for date in op.values())
    devices = sorted({content["device"] for content in gpu_results})
    words = f"The GPU kernels last ran, and passed their tests, on {newest}"
    words += f" ({', '.join(devices)})." if devices else "."
    if waiting:
        words += f" Never on a GPU, and *unverified* in `info`: {', '.join(waiting)}."
    return words
