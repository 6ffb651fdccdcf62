"""The benchmark tools: pairs, memory, peers, limits, pages. No test here asserts a speed."""

import json
import subprocess
import sys
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


def test_an_addition_is_the_median_of_paired_differences_over_the_first(monkeypatch):
    import measure

    times = {"search": [1.0, 2.0, 3.0], "labels": [3.0, 4.0, 9.0]}
    monkeypatch.setattr(measure, "interleaved", lambda functions, pairs: (times, {"others": 0.0}))
    added = measure.addition(search=None, labels=None)
    assert added["of"] == "(labels - search) / search"
    assert (added["low"], added["median"], added["high"]) == (100, 100, 300)
    assert added["ms"] == {"search": 2000, "labels": 4000}


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

    peak = measure.peak_extra_bytes("soft-sort-matrix-64", "fmkernels")
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
    from workload import INPUT_SETS

    step = tiny("neco-step").step("reference")
    gradients = [step() for _ in range(INPUT_SETS + 1)]
    assert torch.equal(gradients[0], gradients[-1])
    assert all(not torch.equal(gradients[0], other) for other in gradients[1:-1])


@pytest.fixture
def peers(monkeypatch):
    """peers(name, change): a peer whose results are changed."""
    from sort.providers import PROVIDERS, Provider

    def add(name, change):
        def changed(n, device):
            loss = PROVIDERS["reference"](n, device).soft_sort_cross_entropy
            return Provider(lambda x: x, lambda *scores: change(loss(*scores)))

        monkeypatch.setitem(PROVIDERS, name, changed)

    return add


def test_parity_refuses_what_errs_more_than_the_peer(peers, monkeypatch):
    import parity
    from sort.providers import PROVIDERS
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
    from sort import parity

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


def test_every_workload_of_the_sort_has_words_in_the_report():
    from sort.report import MEANING
    from sort.workloads import WORKLOADS

    assert list(MEANING) == list(WORKLOADS)


def test_workloads_have_one_name_each():
    import workloads

    suites = (workloads.SORT, workloads.KNN, workloads.FUNGI, workloads.VERA)
    assert len(workloads.WORKLOADS) == sum(map(len, suites))


def test_a_provider_that_takes_the_float32_path_leaves_everything_as_it_was():
    from knn.providers import PROVIDERS

    from fmkernels.ops.knn import config

    usual = config.has_fast_bfloat16, config.has_fast_int8
    queries, rows = torch.randn(2, 8), torch.randn(20, 8)
    search = PROVIDERS["fmkernels-float32"].searcher(rows, 3)
    assert search(queries, return_info=True)[2].path in ("float32", "reference")
    assert (config.has_fast_bfloat16, config.has_fast_int8) == usual


@pytest.mark.parametrize("ours", ["fmkernels", "fmkernels-unprepared", "fmkernels-float32"])
@pytest.mark.parametrize("peer", ["faiss", "faiss-unprepared", "torch-float32", "torch-bfloat16"])
def test_searches_agree_and_say_how_they_were_done(ours, peer):
    import parity

    facts = parity.check(tiny("knn-100k"), peer, ours=ours)
    assert facts["fallbacks"] == 0
    assert facts["candidates"] >= 4  # k of the tiny search
    assert 0 < facts.get("peer_recall", 1) <= 1


@pytest.fixture
def searcher(monkeypatch):
    """searcher(name, change): a provider whose results are changed."""
    from knn.providers import PROVIDERS

    def add(name, change):
        def changed(bank, k):
            search = PROVIDERS["faiss"].searcher(bank, k)
            return lambda queries: change(*search(queries))

        monkeypatch.setitem(PROVIDERS, name, PROVIDERS["faiss"]._replace(searcher=changed))

    return add


def test_parity_of_a_search_refuses_rows_that_are_not_the_nearest(searcher):
    import parity

    searcher("another row", lambda scores, indices: (scores, (indices + 1) % 50))
    with pytest.raises(AssertionError, match="not the nearest"):
        parity.check(tiny("knn-100k"), "faiss", ours="another row")


def test_parity_of_a_search_refuses_cosines_that_differ(searcher):
    import parity

    searcher("another cosine", lambda scores, indices: (scores + 1e-4, indices))
    with pytest.raises(AssertionError, match="cosines beside another cosine differ"):
        parity.check(tiny("knn-100k"), "another cosine")


def test_recall_counts_the_rows_that_a_peer_misses():
    from knn.parity import recall_of

    wanted = torch.tensor([[0, 1], [2, 3]])
    assert recall_of(torch.tensor([[1, 0], [9, 2]]), wanted) == 0.75


