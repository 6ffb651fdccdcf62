"""Gradient projections beside built gradients and a product with a stored matrix.

Every time is of a result that was checked just before (``parity.check``).
"""

import measure
import parity
import pytest
import roofline
from beside import beside, in_a_process
from fungi import e2e
from fungi.e2e_providers import PEERS as FOLDER_OF_PEERS
from fungi.providers import packed, stored_matrix
from fungi.report import OURS
from fungi.report import measurement as key
from fungi.workloads import vit
from workloads import WORKLOADS

from fmkernels import _library

SUITE = "fungi"

SIZES = (
    "fungi-kl-s-1",
    "fungi-kl-s-64",
    "fungi-kl-b-1",
    "fungi-kl-b-64",
    "fungi-kl-l-1",
    "fungi-simclr-4",
    "fungi-simclr-32",
    "fungi-tokens",
)
"""At which the stored matrix, its bfloat16 copy and the gradients fit a machine of 16 GB."""

ALONE = (
    *SIZES,
    "fungi-kl-l-64",
    "fungi-kl-s-1024",
    "fungi-kl-b-1024",
    "fungi-kl-b-4096-1",
    "fungi-kl-b-4096-64",
)

KINDS = [ours for ours in OURS if ours != "fmkernels"]

PAIRS_OF_KINDS = 9
"""A call of the peer takes up to a second, and there are four kinds beside two peers."""

PEAKS = ("fmkernels", "fmkernels-packed", "float32")

OTHER_ISAS = (
    [isa for isa in _library.native.cpu_isas() if isa != _library.native.cpu_isa()]
    if _library.native
    else []
)
"""Than the one that everything else here is measured with."""


@pytest.mark.parametrize("peer", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_speed_of_the_count_sketch(name, peer, record):
    record(name, key(peer), **beside(name, peer))


@pytest.mark.parametrize("name", ["fungi-kl-s-64", "fungi-simclr-4"])
def test_speed_beside_all_of_its_steps(name, record):
    record(name, "fungivision", **beside(name, "fungivision"))


@pytest.mark.parametrize("peer", ["float32", "bfloat16"])
@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("name", ["fungi-kl-b-1", "fungi-kl-b-64"])
def test_speed_of_the_other_projections(name, ours, peer, record):
    record(name, key(peer, ours), **beside(name, peer, ours, PAIRS_OF_KINDS))


def test_cost_is_linear_in_images(record):
    many = WORKLOADS["fungi-kl-b-1024"].step("fmkernels")
    few = WORKLOADS["fungi-kl-b-64"].step("fmkernels")
    found = measure.ratio(many=many, few=lambda: [few() for _ in range(16)])
    record("fungi-kl-b-64", "linear in images", **found)


def test_cost_is_linear_in_rows(record):
    summed = WORKLOADS["fungi-simclr-32"].step("fmkernels")
    single = vit(384, 32).step("fmkernels")
    found = measure.ratio(summed=summed, single=lambda: [single() for _ in range(49)])
    record("fungi-simclr-32", "linear in rows", **found)


@pytest.mark.parametrize("name", ALONE)
def test_time_alone_and_share_of_the_roofline(name, record, benchmark):
    workload = WORKLOADS[name]
    with measure.watch_others() as watched:
        benchmark.pedantic(workload.step("fmkernels"), rounds=31, warmup_rounds=4)
    stats = benchmark.stats.stats
    facts = measure.quartiles(stats) | roofline.shares(workload, stats.median)
    record(name, "alone", **facts, **watched)


@pytest.mark.parametrize("name", ["fungi-kl-b-64", "fungi-simclr-4"])
def test_memory(name, record):
    peak = {who: measure.peak_extra_bytes(name, who) for who in PEAKS}
    record(name, "memory", peak_bytes=peak)


def test_what_is_stored(record):
    layer = WORKLOADS["fungi-kl-b-1"]
    matrix = stored_matrix(layer.dim, layer.entries)
    signs = packed(layer.out, layer.into, layer.dim).signs
    stored = {"fmkernels-packed": signs.nbytes, "float32": matrix.nbytes}
    record("fungi-kl-b-1", "stored", bytes=stored)


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_instruction_sets(isa, record):
    parity.check(WORKLOADS["fungi-kl-s-64"], "float32")
    facts = in_a_process("fungi-kl-b-64", "float32", FMKERNELS_CPU_ISA=isa)
    record("fungi-kl-b-64", f"float32, {isa}", **facts)


needs_fungivision = pytest.mark.skipif(
    not (FOLDER_OF_PEERS / "fungivision").exists(), reason="needs `make .peers/ready`"
)
END_TO_END = [
    ("fmkernels", "fungivision"),
    ("fmkernels-bfloat16", "fungivision"),
    ("fmkernels", "forwards"),
]
"""Ours, peer."""
E2E_LIMIT_S = 1800
"""A call takes seconds, and what it returns is checked before."""


@needs_fungivision
@pytest.mark.parametrize(("ours", "peer"), END_TO_END)
@pytest.mark.parametrize("name", e2e.WORKLOADS)
def test_speed_from_pictures_to_features(name, ours, peer, record):
    facts = in_a_process(name, peer, E2E_LIMIT_S, ours)
    record(name, e2e.measurement(peer, ours), **facts)


@needs_fungivision
@pytest.mark.parametrize("name", ["fungi-e2e-kl", "fungi-e2e-all"])
def test_memory_from_pictures_to_features(name, record):
    who = ("fmkernels", "fmkernels-bfloat16", "forwards", "fungivision")
    peak = {each: measure.peak_extra_bytes(name, each) for each in who}
    record(name, "memory", peak_bytes=peak)
