"""Label propagation: against the sum written out, every kind of labels, memory, refusals."""

import pytest
import torch
from neighbors import HARD, problem
from torch.nn import functional as F

import fmkernels
from fmkernels import testing
from fmkernels.ops import knn_label_propagation as module

METRICS = ("cosine", "inner_product", "l2")
every_metric = pytest.mark.parametrize("metric", METRICS)


def written_out(queries, bank, labels, k, temperature, metric):
    """In float64, over the neighbours that fmkernels.knn finds."""
    q, b = queries.double(), bank.double()
    _, indices = fmkernels.knn(queries, bank, min(k, len(bank)), metric=metric)
    if metric == "l2":
        similarity = -torch.cdist(q, b).square()
    else:
        unit = F.normalize if metric == "cosine" else lambda x, dim: x
        similarity = unit(q, dim=-1) @ unit(b, dim=-1).mT
    weights = (similarity.gather(1, indices) / temperature).softmax(dim=-1)
    return torch.einsum("qk,qkc->qc", weights, labels.double()[indices])


def tables(rows):
    """The same labels as classes, one-hot, and as counts of 100 pixels."""
    classes = torch.randint(0, 5, (rows,))
    one_hot = F.one_hot(classes, 5)
    return {
        "classes": classes,
        "classes, uint8": classes.to(torch.uint8),
        "classes, uint16": classes.to(torch.uint16),
        "soft": one_hot.float(),
        "soft, float64": one_hot.double(),
        "soft, float16": one_hot.half(),
        "counts": (100 * one_hot).to(torch.uint8),
        "counts, int16": (1000 * one_hot).short(),
    }


@every_metric
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_the_sum_written_out(metric, rows):
    q, b = torch.randn(33, 24), torch.randn(rows, 24)
    temperature = 0.05 if metric == "cosine" else 1.0
    all_tables = tables(rows)
    expected = written_out(q, b, all_tables["soft"], 9, temperature, metric)
    for name, labels in all_tables.items():
        found = fmkernels.knn_label_propagation(
            q, b, labels, k=9, temperature=temperature, metric=metric, num_classes=5
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_counts_are_divided_by_their_sum():
    counts = torch.tensor([[255, 0, 0], [98, 98, 0], [0, 0, 0]], dtype=torch.uint8)
    bank = torch.eye(3)
    found = fmkernels.knn_label_propagation(bank, bank, counts, k=1)
    assert found.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_soft_labels_are_taken_as_they_are():
    labels = torch.randn(40, 3)
    q, b = torch.randn(9, 8), torch.randn(40, 8)
    found = fmkernels.knn_label_propagation(q, b, labels, k=5)
    torch.testing.assert_close(
        found.double(), written_out(q, b, labels, 5, 0.02, "cosine"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_leading_dimensions_and_strides(dtype):
    q, b = torch.randn(2, 3, 8).to(dtype), torch.randn(40, 8).to(dtype)
    labels = torch.randint(0, 4, (40,))
    flat = fmkernels.knn_label_propagation(q.reshape(6, 8), b, labels)
    assert flat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(fmkernels.knn_label_propagation(q, b, labels), flat.reshape(2, 3, 4))
    for _, laid_out in testing.layouts(b):
        assert torch.equal(fmkernels.knn_label_propagation(q[0], laid_out, labels), flat[:3])
    strided = torch.stack([labels, labels], dim=1)[:, 1]
    assert torch.equal(fmkernels.knn_label_propagation(q[0], b, strided), flat[:3])


@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
@every_metric
def test_hard_banks_give_shares(kind, metric):
    q, b = problem(kind, 0, 7, 60, 16)
    found = fmkernels.knn_label_propagation(
        q, b, torch.randint(0, 3, (60,)), k=8, metric=metric, num_classes=3
    )
    sums = found.sum(dim=-1)
    neighbors = fmkernels.knn(q, b, 8, metric=metric)[1]
    expected = (neighbors >= 0).any(dim=-1).float()  # zeros where every score is NaN
    torch.testing.assert_close(sums, expected)


def test_a_small_temperature_takes_the_nearest():
    q, b = torch.randn(9, 8), torch.randn(40, 8)
    labels = torch.randint(0, 4, (40,))
    nearest = fmkernels.knn(q, b, 1)[1].squeeze(1)
    found = fmkernels.knn_label_propagation(q, b, labels, temperature=1e-30, num_classes=4)
    assert torch.equal(found.argmax(dim=-1), labels[nearest])


def test_the_split_of_the_work_changes_nothing(monkeypatch):
    q, b = torch.randn(50, 8), torch.randn(90, 8)
    for labels in tables(90).values():
        whole = fmkernels.knn_label_propagation(q, b, labels, num_classes=5)
        with monkeypatch.context() as patch:
            patch.setattr(module, "GATHERED", 1)
            assert torch.equal(fmkernels.knn_label_propagation(q, b, labels, num_classes=5), whole)
        parts = [fmkernels.knn_label_propagation(x, b, labels, num_classes=5) for x in q.split(7)]
        assert torch.equal(torch.cat(parts), whole)


def test_empty_batch_and_compile():
    b, labels = torch.randn(40, 8), torch.randint(0, 4, (40,))
    assert fmkernels.knn_label_propagation(b[:0], b, labels, num_classes=4).shape == (0, 4)
    soft = torch.rand(40, 4)
    compiled = torch.compile(fmkernels.knn_label_propagation, fullgraph=True)
    torch.testing.assert_close(compiled(b, b, soft), fmkernels.knn_label_propagation(b, b, soft))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bank": torch.zeros(0, 4), "labels": torch.zeros(0)}, ValueError, "at least one row"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"labels: expected shape \(5,\) or \(5, C"),
        ({"labels": torch.zeros(5)}, TypeError, r"labels: expected integer classes of shape"),
        ({"labels": torch.zeros(5, 2).bool()}, TypeError, r"labels: expected numbers, got"),
        ({"labels": torch.zeros(5, 0)}, ValueError, r"labels: expected at least 1 columns"),
        ({"labels": [0] * 5}, TypeError, r"labels: expected a torch.Tensor, got list"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0])}, ValueError, r"classes from 0 to 2, got -1"),
        ({"labels": -torch.ones(5, 2).long()}, ValueError, r"labels: expected counts >= 0, got -1"),
        ({"num_classes": 2}, ValueError, r"labels: expected classes from 0 to 1, got 3"),
        ({"num_classes": 0}, ValueError, r"num_classes: expected an integer >= 1, got 0"),
        ({"labels": torch.zeros(5, 2), "num_classes": 3}, ValueError, r"expected 3 columns"),
        ({"temperature": 0}, ValueError, r"temperature: expected a number > 0, got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature: expected a finite number >= 0"),
        ({"temperature": "hot"}, TypeError, r"temperature: expected a number, got str"),
        ({"k": 0}, ValueError, r"knn_label_propagation: k: expected an integer >= 1"),
        ({"queries": torch.zeros(2, 3)}, ValueError, r"bank: expected rows of 3 numbers"),
    ],
)
def test_refusals(change, error, message):
    arguments = {
        "queries": torch.ones(2, 4),
        "bank": torch.ones(5, 4),
        "labels": torch.tensor([0, 3, 2, 1, 0]),
    }
    with pytest.raises(error, match=message):
        fmkernels.knn_label_propagation(**(arguments | change))
