"""The confusion matrix: counts, IoU, both matchings, beside the published loops and scikit-learn."""

import itertools
import sys

import numpy as np
import pytest
import torch

from fmkernels.api import ConfusionMatrix, segmentation_metrics


def random_labels(shape, classes, predicted, seed=0):
    """Prediction and target that agree more often than not, a tenth of the target ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, shape, generator=generator)
    other = torch.randint(predicted, shape, generator=generator)
    agree = torch.rand(shape, generator=generator) < 0.6
    prediction = torch.where(agree, (target * 7 + 3) % predicted, other)
    ignored = torch.rand(shape, generator=generator) < 0.1
    return prediction, target.masked_fill(ignored, 255)


def published(gt, pred, num_gt, num_pred, match):
    """mIoU as Leopart's and NeCo's evaluations compute it, with one pass over the pixels per pair.

    ``match`` is "none", "hungarian", "many_to_one" or "many_to_one_iou".
    """

    def score(of, by):
        both = np.sum((gt == of) & (pred == by))
        false = np.sum((gt != of) & (pred == by))
        missed = 0 if match == "many_to_one" else np.sum((gt == of) & (pred != by))
        return both / max(both + false + missed, 1e-8)

    renamed = np.zeros(len(pred), dtype=int)
    if match == "none":
        renamed = pred
    elif match == "hungarian":  # by trying all permutations, not SciPy's way
        scores = np.array([[score(of, by) for by in range(num_pred)] for of in range(num_gt)])
        best = max(
            itertools.permutations(range(num_pred), num_gt),
            key=lambda order: sum(scores[of, by] for of, by in enumerate(order)),
        )
        for of, by in enumerate(best):
            renamed[pred == by] = of
    else:
        for by in range(num_pred):
            renamed[pred == by] = max(range(num_gt), key=lambda of, by=by: (score(of, by), -of))
    overlaps = []
    for of in range(num_gt):
        hits = np.sum((gt == of) & (renamed == of))
        union = np.sum((gt == of) | (renamed == of))
        overlaps.append(hits / max(union, 1e-8))
    return np.mean(overlaps)


def filled(prediction, target, classes, **settings):
    confusion = ConfusionMatrix(classes, **settings)
    confusion.update(prediction, target)
    return confusion


def test_by_hand():
    confusion = ConfusionMatrix(4)
    confusion.update(torch.tensor([[0, 0, 1], [1, 2, 0]]), torch.tensor([[0, 1, 1], [255, 2, 0]]))
    assert confusion.matrix.tolist() == [[2, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert confusion.iou()[:3].tolist() == [2 / 3, 1 / 2, 1.0]
    assert confusion.iou()[3].isnan()  # in neither
    assert confusion.miou() == pytest.approx((2 / 3 + 1 / 2 + 1) / 3, abs=1e-15)
    assert confusion.miou("zero") == pytest.approx((2 / 3 + 1 / 2 + 1) / 4, abs=1e-15)
    assert confusion.accuracy() == 4 / 5
    confusion.update(torch.tensor([3]), torch.tensor([0]))
    assert confusion.iou()[3] == 0  # predicted, though never there: it counts
    assert repr(confusion).endswith("num_predicted=4): 6 pixels")


def test_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    prediction, target = random_labels((4, 1, 31, 17), 6, 6)
    confusion = filled(prediction, target, 6)
    kept = target != 255
    expected = metrics.confusion_matrix(target[kept], prediction[kept], labels=range(6))
    assert confusion.matrix.tolist() == expected.tolist()
    overlaps = metrics.jaccard_score(target[kept], prediction[kept], average=None)
    assert confusion.iou().tolist() == pytest.approx(overlaps.tolist(), abs=1e-15)
    assert confusion.accuracy() == metrics.accuracy_score(target[kept], prediction[kept])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_batches_shapes_and_dtypes_do_not_matter(dtype, monkeypatch):
    prediction, target = random_labels((3, 20, 14), 5, 5)
    expected = filled(prediction, target, 5).matrix
    monkeypatch.setattr(segmentation_metrics, "PIXELS", 37)
    streamed = ConfusionMatrix(5)
    for predicted, wanted in zip(prediction, target, strict=True):
        streamed.update(predicted.to(dtype).T, wanted.to(dtype).T)  # not contiguous
    assert torch.equal(streamed.matrix, expected)
    assert streamed.matrix.dtype == torch.int64
    streamed.update(prediction[:0], target[:0])
    streamed.update(torch.tensor(3), torch.tensor(255))
    assert torch.equal(streamed.matrix, expected)


def test_merge_adds():
    first, second = (filled(*random_labels((50,), 4, 4, seed), 4) for seed in (0, 1))
    both = first.matrix + second.matrix
    first.merge(second)
    assert torch.equal(first.matrix, both)
    with pytest.raises(ValueError, match=r"other: expected \(4, 4\) .* got \(4, 5\)"):
        first.merge(ConfusionMatrix(4, num_predicted=5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["hungarian", "many_to_one", "many_to_one_iou"])
@pytest.mark.parametrize("predicted", [4, 7])
def test_matchings_agree_with_the_published_loops(kind, predicted, seed):
    prediction, target = random_labels((300,), 4, predicted, seed)
    confusion = filled(prediction, target, 4, num_predicted=predicted)
    kept = (target != 255).numpy()
    gt, pred = target.numpy()[kept], prediction.numpy()[kept]
    expected = published(gt, pred, 4, predicted, kind)
    matching = confusion.matched(kind)
    assert matching.miou("zero") == pytest.approx(expected, abs=1e-12)
    assignment, iou = matching
    assert assignment.dtype == torch.int64
    renamed = filled(assignment[prediction], target, 4)
    assert torch.equal(renamed.iou(), iou)
    if predicted == 4:
        unmatched = published(gt, pred, 4, 4, "none")
        assert confusion.miou("zero") == pytest.approx(unmatched, abs=1e-12)
        assert expected > unmatched + 0.1  # so that the test would see a matching that does nothing


def test_leftover_clusters_are_background_or_nothing():
    target = torch.tensor([0, 0, 0, 1, 1, 1])
    prediction = torch.tensor([2, 2, 2, 0, 0, 1])
    confusion = filled(prediction, target, 2, num_predicted=3)
    background = confusion.matched()
    assert background.assignment.tolist() == [1, 0, 0]
    assert background.iou.tolist() == [3 / 4, 2 / 3]
    nothing = confusion.matched(unmatched=None)
    assert nothing.assignment.tolist() == [1, -1, 0]
    assert nothing.iou.tolist() == [1, 2 / 3]
    many = confusion.matched("many_to_one")
    assert many.assignment.tolist() == [1, 1, 0]
    assert many.iou.tolist() == [1, 1]
    assert many.miou() == 1


def test_fewer_clusters_than_classes():
    confusion = filled(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2]), 3, num_predicted=2)
    assignment, iou = confusion.matched()
    assert assignment.tolist() in ([0, 2], [1, 2])  # IoU 1/2 in both cases
    assert sorted(iou.tolist()) == [0, 0.5, 1]


def test_precision_and_iou_may_disagree_and_ties_go_to_the_lower_class():
    target = torch.tensor([0] * 10 + [1] * 2)
    prediction = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    confusion = filled(prediction, target, 2, num_predicted=4)
    assert confusion.matched("many_to_one").assignment.tolist() == [0, 0, 0, 0]
    # cluster 0: IoU 3/12 with class 0, 2/5 with class 1
    assert confusion.matched("many_to_one_iou").assignment.tolist() == [1, 0, 0, 0]
    tied = filled(torch.tensor([0, 0, 0, 0]), torch.tensor([2, 1, 1, 2]), 3, num_predicted=1)
    assert tied.matched("many_to_one").assignment.tolist() == [1]


def test_nothing_counted():
    confusion = ConfusionMatrix(2)
    assert all(np.isnan(value) for value in (confusion.miou(), confusion.miou("zero")))
    assert np.isnan(confusion.accuracy())
    assert np.isnan(confusion.matched().miou())


def test_a_class_may_be_the_ignored_one():
    """As in the published evaluations of ADE20K: 151 classes, of which 0 is left out."""
    confusion = filled(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2, ignore_index=0)
    assert confusion.matrix.tolist() == [[0, 0], [0, 1]]
    assert filled(torch.tensor([1]), torch.tensor([1]), 2, ignore_index=None).miou() == 1


def test_refusals_count_nothing(monkeypatch):
    monkeypatch.setattr(segmentation_metrics, "PIXELS", 2)
    confusion = ConfusionMatrix(3, num_predicted=4)
    good = torch.tensor([0, 1, 2])
    cases = (
        (good, torch.tensor([0, 1, 3]), ValueError, r"target: .* 0 to 2, or 255 .*, got 3"),
        (good, torch.tensor([0, 1, -1]), ValueError, r"target: .*, got -1"),
        (torch.tensor([0, 1, 4]), good, ValueError, r"prediction: .* from 0 to 3, got 4"),
        (good, good[:2], ValueError, r"target: expected the shape of prediction, \(3,\)"),
        (good.float(), good, TypeError, r"prediction: expected integer .*argmax"),
        (good, good > 1, TypeError, r"target: expected integer classes, got torch.bool"),
        (good, [0, 1, 2], TypeError, r"target: expected a torch.Tensor, got list"),
        (good, good.to("meta"), ValueError, r"target: expected the device of prediction"),
    )
    for prediction, target, error, words in cases:
        with pytest.raises(error, match="ConfusionMatrix: " + words):
            confusion.update(prediction, target)
    assert not confusion.matrix.any()
    confusion.update(torch.tensor([77, 1]), torch.tensor([255, 1]))  # nobody looks at the 77
    for method in (confusion.iou, confusion.miou, confusion.accuracy):
        with pytest.raises(ValueError, match=r"got 4 and 3; use matched"):
            method()
    with pytest.raises(ValueError, match="kind: expected one of hungarian"):
        confusion.matched("greedy")
    with pytest.raises(ValueError, match="unmatched: expected a class from 0 to 2"):
        confusion.matched(unmatched=3)
    with pytest.raises(ValueError, match="absent: expected one of skip, zero"):
        ConfusionMatrix(2).miou("nan")
    with pytest.raises(ValueError, match="num_classes: expected an integer >= 1"):
        ConfusionMatrix(0)
    with pytest.raises(TypeError, match="ignore_index: expected an integer or None"):
        ConfusionMatrix(2, 1.5)


def test_without_scipy_only_the_hungarian_matching_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    confusion = filled(torch.tensor([0, 1]), torch.tensor([1, 0]), 2)
    assert confusion.matched("many_to_one").miou() == 1
    with pytest.raises(ImportError, match=r"needs scipy, .* pip install scipy"):
        confusion.matched()
