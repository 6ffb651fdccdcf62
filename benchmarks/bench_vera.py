"""Layers with a VeRA adapter, forward and backward, beside PEFT's; what the adapter takes.

Every time is of a result that was checked just before (``parity.check``).
"""

import measure
import parity
import pytest
from vera import models
from vera.report import measurement as key
from vera.report import names
from vera.workloads import SHAPES, WORKLOADS

from fmkernels.ops.knn.config import has_fast_bfloat16

SUITE = "vera"

LAYERS = names()
ROUNDS = 15

PAIRS = [
    ("fmkernels", "peft"),
    ("fmkernels", "peft-autocast"),
    ("fmkernels", "peft-compiled"),
    ("fmkernels", "stock"),
    ("fmkernels", "lora"),
    ("fmkernels-merged", "peft"),
]
"""Ours, peer."""


@pytest.mark.parametrize(("ours", "peer"), PAIRS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_adapter_takes(name, ours, peer, record):
    workload = WORKLOADS[name]
    if name.endswith("float32") and peer == "peft-autocast":
        pytest.skip("another precision")
    facts = parity.check(workload, peer, ours=ours)
    steps = {who: workload.step(who) for who in ("base", peer, ours)}
    found = measure.beyond(pairs=ROUNDS, **steps)
    record(name, key(peer, ours), **found, **facts, native_bfloat16=has_fast_bfloat16())


@pytest.mark.parametrize("name", SHAPES)
def test_many_adapters_beside_one(name, record):
    workload = WORKLOADS[name]
    parity.check(workload, "fmkernels", ours="fmkernels-mixed")
    steps = {who: workload.step(who) for who in ("base", "fmkernels-mixed", "fmkernels")}
    record(name, "64 adapters, the adapter's part", **measure.beyond(pairs=ROUNDS, **steps))
    del steps["base"]
    record(name, "64 adapters, the layer", **measure.ratio(pairs=ROUNDS, **steps))


@pytest.mark.parametrize("name", SHAPES)
def test_many_adapters_beside_a_loop(name, record):
    workload = WORKLOADS[name]
    facts = parity.check(workload, "looped", ours="fmkernels-mixed")
    steps = {who: workload.step(who) for who in ("base", "looped", "fmkernels-mixed")}
    record(name, key("looped", "fmkernels-mixed"), **measure.beyond(pairs=9, **steps), **facts)


@pytest.mark.parametrize("peer", ["peft-dora", "materialized"])
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.startswith("dvora")])
def test_norms(name, peer, record):
    workload = WORKLOADS[name]
    parity.check(workload, peer)
    steps = {who: workload.step(who) for who in (peer, "fmkernels")}
    record(name, key(peer), **measure.ratio(**steps))


@pytest.mark.parametrize("name", SHAPES)
def test_memory(name, record):
    who = ("fmkernels", "fmkernels-mixed", "base", "peft", "peft-autocast")
    peak = {each: measure.peak_extra_bytes(name, each) for each in who}
    record(name, "memory", peak_bytes=peak)


MODEL_PAIRS = [
    ("fmkernels", "peft"),
    ("fmkernels", "peft-autocast"),
    ("fmkernels-peft", "peft"),
]


@pytest.mark.parametrize(("ours", "peer"), MODEL_PAIRS)
@pytest.mark.parametrize("name", models.WORKLOADS)
def test_a_step_of_a_model(name, ours, peer, record):
    workload = WORKLOADS[name]
    if name.endswith("float32") and peer == "peft-autocast":
        pytest.skip("another precision")
    facts = parity.check(workload, peer, ours=ours)
    steps = {who: workload.step(who) for who in (peer, ours)}
    record(name, key(peer, ours), **measure.ratio(pairs=9, **steps), **facts)


@pytest.mark.parametrize("name", models.WORKLOADS)
def test_memory_of_a_step_of_a_model(name, record):
    who = ("fmkernels", "fmkernels-peft", "peft")
    peak = {each: measure.peak_extra_bytes(name, each) for each in who}
    record(name, "memory", peak_bytes=peak)
