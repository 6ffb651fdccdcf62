"""Exact search beside faiss and PyTorch, and in-context segmentation beside the published steps.

Every time is of a result that was checked just before (``parity.check``).
"""

import measure
import parity
import pytest
import roofline
from beside import beside, in_a_process
from knn import banks
from knn.report import measurement as key
from knn.workloads import SHAPES
from workloads import WORKLOADS

import fmkernels
from fmkernels import _library

SUITE = "knn"

CANONICAL = [
    ("fmkernels", "torch-float32"),
    ("fmkernels", "torch-bfloat16"),
    ("fmkernels-unprepared", "faiss"),
    ("fmkernels-unprepared", "faiss-unprepared"),
]
"""Beside what ``SHAPES`` are measured with: ours, peer."""

PAIRS_OF_A_SHAPE = 5
"""Of many queries, where a call takes a second: all shapes together take minutes."""

PAIRS_OF_AN_ADDITION = 15

PEAKS = {
    "knn-100k": ("fmkernels", "fmkernels-unprepared", "faiss", "torch-float32"),
    "knn-400k": ("fmkernels", "fmkernels-unprepared", "faiss", "torch-float32"),
    "hummingbird-voc": ("fmkernels", "published"),
    "hummingbird-voc-memory": ("fmkernels", "published"),
}

OTHER_ISAS = (
    [isa for isa in _library.native.cpu_isas() if isa != _library.native.cpu_isa()]
    if _library.native
    else []
)
"""Than the one that everything else here is measured with."""


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ours", ["fmkernels", "fmkernels-float32"])
def test_speed_beside_faiss(name, ours, record):
    pairs = PAIRS_OF_A_SHAPE if name != "knn-100k" and SHAPES[name].queries > 16 else None
    record(name, key("faiss", ours), **beside(name, "faiss", ours, pairs))


@pytest.mark.parametrize(("ours", "peer"), CANONICAL)
def test_speed_of_the_canonical_search(ours, peer, record):
    record("knn-100k", key(peer, ours), **beside("knn-100k", peer, ours))


@pytest.mark.parametrize("name", ["hummingbird-voc", "hummingbird-voc-memory"])
def test_speed_beside_the_published_steps(name, record):
    record(name, "published", **beside(name, "published"))


def test_what_label_propagation_adds_to_the_search(record):
    workload = WORKLOADS["hummingbird-voc"]
    parity.check(workload, "published")
    steps = {"search": workload.step("fmkernels-search"), "labels": workload.step("fmkernels")}
    added = measure.addition(pairs=PAIRS_OF_AN_ADDITION, **steps)
    record("hummingbird-voc", "label propagation", **added)


@pytest.mark.parametrize("name", ["knn-100k", "knn-q16-k30", "knn-q1-k30"])
def test_time_alone_and_share_of_the_roofline(name, record, benchmark):
    workload = SHAPES[name]
    path = parity.check(workload, "faiss")["path"]
    product = path if path in ("int8", "bfloat16") else "float32"
    with measure.watch_others() as watched:
        benchmark.pedantic(workload.step("fmkernels"), rounds=15, warmup_rounds=4)
    stats = benchmark.stats.stats
    facts = measure.quartiles(stats) | roofline.shares(workload, stats.median, product)
    record(name, "alone", product=product, **facts, **watched)


@pytest.mark.parametrize("name", PEAKS)
def test_memory(name, record):
    peak = {who: measure.peak_extra_bytes(name, who) for who in PEAKS[name]}
    record(name, "memory", peak_bytes=peak)


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_instruction_sets(isa, record):
    facts = in_a_process("knn-100k", "faiss", FMKERNELS_CPU_ISA=isa)
    record("knn-100k", f"faiss, {isa}", **facts)


@pytest.mark.parametrize("kind", banks.KINDS)
def test_candidates_and_second_products(kind, record):
    queries, bank = banks.KINDS[kind](512, 100_000)
    *_, info = fmkernels.knn(queries, bank, 30, return_info=True)
    counts = info.candidates.double()
    facts = {"mean": measure.digits(counts.mean().item()), "most": int(counts.max())}
    facts |= {"queries": len(queries), "fallbacks": info.fallbacks, "path": info.path}
    record("candidates", kind, **facts)
