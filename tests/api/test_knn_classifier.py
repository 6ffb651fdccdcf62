"""The classifier beside scikit-learn's, and beside DINO's evaluation written out."""

import itertools
import sys

import numpy as np
import pytest
import torch

from fmkernels.api import KNNClassifier, evaluation_inputs, knn_classifier


def clusters(rows, dim=24, classes=5, seed=0, noise=1.2, dtype=torch.float32):
    """Features around class centres that are the same for every seed, and their labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    noises = torch.randn(rows, dim, generator=generator)
    return (centres[labels] + noise * noises).to(dtype), labels


def dino(train, train_labels, test, k, temperature, classes):
    """Class scores (Q, C) as in the published eval_knn.py, one query after the other."""
    train, test = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (train, test))
    scores = torch.zeros(len(test), classes, dtype=torch.float64)
    for query in range(len(test)):
        similarity = train @ test[query]
        for row in similarity.argsort(descending=True)[:k]:
            scores[query, train_labels[row]] += (similarity[row] / temperature).exp()
    return scores


def test_fungi_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    decomposition = pytest.importorskip("sklearn.decomposition")
    features, labels = clusters(300)
    queries, wanted = clusters(120, seed=1)
    for pca_dim, k in itertools.product((None, 6), (1, 2, 20)):
        rows, others = features.numpy(), queries.numpy()
        if pca_dim:
            pca = decomposition.PCA(n_components=pca_dim, svd_solver="full").fit(rows)
            rows, others = pca.transform(rows), pca.transform(others)
        peer = neighbors.KNeighborsClassifier(n_neighbors=k).fit(rows, labels.numpy())
        ours = KNNClassifier("fungi", k, pca_dim=pca_dim).fit(features, labels)
        assert ours.predict(queries).tolist() == peer.predict(others).tolist()
        shares = ours.predict_proba(queries)
        assert np.abs(shares.numpy() - peer.predict_proba(others)).max() < 1e-6
        assert ours.score(queries, wanted) == pytest.approx(peer.score(others, wanted.numpy()))
        assert ours.score(queries, wanted) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_dino_agrees_with_the_published_loop(temperature, dtype):
    features, labels = clusters(300, noise=2.5, dtype=dtype)
    queries, wanted = clusters(90, seed=1, noise=2.5, dtype=dtype)
    ours = KNNClassifier("dino", temperature=temperature).fit(features, labels)
    ks = (10, 20, 100, 200)
    predicted, shares = ours.predict(queries, ks), ours.predict_proba(queries, ks)
    accuracies, top = ours.score(queries, wanted, ks), ours.score(queries, wanted, ks, top=3)
    assert list(predicted) == list(shares) == list(accuracies) == list(ks)
    assert len({tuple(classes.tolist()) for classes in predicted.values()}) > 1
    for k in ks:
        scores = dino(features, labels, queries, k, temperature, 5)
        assert torch.equal(predicted[k], scores.argmax(dim=1))
        # rounded scores change a weight by 2 eps / T, a sum of weights errs by k eps, twice each
        rtol = (4 / temperature + 2 * k) * torch.finfo(dtype).eps
        share = scores / scores.sum(1, keepdim=True)
        torch.testing.assert_close(shares[k].double(), share, rtol=rtol, atol=0)
        first = scores.argsort(dim=1, descending=True)
        hits = first == wanted.unsqueeze(1)
        assert accuracies[k] == hits[:, 0].double().mean().item()
        voted = scores.gather(1, wanted.unsqueeze(1)).squeeze(1) > 0
        assert top[k] == (hits[:, :3].any(dim=1) & voted).double().mean().item()


@pytest.mark.parametrize("kind", ["fungi", "dino"])
def test_several_k_equal_one_at_a_time(kind, monkeypatch):
    features, labels = clusters(100)
    queries, wanted = clusters(40, seed=1)
    searches = []
    real = knn_classifier.knn
    monkeypatch.setattr(
        knn_classifier, "knn", lambda *a, **b: searches.append(a[2]) or real(*a, **b)
    )
    monkeypatch.setattr(knn_classifier, "VOTED", 35)  # seven queries at a time
    classifier = KNNClassifier(kind, 7, pca_dim=8).fit(features, labels)
    several = classifier.predict_proba(queries, [20, 1, 7, 1])
    assert list(several) == [20, 1, 7]
    assert searches == [20]  # one search, and for the largest only
    for k, shares in several.items():
        assert torch.equal(shares, classifier.predict_proba(queries, k))
        assert torch.equal(
            classifier.classes_[shares.argmax(dim=1)], classifier.predict(queries, k)
        )
    assert torch.equal(classifier.predict_proba(queries), several[7])
    assert classifier.score(queries, wanted) == classifier.score(queries, wanted, [7])[7]


def test_ties_go_to_the_lower_class_and_row():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    labels = torch.tensor([7, -2, 7, 4])
    centre = torch.zeros(1, 2)
    for order in itertools.permutations(range(4)):
        order = list(order)
        fungi = KNNClassifier(k=4, pca_dim=None).fit(features[order], labels[order])
        assert fungi.classes_.tolist() == [-2, 4, 7]
        assert fungi.predict(centre).tolist() == [7]  # two votes
        three = [row for row in order if row != 0]  # one vote each
        fungi = KNNClassifier(k=3, pca_dim=None).fit(features[three], labels[three])
        assert fungi.predict(centre).tolist() == [-2]
        assert [fungi.score(centre, [c], top=2) for c in (-2, 4, 7)] == [1, 1, 0]
        nearest = KNNClassifier("dino", k=1).fit(features[order], labels[order])
        assert nearest.predict(centre).tolist() == [int(labels[order[0]])]


def test_a_class_without_a_vote_is_not_among_the_best():
    features, labels = torch.eye(4), torch.arange(4)
    classifier = KNNClassifier("dino", k=1).fit(features, labels)
    assert classifier.score(features, [0, 0, 0, 0], top=4) == 0.25
    assert classifier.score(features, [9, 9, 9, 3], top=4) == 0.25  # 9 was not in training


def test_arrays_in_arrays_out():
    features, labels = clusters(60)
    queries, wanted = clusters(30, seed=1)
    tensors = KNNClassifier("dino", 5).fit(features, labels)
    arrays = KNNClassifier("dino", 5).fit(features.numpy(), labels.tolist())
    frozen = queries.numpy().copy()
    frozen.flags.writeable = False  # as memory-mapped ones are
    for found in (arrays.predict(frozen), tensors.predict(frozen)):
        assert isinstance(found, np.ndarray)
        assert found.tolist() == tensors.predict(queries).tolist()
    shares = arrays.predict_proba(frozen, (1, 5))
    assert isinstance(shares[5], np.ndarray)
    assert shares[5].dtype == np.float32
    assert isinstance(arrays.predict(queries), torch.Tensor)
    assert arrays.score(frozen, wanted.numpy()) == tensors.score(queries, wanted)
    assert isinstance(tensors.score(queries, wanted), float)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["fungi", "dino"])
def test_other_precisions(kind, dtype):
    features, labels = clusters(80, dtype=dtype, noise=0.3)
    queries, wanted = clusters(40, seed=1, dtype=dtype, noise=0.3)
    classifier = KNNClassifier(kind, 5, pca_dim=8).fit(features, labels)
    assert classifier.score(queries, wanted) == 1
    shares = classifier.predict_proba(queries)
    assert shares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_pca_is_left_out_where_it_would_only_rotate():
    """Neighbours are the same then: the features all lie in the space that it would keep."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    for rows, dim, pca_dim in ((30, 8, 8), (12, 24, 20), (30, 8, 512)):
        features, labels = clusters(rows, dim)
        queries, _ = clusters(50, dim, seed=1)
        limit = min(rows, dim)
        pca = decomposition.PCA(n_components=limit, svd_solver="full").fit(features.numpy())
        ours = KNNClassifier(k=5, pca_dim=pca_dim).fit(features, labels)
        rotated = KNNClassifier(k=5, pca_dim=None).fit(pca.transform(features.numpy()), labels)
        expected = rotated.predict_proba(pca.transform(queries.numpy()))
        assert np.array_equal(ours.predict_proba(queries.numpy()), expected)


