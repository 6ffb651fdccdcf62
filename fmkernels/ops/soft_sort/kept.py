"""Tables on a GPU that are made once and kept for good.

A captured graph, or a kernel that still runs, has no more of a table than its address: so none is
ever freed, and none lies in memory that a graph uses again. All tables of the CUDA kernels together
would take 32 MB, those of Triton 43.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Table = TypeVar("Table")

_LOCK = threading.Lock()


def kept(make: Callable[..., Table]) -> Callable[..., Table]:
    """``make(…, device)``, which on a GPU runs once for the same arguments.

    Raises:
        RuntimeError: the first call for these arguments is in the capture of a graph, which would
            not survive the copy to the GPU.
    """
    tables: dict[tuple[Any, ...], Table] = {}

    @functools.wraps(make)
    def table(*key: Any) -> Table:
        if key[-1].type != "cuda":
            return make(*key)
        if key not in tables:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "soft_sort: first call for this size during CUDA graph capture: call it once "
                    "before"
                )
            with _LOCK:
                if key not in tables:
                    tables[key] = _in_a_thread(make, *key)
        return tables[key]

    return table


def _in_a_thread(make: Callable[..., Table], *key: Any) -> Table:
    """Runs ``make`` in a thread of its own.

    What torch.compile(mode="reduce-overhead") allocates while it warms up belongs to a graph, which
    takes it back; so does everything else in a MemPool. Pools claim a thread's allocations, and the
    outermost claim wins: a MemPool of our own, inside of it, would stay empty. The new thread has
    no inference mode either, whose tensors autograd refuses.
    """
    with ThreadPoolExecutor(max_workers=1) as threads:
        return threads.submit(make, *key).result()
