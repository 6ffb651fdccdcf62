"""The demo: what the package is for, on real data, in six parts.

``python -m fmkernels demo`` trains a small network on photographs until it orders neighbours as its
teacher does, compares one such step with the installed diffsort package, segments scenes by
retrieval, searches patches beside the installed faiss, classifies digits by gradients, and
fine-tunes encoders by VeRA. It takes about three minutes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from rich.console import Console

from fmkernels import __version__, _library, info
from fmkernels.demo import (
    adapters,
    beside_diffsort,
    beside_faiss,
    classify_digits,
    learn_order,
    photographs,
    segment_scenes,
)

PARTS = (1, 2, 3, 4, 5, 6)


def run(pictures: Path | None, steps: int, parts: Collection[int] = PARTS) -> int:
    """Run the parts; the exit code is 0 if each of them found what it is there to show.

    Args:
        pictures: the folder for the PNG files, or None for numbers only.
        steps: gradient steps of the first part.
        parts: which, by number.
    """
    console = Console(width=None if Console().is_terminal else 100)
    start = time.perf_counter()
    if not photographs.load():
        console.print("demo: no photographs: pip install scikit-learn scikit-image")
        return 1
    console.print(f"[bold]fmkernels {__version__}[/bold] on {machine()}\n")
    todo: tuple[Callable[[Console], bool], ...] = (
        functools.partial(learn_order.run, pictures=pictures, steps=steps),
        beside_diffsort.run,
        functools.partial(segment_scenes.run, pictures=pictures),
        beside_faiss.run,
        classify_digits.run,
        adapters.run,
    )
    failed = []
    for number in sorted(parts):
        console.print(f"{number}. ", end="")
        if not todo[number - 1](console):
            failed.append(number)
        console.print()
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")
    if failed:
        numbers = " and ".join(map(str, failed))
        console.print(f"demo: part {numbers}: expected a better result, see the table above")
    return 1 if failed else 0


def machine() -> str:
    """The processor, instruction set and threads that the figures hold for."""
    native = _library.native
    kernels = f"{native.cpu_isa()} kernels" if native else "no compiled kernels (the reference)"
    threads = torch.get_num_threads()
    return f"{info.cpu_model()}, {kernels}, {threads} threads, torch {torch.__version__}"
