"""The benchmark tools: pairs, intervals, memory, peers, limits. No test here asserts a speed."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PROVIDERS = ("fmkernels", "reference", "diffsort")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def limit():
    from limits import Limit

    return Limit("speed", "≥ 100 ×", lambda results: results["neco-step"]["diffsort"])


def tiny(name):
    from workloads import WORKLOADS

    return WORKLOADS[name].tiny()


def test_the_same_code_against_itself_has_an_interval_around_its_median():
    import measure

    x = torch.randn(64, 64)
    ratio = measure.ratio(one=lambda: x @ x, other=lambda: x @ x, pairs=9)
    assert ratio["of"] == "one / other"
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert ratio["pairs"] == 9
    assert list(ratio["ms"]) == ["one", "other"]


def test_a_ratio_is_the_first_over_the_second():
    import measure

    x = torch.randn(512, 512)
    ratio = measure.ratio(much=lambda: x @ x, little=lambda: x.shape, pairs=3)
    assert ratio["low"] > 1


def test_bootstrap_of_a_constant():
    import measure

    assert measure.bootstrap([2.0] * 9) == (2.0, 2.0)


def test_bytes_kept_leaves_out_the_inputs():
    import measure

    x = torch.randn(10, requires_grad=True)
    assert measure.bytes_kept(lambda: x.exp(), x) == 40
    assert measure.bytes_kept(lambda: x * 2.0, x) == 0


def test_peak_memory_of_a_step():
    import measure

    peak = measure.peak_extra_bytes("workloads", "soft-sort-matrix-64", "fmkernels", processes=1)
    matrix = 392 * 64 * 64 * 4
    assert peak > matrix - 64 * 4096  # a few of its pages may have been resident before
    assert peak < 2 * matrix


@pytest.mark.parametrize(
    "name", ["neco-step", "neco-features", "neco-loss", "soft-sort-matrix", "soft-sort-values"]
)
def test_all_providers_compute_the_same(name):
    steps = [tiny(name).step(provider, torch.float64) for provider in PROVIDERS]
    for _ in range(2):
        ours, reference, peer = (step() for step in steps)
        torch.testing.assert_close(ours, reference)
        torch.testing.assert_close(peer, reference)


def test_inputs_rotate():
    from workloads import INPUT_SETS

    step = tiny("neco-step").step("reference")
    gradients = [step() for _ in range(INPUT_SETS + 1)]
    assert torch.equal(gradients[0], gradients[-1])
    assert all(not torch.equal(gradients[0], other) for other in gradients[1:-1])


@pytest.fixture
def peers(monkeypatch):
    """peers(name, change): a peer whose results are changed."""
    from providers import PROVIDERS, Provider

    def add(name, change):
        def changed(n, device):
            loss = PROVIDERS["reference"](n, device).soft_sort_cross_entropy
            return Provider(lambda x: x, lambda *scores: change(loss(*scores)))

        monkeypatch.setitem(PROVIDERS, name, changed)

    return add


def test_parity_refuses_what_errs_more_than_the_peer(peers, monkeypatch):
    import parity
    from providers import PROVIDERS
    from workloads import Sorting

    workload = Sorting(50, 9)
    assert parity.check(workload, "diffsort") == {}
    peers("wrong", lambda loss: 1.001 * loss)
    monkeypatch.setitem(PROVIDERS, "fmkernels", PROVIDERS["wrong"])
    with pytest.raises(AssertionError, match="gradient beside diffsort"):
        parity.check(workload, "diffsort")


def test_a_peer_that_is_not_finite_allows_nothing_and_is_recorded(peers):
    import parity
    from workloads import Sorting

    peers("broken", lambda loss: loss * torch.nan)
    assert parity.check(Sorting(50, 9), "broken") == {"peer_not_finite": 450}


def test_log_errors_are_of_what_lies_above_the_floor():
    import parity

    exact = torch.tensor([1.0, 0.5, 2.0**-101], dtype=torch.float64)
    found = torch.tensor([1.0, 0.5 * 2.0**0.5, 1.0])
    errors = parity.log_errors(found, exact)
    half = 0.5 * torch.tensor(2.0).log().item()
    assert errors == {"mean": pytest.approx(half / 2, 1e-3), "largest": pytest.approx(half, 1e-3)}


@pytest.mark.parametrize(
    ("low", "median", "high", "verdict"),
    [(90, 100, 110, "met"), (90, 99, 110, "undecided"), (90, 95, 99, "missed")],
)
def test_a_limit_is_missed_only_by_the_whole_interval(limit, low, median, high, verdict):
    figure = {"low": low, "median": median, "high": high}
    assert limit.measured({"neco-step": {"diffsort": figure}}) == figure
    assert limit.verdict(figure) == verdict


def test_nothing_is_decided_on_a_busy_machine(limit):
    assert limit.verdict({"low": 500, "median": 500, "high": 500, "others": 0.5}) == "undecided"


def test_a_limit_on_what_was_not_measured(limit):
    assert limit.measured({}) is None


def test_every_workload_has_words_in_the_report():
    import report
    from workloads import WORKLOADS

    assert list(report.MEANING) == list(WORKLOADS)
