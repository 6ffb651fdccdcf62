"""The benchmark of layers with an adapter: what is compared computes the same, and what is said of it."""

import dataclasses

import pytest
import torch


def tiny(name, **changes):
    from workloads import WORKLOADS

    return dataclasses.replace(WORKLOADS[name].tiny(), **changes)


OURS = ("fmkernels", "fmkernels-merged", "fmkernels-mixed")
PEERS = ("base", "stock", "looped", "peft", "peft-autocast", "lora")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("ours", OURS)
def test_layers_are_right_before_they_are_timed(ours, peer, monkeypatch):
    import parity
    from vera.providers import PROVIDERS

    problem = tiny("vera-roberta")
    kept = parity.check(problem, peer, ours=ours)["kept_bytes"]
    assert kept.keys() == {ours, peer}
    assert all(kept[who] > 0 for who in (ours, "peft") if who in kept)
    right = PROVIDERS[ours]

    def wrong(layer):
        step = right(layer)
        return lambda x, grad: [1.3 * found for found in step(x, grad)]

    monkeypatch.setitem(PROVIDERS, ours, wrong)
    with pytest.raises(AssertionError, match=rf"{ours}: y errs by 0\.3\S* of its size"):
        parity.check(problem, peer, ours=ours)


def test_a_wrong_gradient_is_found(monkeypatch):
    import parity
    from vera.providers import PROVIDERS

    right = PROVIDERS["fmkernels"]

    def wrong(layer):
        step = right(layer)
        return lambda *pair: [*step(*pair)[:3], torch.zeros_like(layer.lambda_b)]

    monkeypatch.setitem(PROVIDERS, "fmkernels", wrong)
    with pytest.raises(AssertionError, match="that of lambda_b errs by 1 of its size"):
        parity.check(tiny("vera-vit-l-float32"), "peft")


@pytest.mark.parametrize("peer", ["peft-dora", "materialized"])
def test_norms_are_right_before_they_are_timed(peer):
    import parity

    assert parity.check(tiny("dvora-norm-roberta"), peer) == {}


def test_what_is_beyond_a_base(monkeypatch):
    import measure

    base = [0.010 + 0.001 * (i % 3) for i in range(9)]  # what all rounds have in common, and noise
    times = {"base": base, "peer": [x + 0.020 for x in base], "ours": [x + 0.005 for x in base]}
    monkeypatch.setattr(measure, "interleaved", lambda functions, pairs: (times, {"others": 0.0}))
    found = measure.beyond(base=None, peer=None, ours=None)
    assert found["of"] == "(peer - base) / (ours - base)"
    assert (found["low"], found["median"], found["high"], found["pairs"]) == (4.0, 4.0, 4.0, 9)
    assert found["beyond_ms"] == {"peer": 20.0, "ours": 5.0}
    assert found["ms"] == {"base": 11.0, "peer": 31.0, "ours": 16.0}


def figure(median, **facts):
    low, high = 0.9 * median, 1.1 * median
    return {"median": median, "low": low, "high": high, "native_bfloat16": True, **facts}


def test_limits_and_pages(tmp_path):
    from suites import SUITES
    from vera.limits import LIMITS

    peft = figure(4.5, kept_bytes={"fmkernels": 30, "peft": 100}, ms={"base": 10.0})
    peft["beyond_ms"] = {"fmkernels": 20.0, "peft": 90.0}
    results = {
        "vera-roberta": {"peft": peft, "peft, fmkernels-merged": figure(5.0)},
        "dvora-norm-llama-q": {"peft-dora": figure(25.0)},
    }
    found = [limit.measured(results) for limit in LIMITS]
    verdicts = [limit.verdict(x) for limit, x in zip(LIMITS, found, strict=True) if x]
    assert verdicts == ["missed", "met", "met", "met"]
    for measurements in results.values():
        for facts in measurements.values():
            facts |= {"revision": "abc1234", "date": "2026-11-29"}
    machine = {"cpu": "Some CPU", "instruction set": "avx512", "bfloat16": "AMX", "threads": 2}
    content = {"machine": machine | {"torch": "2.13.0"}, "results": results}
    details = "\n".join(SUITES["vera"].details(content))
    assert "| `vera-roberta` | 10 | 20 | 90 | 3e-05 MB | 0.0001 MB |" in details
    assert (
        "| `vera-roberta`, kept for backward, of what PEFT keeps | ≤ 33.4 % | 30 % | met |"
        in details
    )
    assert "| `dvora-norm-llama-q` | 25 × (22.5–27.5) |  |" in details
    SUITES["vera"].plot([content], tmp_path / "vera.png")
    assert (tmp_path / "vera.png").read_bytes()[:4] == b"\x89PNG"


MODELS = ("vera-model-roberta", "vera-model-llama-float32")


@pytest.mark.parametrize("ours", ["fmkernels", "fmkernels-peft"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_models_are_right_before_they_are_timed(name, ours, monkeypatch):
    import parity
    from vera.models import PROVIDERS

    problem = tiny(name)
    assert parity.check(problem, "peft", ours=ours)["errors"].keys() == {ours, "peft"}
    assert torch.isfinite(problem.step(ours)())
    right = PROVIDERS[ours]

    def wrong(problem):
        model = right(problem)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: 1.3 * gradient)
        return model

    monkeypatch.setitem(PROVIDERS, ours, wrong)
    with pytest.raises(AssertionError, match=rf"{ours}: gradients err by 0\.[23]"):
        parity.check(problem, "peft", ours=ours)


@pytest.mark.parametrize("name", MODELS)
def test_vectors_of_all_providers_are_in_one_order(name):
    problem = tiny(name)
    shapes = {who: [v.shape for v in problem.adapted(who)[1]] for who in ("fmkernels", "peft")}
    assert shapes["fmkernels"] == shapes["peft"]
    assert problem.operations() > 0 < problem.bytes_moved()
