"""The demo on a small setting; what it says where a package is missing."""

import importlib.util
import os

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")

from fmkernels import _library, cli, demo
from fmkernels.demo import comparison, photographs, training

has_photographs = pytest.mark.skipif(not photographs.load(), reason="needs the extra demo")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(comparison, "ROWS", 16)
    monkeypatch.setattr(comparison, "PAIRS", 1)
    monkeypatch.setattr(comparison, "peak_bytes", lambda package: 10**6)
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "QUERIES", 30)


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
def test_trains_draws_and_compares(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("diffsort")
    monkeypatch.setattr(comparison, "busy_cores", lambda: 1.5)
    picture = tmp_path / "picture.png"
    assert demo.run(picture, steps=20) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for words in (
        "rank correlation",
        "time of a step",
        "peak extra memory",
        "threads",
        "one thread",
    ):
        assert words in output


@has_photographs
@pytest.mark.usefixtures("small")
def test_goes_on_without_matplotlib_and_diffsort(tmp_path, capsys, hide):
    hide("matplotlib", "diffsort")
    assert demo.run(tmp_path / "picture.png", steps=20) == 0
    assert list(tmp_path.iterdir()) == []
    output = capsys.readouterr().out
    assert "pip install matplotlib" in output
    assert "pip install diffsort" in output


def test_says_what_to_install_without_photographs(capsys, hide):
    hide("sklearn", "skimage")
    assert demo.run(None, steps=1) == 1
    assert "pip install scikit-learn scikit-image" in capsys.readouterr().out


@has_photographs
def test_an_untrained_student_fails_the_demo(small, capsys, monkeypatch):
    monkeypatch.setattr(training.Experiment, "step", lambda self: 0.0)
    assert demo.run(None, steps=1) == 1


@has_photographs
def test_queries_are_never_trained_on():
    for name, photo in photographs.load().items():
        marked = torch.zeros_like(photo)
        marked[:, :, : photographs.border(photo)] = 1
        assert photographs.held_out(marked).min() == 1, name
        assert photographs.for_training(marked).max() == 0, name
        assert photographs.random_crop(marked).max() == 0, name
    grids = {name: photographs.held_out(photo) for name, photo in photographs.load().items()}
    for name, row, column in demo.SHOWN:
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


def test_busy_cores():
    assert 0 <= comparison.busy_cores(seconds=0.1) <= os.cpu_count() + 1


def test_peak_memory_of_a_fresh_process():
    peak = comparison.peak_bytes("fmkernels")
    assert peak is None or peak < (10e6 if _library.native else 500e6)


@pytest.mark.parametrize("picture", ["picture.xyz", "no/such/folder/picture.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_training(picture, capsys):
    assert cli.main(["demo", "--picture", picture]) == 2
    assert "demo: --picture: expected a .png file in a folder that exists" in capsys.readouterr().err


def test_a_filter_that_fits_no_benchmark_is_said(capfd):
    assert cli.main(["bench", "nosuch"]) == 1
    assert "bench: no benchmark's name has 'nosuch'; see --list" in capfd.readouterr().err