def test_a_small_temperature_is_the_nearest_neighbour():
    features, labels = clusters(60)
    queries, _ = clusters(30, seed=1)
    cold = KNNClassifier("dino", 10, temperature=1e-30).fit(features, labels)
    shares = cold.predict_proba(queries)
    assert shares.isfinite().all()
    assert torch.equal(cold.predict(queries), cold.predict(queries, 1))


def test_no_queries():
    features, labels = clusters(30)
    classifier = KNNClassifier("dino", 5).fit(features, labels)
    assert classifier.predict(features[:0]).shape == (0,)
    assert classifier.predict_proba(features[:0]).shape == (0, 5)
    assert np.isnan(classifier.score(features[:0], labels[:0]))


def test_refusals(monkeypatch):
    monkeypatch.setattr(evaluation_inputs, "CHECKED", 4)
    features, labels = clusters(30)
    with pytest.raises(ValueError, match="kind: expected one of fungi, dino"):
        KNNClassifier("knn")
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        KNNClassifier(k=0)
    with pytest.raises(ValueError, match=r"pca_dim: expected an integer >= 1, or None, got 2\.5"):
        KNNClassifier(pca_dim=2.5)
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        KNNClassifier(temperature=0)
    classifier = KNNClassifier("dino", k=5)
    for method in (classifier.predict, classifier.predict_proba):
        with pytest.raises(ValueError, match=rf"{method.__name__}: expected fit\(features"):
            method(features)
    with pytest.raises(ValueError, match=r"score: expected fit\(features"):
        classifier.score(features, labels)
    poisoned = features.clone()
    poisoned[17, 3], poisoned[20, 0] = torch.nan, torch.inf
    cases = (
        (poisoned, labels, ValueError, "features: .* in 2 of 30 rows, the first of them row 17"),
        (features.long(), labels, TypeError, "features: expected a floating-point dtype"),
        (features.numpy().astype(int), labels, TypeError, "features: expected float16, .* int64"),
        (features.numpy().astype(str), labels, TypeError, "features: expected float16, "),
        (
            features.tolist(),
            labels,
            TypeError,
            "features: expected a torch.Tensor or NumPy array, got l",
        ),
        (features[0], labels, ValueError, r"features: expected shape \(N, D\)"),
        (features[:0], labels[:0], ValueError, r"features: .* at least one row, got .*\(0, 24\)"),
        (features, labels[:-1], ValueError, r"labels: expected shape \(30,\), .*got \(29,\)"),
        (features, labels.float(), TypeError, "labels: expected integers, got torch.float32"),
        (features, [str(c) for c in labels], TypeError, "labels: expected integers, got <U"),
        (features[:4], labels[:4], ValueError, "k: expected at most 4, .* got 5"),
    )
    for rows, classes, error, words in cases:
        with pytest.raises(error, match="KNNClassifier: " + words):
            classifier.fit(rows, classes)
    classifier.fit(features, labels)
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        classifier.predict(poisoned)
    with pytest.raises(ValueError, match=r"features: expected shape \(Q, 24\), as in fit"):
        classifier.predict(features[:, :23])
    with pytest.raises(ValueError, match=r"k: expected at most 30, .* got 31"):
        classifier.predict(features, (5, 31))
    with pytest.raises(ValueError, match="k: expected at least one"):
        classifier.predict(features, ())
    with pytest.raises(ValueError, match="top: expected an integer >= 1"):
        classifier.score(features, labels, top=0)
    with pytest.raises(ValueError, match=r"labels: expected shape \(30,\)"):
        classifier.score(features, labels[:2])
    with pytest.raises(ValueError, match="features: expected the device of the features of fit"):
        classifier.predict(features.to("meta"))


def test_without_scikit_learn_only_the_pca_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    features, labels = clusters(30)
    KNNClassifier(k=5).fit(features, labels)  # narrower than 512
    with pytest.raises(
        ImportError,
        match=r"KNNClassifier\(pca_dim=8\) needs scikit-learn, .* pip install scikit-learn",
    ):
        KNNClassifier(k=5, pca_dim=8).fit(features, labels)
