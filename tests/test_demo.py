"""The demo on a small setting; what it says where a package is missing."""

import functools
import importlib.util
import os

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")

from rich.console import Console

from fmkernels import _library, cli, demo
from fmkernels.demo import (
    adapters,
    beside_faiss,
    classify_digits,
    comparison,
    gradient_features,
    in_context,
    learn_order,
    photographs,
    segment_scenes,
    timing,
    training,
)

has_photographs = pytest.mark.skipif(not photographs.load(), reason="needs the extra demo")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(comparison, "ROWS", 16)
    monkeypatch.setattr(comparison, "PAIRS", 1)
    monkeypatch.setattr(comparison, "peak_bytes", lambda package: 10**6)
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "QUERIES", 30)
    monkeypatch.setattr(beside_faiss, "ROWS", 300)
    monkeypatch.setattr(beside_faiss, "QUERIES", 20)
    monkeypatch.setattr(beside_faiss, "PAIRS", 1)
    monkeypatch.setattr(timing, "busy_cores", lambda: 1.5)
    monkeypatch.setattr(in_context, "run", in_context_report)
    monkeypatch.setattr(gradient_features, "run", gradient_report)
    monkeypatch.setattr(adapters, "run", adapters_part)


def in_context_report(seeds, steps, neco_steps, *, pictures, say):
    """What part 3 computes for half a minute; test_in_context_demo.py has the real one."""
    say("   400 patches in the memory: mIoU 0.250")
    for name in in_context.PICTURES if pictures is not None else ():
        (pictures / name).touch()
    return in_context.Report({400: 0.25, 28800: 0.375}, [0.125], [0.375], [0.5], [0.625])


def gradient_report(seeds, steps, *, say, embedding=0.75):
    """What part 5 computes for half a minute; test_fungi_demo.py has the real one."""
    say("seed 0")
    scores = {"untrained embedding": [0.5], "embedding": [embedding], "embedding + all": [0.875]}
    return gradient_features.Report(scores, scores, {"exact": {"KL": [0.625]}})


def adapters_part(console):
    """What part 6 does for half a minute; test_finetuning_demo.py has the real one."""
    console.print("Encoders are fine-tuned")
    return True


@pytest.fixture
def hide(monkeypatch):
    find = importlib.util.find_spec

    def hide(*packages):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name in packages else find(name, *rest),
        )

    return hide


@has_photographs
@pytest.mark.usefixtures("small")
def test_all_parts(tmp_path, capsys):
    for package in ("matplotlib", "diffsort", "faiss"):
        pytest.importorskip(package)
    assert demo.run(tmp_path, steps=20) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in_context.png",
        "in_context_neighbors.png",
        "neco_demo.png",
    ]
    assert (tmp_path / "neco_demo.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for words in (
        "1. A student",
        "rank correlation",
        "2. The same step",
        "time of a step",
        "peak extra memory",
        "one thread",
        "3. Scenes of digits",
        "28,800",
        "steps of NeCoLoss, without labels        │ 0.625",
        "4. The 30 most alike of 300 patches",
        "make the bank ready, search",
        "neighbours that are the same (recall)",
        "5. Digits get the labels",
        "embedding + all     │       87.5 │ +12.5",
        "exact                     │ 62.5",
        "6. Encoders are fine-tuned",
    ):
        assert words in output
    assert torch.get_num_threads() == 1


@has_photographs
@pytest.mark.usefixtures("small")
def test_goes_on_without_what_is_missing(tmp_path, capsys, hide):
    hide("matplotlib", "diffsort", "faiss")
    assert demo.run(tmp_path, steps=20) == 0
    assert list(tmp_path.iterdir()) == []
    output = capsys.readouterr().out
    assert "no picture: matplotlib is missing: pip install matplotlib" in output
    assert "no pictures: matplotlib is missing" in output
    assert "left out: diffsort is missing: pip install diffsort" in output
    assert "left out: faiss-cpu is missing: pip install faiss-cpu" in output


@has_photographs
@pytest.mark.usefixtures("small")
def test_only_some_parts(capsys):
    assert cli.main(["demo", "--no-pictures", "--parts", "3", "3"]) == 0
    output = capsys.readouterr().out
    assert "3. Scenes" in output
    assert "1. " not in output
    assert "picture" not in output


def test_says_what_to_install_without_photographs(capsys, hide):
    hide("sklearn", "skimage")
    assert demo.run(None, steps=1) == 1
    assert "pip install scikit-learn scikit-image" in capsys.readouterr().out


def test_digits_need_scikit_learn(capsys, hide):
    hide("sklearn")
    words = "left out: scikit-learn is missing: pip install scikit-learn"
    assert segment_scenes.run(Console(width=100), None)
    assert words in capsys.readouterr().out
    assert classify_digits.run(Console(width=100))
    assert words in capsys.readouterr().out
    assert adapters.run(Console(width=100))
    assert words in capsys.readouterr().out