@pytest.mark.parametrize("name", ["hummingbird-voc", "hummingbird-voc-memory"])
def test_the_published_steps_give_what_ours_do(name):
    import parity

    assert parity.check(tiny(name), "published") == {}


def test_other_labels_and_memories_are_refused(monkeypatch):
    import parity
    from knn.in_context_providers import PROVIDERS

    def label(memory):
        labels = PROVIDERS["published"].labeller(memory)
        return lambda tokens: labels(tokens).roll(1, dims=0)

    def build(features, *rest):
        memory, labels = PROVIDERS["published"].builder(features, *rest)
        return memory.roll(1, dims=0), labels

    changed = PROVIDERS["fmkernels"]._replace(labeller=label, builder=build)
    monkeypatch.setitem(PROVIDERS, "changed", changed)
    with pytest.raises(AssertionError, match="beside published: error"):
        parity.check(tiny("hummingbird-voc"), "published", ours="changed")
    with pytest.raises(AssertionError, match="features beside published: error"):
        parity.check(tiny("hummingbird-voc-memory"), "published", ours="changed")


def test_masks_have_patches_of_several_classes_and_ignored_pixels():
    workload = tiny("hummingbird-voc-memory")
    from knn.in_context_providers import patches_of

    _, masks = workload.inputs(seed=0)
    classes = [len(patch.unique()) for patch in patches_of(masks, workload.side).flatten(0, 2)]
    assert {1, 3} <= set(classes)  # inside a region; two of them and their outline
    assert (masks == 255).any()


def test_published_patches_are_numbered_row_by_row():
    from knn.in_context_providers import patches_of

    mask = torch.arange(16).view(1, 4, 4)
    assert patches_of(mask, 2)[0, 0, 1].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("kind", ["random", "outlier channel", "photographs"])
def test_banks_of_the_candidates(kind):
    from knn.banks import KINDS

    import fmkernels

    queries, rows = KINDS[kind](4, 300)
    assert len(queries) == 4
    assert len(rows) == 300
    assert queries.shape[1] == rows.shape[1]
    *_, info = fmkernels.knn(queries, rows, 3, return_info=True)
    assert (info.candidates >= 3).all()


def ratio(median, path="bfloat16"):
    return {"median": median, "low": median, "high": median, "path": path, "candidates": 50}


ORIGIN = {"revision": "abc1234", "date": "2026-11-26"}


def test_what_is_asked_of_bfloat16_is_not_asked_of_another_cpu():
    from knn.limits import LIMITS

    with_it, without = (
        {"knn-100k": {"faiss": ratio(2.0, path)}} for path in ("bfloat16", "float32")
    )
    assert LIMITS[0].verdict(LIMITS[0].measured(with_it)) == "missed"
    assert LIMITS[0].measured(without) is None


def test_of_the_shapes_the_slowest_counts():
    from knn.limits import slowest_shape

    results = {"knn-100k": {"faiss": ratio(3.0)}, "knn-q1-k1": {"faiss": ratio(0.9)}}
    assert slowest_shape("faiss")(results)["median"] == 0.9
    with pytest.raises(KeyError):
        slowest_shape("faiss")({"knn-100k": {}})


def knn_content():
    machine = {"cpu": "Some CPU", "instruction set": "avx512", "bfloat16": "AMX", "threads": 2}
    machine |= {"torch": "2.13.0", "faiss-cpu": "1.15.1"}
    speeds = {"faiss": ratio(3.0), "faiss, fmkernels-float32": ratio(1.25, "float32")}
    alone = {"median_ms": 400.0, "product": "bfloat16"}
    alone |= {"share_of_matmul_rate": 0.5, "share_of_copy_rate": 0.1}
    peaks = {"fmkernels": 30_000_000, "published": 500_000_000}
    found = {"mean": 51.0, "most": 60, "queries": 512, "fallbacks": 0, "path": "bfloat16"}
    results = {
        "candidates": {"random": found},
        "hummingbird-voc": {"memory": {"peak_bytes": peaks}},
        "knn-100k": speeds | {"alone": alone, "faiss, avx2": ratio(2.5)},
    }
    for measurements in results.values():
        for facts in measurements.values():
            facts |= ORIGIN
    return {"machine": machine, "results": results}


