"""Digits, their small network, and the features and similarities of its gradients."""

import statistics

import pytest
import torch
from small_digits import shrink
from torch.nn import functional as F

pytest.importorskip("sklearn")

from fmkernels.api import KNNClassifier
from fmkernels.demo import digits, gradient_features, gradient_similarities

ROWS = {"KL": 1, "DINO": 12, "SimCLR": 9}


@pytest.fixture
def few(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def prepared(few):
    """Data, an extractor of an untrained network, gradients of both halves, embeddings."""
    model, data = digits.start(0)
    fungi = gradient_features.extractor(model, 0).fit_negatives(data.train)
    both = gradient_features.gradients(fungi, data)
    return data, fungi, both, gradient_features.embeddings(model, data)


def test_the_halves_share_no_digit_and_seeds_only_order_the_first():
    first, again, other = digits.halves(0), digits.halves(0), digits.halves(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first.test, other.test)
    assert not torch.equal(first.train, other.train)

    def rows(images):
        return sorted(image.numpy().tobytes() for image in images)

    assert rows(first.train) == rows(other.train)
    assert not {*rows(first.train)} & {*rows(first.test)}
    assert len(first.train) + len(first.test) == 1797
    assert (first.train.min(), first.train.max()) == (0, 1)


@torch.no_grad()
def found_again(model, images):
    """Share of digits whose embedding is the nearest to that of another view of them."""
    one, other = (F.normalize(model(digits.random_view(images)), dim=1) for _ in range(2))
    return ((one @ other.mT).argmax(dim=1) == torch.arange(len(images))).double().mean().item()


def test_training_brings_views_of_a_digit_together():
    model, data = digits.start(0)
    before = found_again(model, data.test)
    losses = digits.pretrain(model, data.train, 40)
    assert not model.training
    assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 1  # 5.4 to 3.4 when written
    assert found_again(model, data.test) > 2 * before  # 0.03 to 0.11


def test_views_keep_a_digit_in_sight():
    data = digits.halves(0)
    views = digits.random_view(data.train)
    assert views.shape == data.train.shape
    ink = views.clamp(0, 1).mean(dim=(1, 2, 3)) / data.train.mean(dim=(1, 2, 3))
    assert 0.7 < ink.median() < 1.5
    assert (views - data.train).abs().mean() > 0.05


def test_only_class_tokens_have_a_gradient(prepared):
    _, _, both, _ = prepared
    for factors, images in zip(both, (60, 40), strict=True):
        assert {name: tuple(delta.shape) for name, (delta, _) in factors.items()} == {
            name: (images, rows, digits.DIM) for name, rows in ROWS.items()
        }


def built(delta, activation):
    """(B, out · (in + 1)): the gradients themselves, in float64."""
    with_bias = F.pad(activation.double(), (0, 1), value=1.0)
    return (delta.double().mT @ with_bias).flatten(1)


def test_exact_and_sketched_cosines_are_those_of_the_gradients(prepared):
    _, _, (train, test), _ = prepared
    exact = gradient_similarities.exact_cosines(test, train)
    for name in ROWS:
        g, h = (F.normalize(built(*factors[name]), dim=1) for factors in (test, train))
        assert (exact[name] - g @ h.mT).abs().max() < 1e-5  # norms to 40 rows, summed in float32
    for kind in gradient_similarities.SKETCHES:
        projection = gradient_similarities.sketch(kind, 48, 7)
        matrix = projection.materialize().double()
        found = gradient_similarities.sketched_cosines(test, train, projection)
        for name in ROWS:
            g, h = (F.normalize(built(*own[name]) @ matrix.mT, dim=1) for own in (test, train))
            assert (found[name] - g @ h.mT).abs().max() < 1e-5, (kind, name)


def test_the_vote_is_that_of_the_classifier(prepared):
    data, _, _, embeddings = prepared
    train, test = embeddings
    expected = KNNClassifier().fit(train, data.train_labels).score(test, data.test_labels)
    found = gradient_similarities.accuracy(test @ train.mT, data.train_labels, data.test_labels)
    assert found == pytest.approx(expected)


def test_features_are_the_blocks_of_the_extractor(prepared):
    data, fungi, (train, _), embeddings = prepared
    found = gradient_features.features(fungi, data)
    torch.testing.assert_close(found["embedding + all"][0], fungi(data.train))
    for side, own in zip(embeddings, found["embedding"], strict=True):
        torch.testing.assert_close(own, side)
    sketch = fungi.state.projection
    rows = gradient_similarities.projected(train, sketch)
    for name, own in zip(ROWS, rows, strict=True):
        torch.testing.assert_close(found[name][0], F.normalize(own, dim=1))
    pair = torch.cat([found["embedding"][1], found["KL"][1]], dim=1)
    torch.testing.assert_close(found["embedding + KL"][1], pair)


def test_effective_ranks_and_variances_are_those_of_the_formulas():
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(digits.DIM, 4)).Q.mT[None]
    factors = {
        "one": (rows[:, :1], torch.ones(1, 1, digits.DIM)),
        "four": (rows, 100 * torch.linalg.qr(torch.randn(digits.DIM, 4)).Q.mT[None]),
    }
    ranks = {name: gradient_similarities.effective_ranks(*own) for name, own in factors.items()}
    assert ranks["one"].item() == pytest.approx(1, rel=1e-4)
    assert ranks["four"].item() == pytest.approx(4, rel=1e-2)  # the bias adds a little
    for kind in gradient_similarities.SKETCHES:
        measured = gradient_similarities.variances(factors, kind, 16, 600)
        for name, rank in ranks.items():
            expected = gradient_similarities.variance_formula(kind, 16, rank).item()
            # 600 draws of a heavy-tailed number: a standard deviation of about 10 %
            assert measured[name] == pytest.approx(expected, rel=0.35), (kind, name)


def test_runs_and_reports(few):
    lines = []
    report = gradient_features.run(2, steps=3, say=lines.append)
    assert len(lines) == 2
    assert list(report.full) == list(report.few_shot)
    assert list(report.similarities) == list(gradient_similarities.KINDS)
    accuracies = [*report.full.values(), *report.few_shot.values()]
    accuracies += [own for scores in report.similarities.values() for own in scores.values()]
    assert all(len(own) == 2 and 0 < min(own) <= max(own) <= 1 for own in accuracies)
    gains = report.gains("embedding + KL", few=True)
    expected = torch.tensor(report.few_shot["embedding + KL"])
    expected = expected - torch.tensor(report.few_shot["embedding"])
    assert gains == pytest.approx(expected.tolist())

    by_features, by_gradients = gradient_features.tables(report)
    assert {len(row) for row in by_features} == {5}
    assert [row[0] for row in by_features[1:]] == list(report.full)
    assert [row[0] for row in by_gradients[1:]] == list(gradient_similarities.KINDS)
    assert all("±" in cell for row in by_gradients[1:] for cell in row[1:])


def test_spread():
    assert gradient_features.spread([0.5]) == "50.0"
    assert gradient_features.spread([0.5, 0.51]) == "50.5 ± 0.7"
    assert gradient_features.spread([0.01, 0.03], "+") == "+2.0 ± 1.4"