@has_photographs
@pytest.mark.usefixtures("small")
def test_a_part_that_does_not_show_its_point_fails_the_demo(capsys, monkeypatch):
    monkeypatch.setattr(training.Experiment, "step", lambda self: 0.0)
    report = in_context.Report({400: 0.1}, [0.2], [0.1], [0.1], [0.1])
    monkeypatch.setattr(in_context, "run", lambda *settings, **rest: report)
    worse = functools.partial(gradient_report, embedding=0.25)
    monkeypatch.setattr(gradient_features, "run", worse)
    assert demo.run(None, steps=1, parts=(1, 3, 5)) == 1
    assert "demo: part 1 and 3 and 5: expected a better result" in capsys.readouterr().out


@has_photographs
def test_queries_are_never_trained_on():
    for name, photo in photographs.load().items():
        marked = torch.zeros_like(photo)
        marked[:, :, : photographs.border(photo)] = 1
        assert photographs.held_out(marked).min() == 1, name
        assert photographs.for_training(marked).max() == 0, name
        assert photographs.random_crop(marked).max() == 0, name
    grids = {name: photographs.held_out(photo) for name, photo in photographs.load().items()}
    for name, row, column in learn_order.SHOWN:
        assert grids[name][row, column].shape == (3, photographs.PATCH, photographs.PATCH)


def test_both_packages_give_the_same_step():
    pytest.importorskip("diffsort")
    student, teacher = comparison.scores(torch.float64)
    rows = slice(0, 8)
    steps = [
        step(student[rows].detach().requires_grad_(), teacher[rows])
        for step in comparison.STEPS.values()
    ]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-15)


@has_photographs
def test_patches_of_the_search():
    bank, queries = beside_faiss.patches()
    assert bank.shape == (20_000, 384)
    assert queries.shape == (1024, 384)
    for rows in (bank, queries):
        assert rows.view(-1, 3, 128).mean(dim=2).abs().max() < 1e-6  # 0 but for rounding
    photo = torch.arange(3 * 12 * 32, dtype=torch.float32).view(3, 12, 32)
    cut = beside_faiss._cut(photo)
    assert len(cut) == 2 * 3  # half a patch apart: rows 0 and 4, columns 0, 8 and 16
    last = photo[:, 4:12, 16:32]
    torch.testing.assert_close(cut[-1].view(3, 8, 16), last - last.mean(dim=(1, 2), keepdim=True))


@has_photographs
@pytest.mark.usefixtures("small")
def test_a_search_that_differs_from_faiss_is_noticed(monkeypatch):
    faiss = pytest.importorskip("faiss")
    console = Console(quiet=True)
    assert beside_faiss.run(console)
    before = faiss.omp_get_max_threads()
    found = beside_faiss.compare(torch.randn(50, 8), torch.randn(5, 8))
    assert faiss.omp_get_max_threads() == before
    assert found.recall == 1
    assert found.difference < 1e-6  # rounding of cosines
    assert 0 < found.candidates <= 50

    class HalfWrong(faiss.IndexFlatIP):
        def search(self, queries, k):
            scores, rows = super().search(queries, k)
            rows[:, ::2] = -1
            return scores - 1, rows

    monkeypatch.setattr(faiss, "IndexFlatIP", HalfWrong)
    found = beside_faiss.compare(torch.randn(50, 8), torch.randn(5, 8))
    assert found.recall == 0.5
    assert found.difference > 0.9
    assert not beside_faiss.run(console)


def test_interleaved_pairs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order = []

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds

    def pairs(budget_s):
        order.clear()
        return timing.interleaved(
            lambda: call("theirs", 6.0), lambda: call("ours", 2.0), pairs=4, budget_s=budget_s
        )

    assert pairs(100) == (6.0, 2.0, 3.0, 4)
    assert order[2:] == ["theirs", "ours", "ours", "theirs"] * 2
    assert pairs(1) == (6.0, 2.0, 3.0, 3)


def test_busy_cores(monkeypatch):
    assert 0 <= timing.busy_cores(seconds=0.1) <= os.cpu_count() + 1
    torch.set_num_threads(2)
    monkeypatch.setattr(timing, "busy_cores", lambda: 0.1)
    with timing.spare_threads() as note:
        assert (note, torch.get_num_threads()) == ("", 2)
    monkeypatch.setattr(timing, "busy_cores", lambda: 1.26)
    with timing.spare_threads() as note:
        assert "Other programs use 1.3 cores" in note
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_peak_memory_of_a_fresh_process():
    peak = comparison.peak_bytes("fmkernels")
    assert peak is None or peak < (10e6 if _library.native else 500e6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pictures", "no/such/folder"], "--pictures: expected a folder that exists, got 'no"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_before_the_training(arguments, words, capsys):
    assert cli.main(["demo", *arguments]) == 2
    assert f"demo: {words}" in capsys.readouterr().err


def test_a_filter_that_fits_no_benchmark_is_said(capfd):
    assert cli.main(["bench", "nosuch"]) == 1
    assert "bench: no benchmark's name has 'nosuch'; see --list" in capfd.readouterr().err