def test_the_pages_of_the_search_say_what_was_measured():
    from suites import SUITES

    section, details = (
        "\n".join(part(knn_content())) for part in (SUITES["knn"].section, SUITES["knn"].details)
    )
    for text in (section, details):
        assert "**Some CPU, avx512, AMX, 2 threads, torch 2.13.0**, revision abc1234" in text
        assert "| its peak extra memory beside theirs | < 10 % | 6 % | met |" in text
        assert "Not measured here: " in text
    assert "| 2,048 × 384, k = 30 | 3 ×  | bfloat16 | 50 | 1.25 ×  |" in details
    assert "| `knn-100k` | 157 G | 80.7 MB | 195 µs | 50.0% (bfloat16) | 10.0% |" in details
    assert "| random normal numbers | bfloat16 | 51 | 60 | 0 of 512 |" in details
    assert "avx2 2.5 ×" in details


@pytest.mark.parametrize("peer", ["float32", "bfloat16", "fungivision"])
@pytest.mark.parametrize("ours", ["", "-packed", "-seeded", "-khatri-rao", "-kronecker"])
def test_projections_are_right_before_they_are_timed(ours, peer, monkeypatch):
    import parity
    from fungi.providers import PROVIDERS

    for name in ("fungi-kl-b-64", "fungi-simclr-4"):
        assert parity.check(tiny(name), peer, ours="fmkernels" + ours) == {}
    right = PROVIDERS[peer]
    wrong = right._replace(make=lambda *layer: lambda *pair: 1.1 * right.make(*layer)(*pair))
    monkeypatch.setitem(PROVIDERS, peer, wrong)
    with pytest.raises(AssertionError, match=rf"{peer} errs by 0\.[01]\S* of its result"):
        parity.check(tiny("fungi-kl-b-64"), peer, ours="fmkernels" + ours)


def test_the_limits_of_the_projections_and_their_page(tmp_path):
    from fungi.limits import LIMITS
    from suites import SUITES

    stored = {"fmkernels-packed": 3, "float32": 100}
    alone = {"median_ms": 0.05, "share_of_matmul_rate": 0.5, "share_of_copy_rate": 0.1}
    one = {"float32": ratio(1500.0), "float32, fmkernels-packed": ratio(9.0)}
    one |= {"stored": {"bytes": stored}, "alone": alone}
    results = {"fungi-kl-b-1": one, "fungi-kl-b-64": {"float32": ratio(400.0)}}
    found = [limit.measured(results) for limit in LIMITS]
    verdicts = [limit.verdict(x) for limit, x in zip(LIMITS, found, strict=True) if x]
    assert verdicts == ["met", "missed", "met", "met"]
    for measurements in results.values():
        for facts in measurements.values():
            facts |= ORIGIN
    content = {"machine": knn_content()["machine"], "results": results}
    details = "\n".join(SUITES["fungi"].details(content))
    assert "| `fungi-kl-b-1` | 1,500 ×  |  |  |" in details
    assert "| `fungi-kl-b-1` | 1.18 M | 9.22 kB | 50 µs | 50.0% |" in details
    assert "| packed signs beside the float32 matrix | ≤ 3.34 % | 3 % | met |" in details
    SUITES["fungi"].plot([content], tmp_path / "fungi.png")
    assert (tmp_path / "fungi.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_of_the_projections(capsys):
    from fungi import sketches

    sketches.variances(seeds=60, ranks=(1, 12))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip(" `") for row in rows] == list(sketches.KINDS)
    measured = {row[0].strip(" `"): float(row[1].split()[0]) for row in rows}
    assert measured["Kronecker"] > 3 * measured["CountSketch"]  # 16 times in the formula
    found = sketches.accuracies(seed=0, views=1)
    assert set(found) == {"embeddings", "exact", *sketches.KINDS}
    assert min(found.values()) > 85
    assert found["exact"] > found["CountSketch"] - 1 > found["Kronecker"] - 1


def test_the_plot_of_the_search(tmp_path):
    from suites import SUITES

    SUITES["knn"].plot([knn_content()], tmp_path / "knn.png")
    assert (tmp_path / "knn.png").read_bytes()[:4] == b"\x89PNG"


def test_a_benchmark_saves_results_that_the_next_one_adds_to(tmp_path):
    """In a process, because benchmarks have a conftest.py of their own."""
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-o", "addopts="]
    command += ["--rootdir", str(BENCHMARKS), "-c", str(BENCHMARKS / "pytest.ini")]
    command += ["--save-results", str(tmp_path)]
    for kind in ("random", "photographs"):
        run = [*command, "-k", f"candidates and {kind}"]
        subprocess.run(run, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("knn-")
    content = json.loads(path.read_text())
    assert content["machine"]["faiss-cpu"]
    assert list(content["results"]["candidates"]) == ["random", "photographs"]
