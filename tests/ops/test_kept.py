"""Tables that graphs and running kernels read: made once, elsewhere, and never freed."""

import importlib
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fmkernels.ops.soft_sort.kept import kept
from fmkernels.ops.soft_sort.reference import wires_on

GPU = torch.device("cuda", 0)


@pytest.fixture
def capturing(monkeypatch):
    """Sets whether the current stream is being captured."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])

    def capturing(yes):
        state[0] = yes

    return capturing


def test_a_table_is_made_once_and_never_freed(capturing):
    made = []

    @kept
    def table(n, device):
        made.append(n)
        return torch.zeros(1)

    alive = [weakref.ref(table(n, GPU)) for n in range(1000)]
    assert all(reference() is table(n, GPU) for n, reference in enumerate(alive))
    assert made == list(range(1000))
    table(0, torch.device("cuda", 1))
    assert made[-1] == 0


def test_threads_that_come_at_the_same_time_share_one(capturing):
    both = threading.Barrier(2)

    @kept
    def table(device):
        time.sleep(0.1)
        return object()

    def call(_):
        both.wait()
        return table(GPU)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(call, range(2))
    assert first is second


def test_the_first_call_is_not_captured(capturing):
    table = kept(lambda n, device: object())
    capturing(True)
    with pytest.raises(RuntimeError, match="soft_sort: first call for this size during CUDA graph"):
        table(7, GPU)
    capturing(False)
    made = table(7, GPU)
    capturing(True)
    assert table(7, GPU) is made


def test_memory_is_that_of_no_graph(capturing):
    """Pools claim what a thread allocates; inference mode would cling to the table, too."""
    facts = kept(lambda device: (threading.get_ident(), torch.zeros(1).is_inference()))
    with torch.inference_mode():
        thread, is_inference = facts(GPU)
    assert thread != threading.get_ident()
    assert not is_inference


def test_a_cpu_keeps_nothing():
    first, second = (wires_on("odd_even", 4, torch.device("cpu")) for _ in range(2))
    assert first is not second
    assert [layer.tolist() for layer in first] == [[[0, 2], [1, 3]], [[1], [2]]] * 2


@pytest.mark.parametrize(
    ("file", "function", "needs"),
    [
        ("cuda", "on_device", "fmkernels._cuda"),
        ("triton", "network_table", "triton"),
        ("reference", "wires_on", "torch"),
    ],
)
def test_what_is_kept(capturing, file, function, needs):
    pytest.importorskip(needs)
    table = getattr(importlib.import_module(f"fmkernels.ops.soft_sort.{file}"), function)
    wires = (16,) if file == "triton" else ()
    capturing(True)
    with pytest.raises(RuntimeError, match="call it once before"):
        table("bitonic", 11, *wires, GPU)
