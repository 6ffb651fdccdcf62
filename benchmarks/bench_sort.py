"""NeCo's sort beside its peers: speed, memory, host time, instruction sets, linearity.

Every time is of a gradient that was checked just before (``parity.check``).
"""

import functools
import subprocess
from pathlib import Path

import measure
import parity
import pytest
import roofline
import torch
from beside import beside, in_a_process
from diffsort import DiffSortNet
from sort.parity import log_errors
from sort.providers import STEEPNESS
from sort.workloads import TOO_LARGE, WORKLOADS, Sorting
from torch.nn import functional as F

import fmkernels
from fmkernels import _library
from fmkernels.ops.soft_sort import DISTRIBUTIONS

SUITE = "sort"

LIMIT_S = 600
"""For a peer to be compiled and measured."""

TORCHSORT = Path(__file__).parent.parent / ".peers" / "torchsort"
"""Apart from ``.venv``, and not always there: it is compiled when it is installed, in minutes, and
not at all where there is a CUDA compiler but a PyTorch without CUDA."""


@pytest.mark.parametrize("name", WORKLOADS)
def test_speed_beside_diffsort(name, record):
    if name in TOO_LARGE:
        needed = WORKLOADS[name].rows * diffsort_bytes_per_row(WORKLOADS[name].n)
        facts = {"failed": f"would keep {needed / 1e9:.0f} GB for backward"}
    else:
        facts = beside(name, "diffsort")
    record(name, "diffsort", **facts)


def diffsort_bytes_per_row(n):
    """What it keeps for backward, which grows with the rows alone."""
    few = Sorting(4, n)
    inputs = few.inputs(seed=0)
    return measure.bytes_kept(few.forward("diffsort", inputs), *inputs) / few.rows


@pytest.mark.parametrize("name", ["neco-step", "soft-sort-matrix"])
def test_speed_beside_compiled_diffsort(name, record):
    try:
        facts = in_a_process(name, "diffsort-compiled", LIMIT_S)
    except subprocess.TimeoutExpired:  # this is a result, too
        facts = {"failed": f"no result in {LIMIT_S // 60} min"}
    record(name, "diffsort-compiled", **facts)


@pytest.mark.skipif(
    not TORCHSORT.exists(),
    reason="needs pip install --no-deps --no-build-isolation --target .peers/torchsort torchsort",
)
def test_speed_beside_torchsort(record):
    name = "soft-sort-values"
    record(name, "torchsort", **in_a_process(name, "torchsort", PYTHONPATH=str(TORCHSORT)))


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in TOO_LARGE])
def test_speed_beside_the_reference(name, record):
    record(name, "reference", **beside(name, "reference"))


@pytest.mark.parametrize("name", WORKLOADS)
def test_time_alone_and_share_of_the_roofline(name, record, benchmark):
    workload = WORKLOADS[name]
    parity.check(TOO_LARGE.get(name, workload), "reference")
    with measure.watch_others() as watched:
        benchmark.pedantic(workload.step("fmkernels"), rounds=31, warmup_rounds=4)
    stats = benchmark.stats.stats
    facts = measure.quartiles(stats) | roofline.shares(workload, stats.median)
    per_row = measure.digits(stats.median * 1e6 / workload.rows)
    record(name, "alone", rows=workload.rows, microseconds_per_row=per_row, **facts, **watched)


@pytest.mark.parametrize(
    "name",
    ["neco-step", "neco-196", "neco-features", "neco-loss", "neco-loss-14", "soft-sort-matrix"],
)
def test_memory(name, record):
    workload = WORKLOADS[name]
    inputs = workload.inputs(seed=0)
    peak, kept = {}, {}
    for provider in ("fmkernels", "diffsort")[: 1 if name in TOO_LARGE else 2]:
        peak[provider] = measure.peak_extra_bytes(name, provider)
        kept[provider] = measure.bytes_kept(workload.forward(provider, inputs), *inputs)
    record(name, "memory", peak_bytes=peak, kept_bytes=kept)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_accuracy_of_log_probabilities(distribution, record):
    workload = Sorting(392, 49, "matrix")
    (scores,) = (tensor.detach() for tensor in workload.inputs(seed=0))
    settings = {"steepness": STEEPNESS, "distribution": distribution}
    _, exact = fmkernels.soft_sort(scores.double(), **settings)
    found = {
        "fmkernels": fmkernels.soft_sort(scores, **settings)[1],
        "diffsort": DiffSortNet("bitonic", workload.n, **settings)(scores)[1],
    }
    errors = {name: log_errors(p, exact) for name, p in found.items()}
    record("accuracy", distribution, **errors)


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
@pytest.mark.parametrize("isa", _library.native.cpu_isas() if _library.native else [])
def test_instruction_sets(isa, record):
    facts = in_a_process("neco-step", "diffsort", FMKERNELS_CPU_ISA=isa)
    record("neco-step", f"diffsort, {isa}", **facts)


def test_time_is_linear_in_the_rows(record):
    curve = {}
    for rows in (98, 392, 1568, 6272):
        workload = Sorting(rows, 49)
        parity.check(workload, "reference")
        step = workload.step("fmkernels")
        measure.warm_up(step)
        times = sorted(measure.seconds(step) for _ in range(15))
        curve[rows] = measure.digits(times[7] * 1e6 / rows)
    record("neco-step", "rows", microseconds_per_row=curve)


def test_host_time_on_tiny_input(record):
    parity.check(Sorting(392, 8), "reference")  # on 2 rows, who errs less is luck
    x, y = Sorting(2, 8).inputs(seed=0)

    def beside_softmax(prefix, forward, scalar):
        with torch.no_grad():
            facts = measure.ratio(fmkernels=forward, softmax=lambda: F.softmax(x, dim=-1))
        record("host-time", f"{prefix}forward", **facts)
        facts = measure.ratio(
            fmkernels=lambda: scalar().backward(),
            softmax=lambda: F.softmax(x, dim=-1).sum().backward(),
        )
        record("host-time", f"{prefix}forward + backward", **facts)

    loss = functools.partial(fmkernels.soft_sort_cross_entropy, x, y)
    beside_softmax("", loss, loss)
    sort = functools.partial(fmkernels.soft_sort, x)
    beside_softmax("soft_sort, ", sort, lambda: sort()[0].sum())
