"""FUNGI's evaluation is what scikit-learn says, step by step."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from fmkernels.api import (
    FeatureScores,
    concatenate,
    evaluate_features,
    few_shot,
    rank_database,
    retrieval_map,
    retrieval_scores,
)


@pytest.fixture(scope="module")
def digits():
    """(train, labels, test, labels) of 600 digits."""
    data = load_digits()
    rows, labels = torch.tensor(data.data[:600]).float(), torch.tensor(data.target[:600])
    features = concatenate(rows, rows.square())
    return features[:400], labels[:400], features[400:], labels[400:]


def reduced(train, test, dim):
    pca = PCA(dim, svd_solver="full").fit(train)
    return pca.transform(train), pca.transform(test)


def test_scores_are_scikit_learn_s(digits):
    train, labels, test, wanted = digits
    found = evaluate_features(*digits, k=5, pca_dim=20)
    x, queries = reduced(train.numpy(), test.numpy(), 20)
    y, truth = labels.numpy(), wanted.numpy()
    knn = KNeighborsClassifier(5, algorithm="brute").fit(x, y)
    assert found.knn == pytest.approx(knn.score(queries, truth))
    chosen = np.concatenate([np.flatnonzero(y == c)[:5] for c in range(10)])
    few = KNeighborsClassifier(5, algorithm="brute").fit(x[chosen], y[chosen])
    assert found.few_shot == pytest.approx(few.score(queries, truth))
    split = train_test_split(x, y, test_size=0.2, random_state=42, stratify=y)
    strengths = (0.01, 0.1, 1.0, 10.0, 100.0)
    scores = [
        LogisticRegression(C=C, max_iter=2000).fit(split[0], split[2]).score(split[1], split[3])
        for C in strengths
    ]
    best = LogisticRegression(C=strengths[int(np.argmax(scores))], max_iter=2000).fit(x, y)
    assert found.logistic == pytest.approx(best.score(queries, truth))
    clusters = KMeans(10, n_init=10, random_state=42).fit_predict(queries.astype(np.float32))
    cost = np.array(
        [[-((clusters == j) & (truth == i)).sum() for j in range(10)] for i in range(10)]
    )
    matched = -cost[linear_sum_assignment(cost)].sum() / len(truth)
    assert found.kmeans == pytest.approx(matched)
    assert 0.8 < found.knn < 1


def test_only_what_is_asked_for(digits):
    assert evaluate_features(*digits, tasks=["few_shot"], shots=1) == FeatureScores(
        few_shot=evaluate_features(*digits, tasks=("few_shot", "knn"), shots=1).few_shot
    )


def test_concatenation_normalises_each_block():
    blocks = torch.randn(5, 3), 100 * torch.randn(5, 7), torch.zeros(5, 2)
    found = concatenate(*blocks)
    for own, block in zip(found.split([3, 7, 2], dim=1), blocks, strict=True):
        torch.testing.assert_close(own, torch.nn.functional.normalize(block, dim=1))


def test_concatenation_gives_the_kind_it_is_given():
    found = concatenate(np.array([[3.0, 4.0]]), torch.tensor([[2.0]]).double())
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, [[0.6, 0.8, 1.0]])


@pytest.mark.parametrize("each", [2, 3, 4])
def test_logistic_regression_on_a_few_rows_of_a_class(each, digits):
    """A fifth of the rows is then less than one of each class."""
    train, labels, test, wanted = digits
    chosen = few_shot(labels, each)
    found = evaluate_features(
        train[chosen], labels[chosen], test, wanted, tasks=["logistic"], pca_dim=None
    )
    x, y = train[chosen].numpy(), labels[chosen].numpy()
    split = train_test_split(x, y, test_size=10, random_state=42, stratify=y)
    scores = [
        LogisticRegression(C=C, max_iter=2000).fit(split[0], split[2]).score(split[1], split[3])
        for C in (0.01, 0.1, 1.0, 10.0, 100.0)
    ]
    best = LogisticRegression(
        C=(0.01, 0.1, 1.0, 10.0, 100.0)[int(np.argmax(scores))], max_iter=2000
    )
    assert found.logistic == pytest.approx(best.fit(x, y).score(test.numpy(), wanted.numpy()))


def test_few_shot_takes_the_first_of_each_class():
    labels = torch.randint(4, (50,))
    chosen = few_shot(labels, 3)
    assert chosen.tolist() == sorted(chosen.tolist())
    for label in range(4):
        expected = (labels == label).nonzero().flatten()[:3]
        assert torch.equal(chosen[labels[chosen] == label], expected)


def test_retrieval_is_that_of_the_reduced_features():
    queries, database = torch.randn(3, 40), torch.randn(60, 40)
    truth = [{"easy": [i], "hard": [i + 10], "junk": [i + 20]} for i in range(3)]
    x, q = reduced(database.numpy(), queries.numpy(), 12)
    expected = retrieval_map(rank_database(torch.tensor(q), torch.tensor(x)), truth)
    found = retrieval_scores(queries, database, truth, pca_dim=12)
    for setup, scores in expected.items():
        assert torch.equal(found[setup].aps, scores.aps)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda x, y: evaluate_features(x, y, x[:, :3], y), ValueError, "test: expected rows of 4"),
        (lambda x, y: evaluate_features(x, y, x, y[:2]), ValueError, r"test_labels: .* \(6,\)"),
        (
            lambda x, y: evaluate_features(x, y, x, y, tasks=["svm"]),
            ValueError,
            r"tasks\[0\]: expected one of knn, few_shot, logistic, kmeans, got 'svm'",
        ),
        (
            lambda x, y: evaluate_features(x, y, x, y, tasks="knn"),
            TypeError,
            r"tasks: expected a sequence such as \('knn',\), got 'knn'",
        ),
        (
            lambda x, y: evaluate_features(x, y, x, y, k=7),
            ValueError,
            "k: expected at most the 6 rows of train, got 7",
        ),
        (
            lambda x, y: evaluate_features(x, y, x, y, k=(1, 2)),
            ValueError,
            r"evaluate_features: k: expected an integer >= 1, got \(1, 2\)",
        ),
        (
            lambda x, y: evaluate_features(x, 0 * y, x, y, k=1, tasks=["logistic"]),
            ValueError,
            r"train_labels: expected at least two classes .* got rows per class \[6\]",
        ),
        (
            lambda x, y: evaluate_features(x[:2], y[:2], x, y, k=1, tasks=["logistic"]),
            ValueError,
            r"train_labels: expected at least two classes .* got rows per class \[1, 1\]",
        ),
        (lambda x, y: concatenate(), ValueError, "blocks: expected at least one"),
        (lambda x, y: concatenate(x, x[:2]), ValueError, r"blocks\[1\]: expected 6 rows"),
        (lambda x, y: concatenate(x, x * np.nan), ValueError, r"blocks\[1\]: expected finite"),
        (lambda x, y: few_shot(y, 0), ValueError, "shots: expected an integer >= 1"),
        (lambda x, y: few_shot(y.float()), TypeError, "labels: expected integers"),
    ],
)
def test_refusals(work, error, message):
    with pytest.raises(error, match=message):
        work(torch.rand(6, 4), torch.arange(6) % 2)
