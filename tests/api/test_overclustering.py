"""Overclustering beside the published steps, on planted clusters and on scikit-learn's digits."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fmkernels.api import ConfusionMatrix, Overclustering

faiss = pytest.importorskip("faiss")


def planted(images=6, grid=(5, 5), kinds=6, classes=3, dim=8, seed=0, noise=0.05):
    """Maps (N, D, h, w) of patches around `kinds` centres, and masks (N, 8h, 8w) of their class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, dim, generator=generator)
    kind = torch.randint(kinds, (images, *grid), generator=generator)
    features = centres[kind] + noise * torch.randn(images, *grid, dim, generator=generator)
    masks = (kind % classes).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    return features.permute(0, 3, 1, 2), masks


def published(maps, masks, classes, k, pca_dim, seed, size, ignore, points):
    """mIoU of one seed as in NeCo's eval_overcluster.py, step by step.

    Pixels of the ignored class are dropped first, and absent classes are 0.
    """
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    rows = ((rows - rows.mean(0)) / rows.std(0)).astype(np.float32)
    pca = faiss.PCAMatrix(rows.shape[1], pca_dim)
    pca.train(rows)
    rows = pca.apply(rows)
    kmeans = faiss.Kmeans(pca_dim, k, niter=100, nredo=5, seed=seed, max_points_per_centroid=points)
    kmeans.train(rows)
    clusters = torch.from_numpy(kmeans.index.search(rows, 1)[1].squeeze())
    clusters = clusters.view(len(maps), 1, *maps.shape[2:])
    predicted = F.interpolate(clusters.float(), size=(size, size), mode="nearest")
    target = F.interpolate(masks.float().unsqueeze(1), size=(size, size), mode="nearest")
    kept = target != ignore
    predicted, target = predicted[kept].int(), target[kept].int()
    renamed = torch.zeros_like(target)
    for cluster in range(k):
        inside = predicted == cluster
        hits = [int((inside & (target == of)).sum()) for of in range(classes)]
        renamed[inside] = int(np.argmax(hits))  # the largest precision: the same denominator
    overlaps = []
    for of in range(classes):
        hits = int(((target == of) & (renamed == of)).sum())
        union = int(((target == of) | (renamed == of)).sum())
        overlaps.append(hits / max(union, 1e-8))
    return np.mean(overlaps)


@pytest.mark.parametrize("points", [256, 2])
def test_agrees_with_the_published_steps(points):
    maps, masks = planted(images=10, noise=1.0)
    masks[0, :9] = 255
    ours = Overclustering(
        3, 12, pca_dim=4, mask_size=30, seeds=(0, 1), max_points_per_centroid=points
    )
    result = ours.evaluate(maps, masks, absent="zero")
    expected = [published(maps, masks, 3, 12, 4, seed, 30, 255, points) for seed in (0, 1)]
    assert result.mious.tolist() == pytest.approx(expected, abs=1e-12)
    assert 0.3 < result.miou < 0.99  # neither chance nor perfect, so that steps show
    assert result.mious[0] != result.mious[1]
    assert result.miou == pytest.approx(np.mean(expected))
    assert result.std == pytest.approx(np.std(expected))


def test_planted_clusters_are_found():
    """With so many runs of k-means that one of them does not end in a local optimum."""
    maps, masks = planted()
    over = Overclustering(3, 6, seeds=(0, 5), nredo=30).evaluate(maps, masks)
    assert over.miou == 1
    assert over.std == 0
    assert over.iou.tolist() == [[1, 1, 1]] * 2
    assert [classes.bincount().tolist() for classes in over.assignments] == [[2, 2, 2]] * 2
    maps, masks = planted(kinds=3)
    exact = Overclustering(3, seeds=(0,), nredo=30).evaluate(maps, masks)  # K = C: one to one
    assert exact.miou == 1
    assert sorted(exact.assignments[0].tolist()) == [0, 1, 2]


def test_matchings():
    assert Overclustering(3).matching == Overclustering(3, 3).matching == "hungarian"
    assert Overclustering(3, 4).matching == "many_to_one"
    maps, masks = planted(kinds=7, noise=1.0)
    clusters = Overclustering(3).cluster(maps, seed=1)
    confusion = ConfusionMatrix(3)
    confusion.update(*(nearest(labels, (100, 100)) for labels in (clusters, masks)))
    found = set()
    for kind in ("hungarian", "many_to_one", "many_to_one_iou"):
        result = Overclustering(3, seeds=(1,), matching=kind).evaluate(maps, masks)
        expected = confusion.matched(kind)
        assert torch.equal(result.iou[0], expected.iou)
        assert torch.equal(result.assignments[0], expected.assignment)
        found.add(result.miou)
    assert len(found) > 1


def nearest(labels, size):
    """Nearest neighbour by index, as PyTorch documents it: floor(i · scale)."""
    rows = torch.arange(size[0]) * labels.shape[1] // size[0]
    columns = torch.arange(size[1]) * labels.shape[2] // size[1]
    return labels[:, rows][:, :, columns]


def test_mask_size_none_enlarges_to_the_masks():
    maps, masks = planted(noise=0.6)
    at_masks = Overclustering(3, 6, mask_size=None, seeds=(0,)).evaluate(maps, masks)
    same = Overclustering(3, 6, mask_size=(40, 40), seeds=(0,)).evaluate(maps, masks.byte())
    assert torch.equal(at_masks.iou, same.iou)


def test_tokens_maps_and_grids():
    maps, masks = planted(grid=(4, 6))
    overclustering = Overclustering(3, 6, seeds=(0,), nredo=30)
    tokens = maps.flatten(2).mT
    whole = overclustering.evaluate(tokens, masks, grid=(4, 6))
    assert whole.miou == 1
    clusters = overclustering.cluster(tokens, grid=(4, 6))
    assert clusters.shape == (6, 4, 6)
    assert clusters.dtype == torch.int64
    assert torch.equal(clusters, overclustering.cluster(maps))
    assert torch.equal(clusters, overclustering.cluster(maps.double().requires_grad_()))


def test_k_means_gets_what_was_asked_for(monkeypatch):
    seen = []

    class Recorded(faiss.Kmeans):
        def __init__(self, *arguments, **settings):
            seen.append((arguments, settings))
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(faiss, "Kmeans", Recorded)
    maps, masks = planted()
    Overclustering(3, 6, pca_dim=5, niter=7, nredo=2, spherical=True, seeds=[4, 9]).evaluate(
        maps, masks
    )
    assert [arguments for arguments, _ in seen] == [(5, 6), (5, 6)]
    assert [settings["seed"] for _, settings in seen] == [4, 9]
    for _, settings in seen:
        asked = {"niter": 7, "nredo": 2, "spherical": True, "max_points_per_centroid": 256}
        assert asked.items() <= settings.items()
    assert faiss.ClusteringParameters().max_points_per_centroid == 256  # faiss's own default


def test_constant_features_and_absent_classes():
    maps, masks = planted(kinds=3)
    maps = torch.cat([maps, torch.full_like(maps[:, :1], 0.1)], dim=1)
    result = Overclustering(5, 4, seeds=(0,), nredo=30).evaluate(maps, masks)
    assert result.miou == 1
    assert result.iou[0, 3:].isnan().all()
    zero = Overclustering(5, 4, seeds=(0,), nredo=30).evaluate(maps, masks, absent="zero")
    assert zero.miou == pytest.approx(3 / 5)


def test_digits_are_clustered_better_than_by_chance():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    tokens = torch.from_numpy(images[:1600]).float().view(100, 16, 64)
    masks = torch.from_numpy(labels[:1600]).view(100, 4, 4)
    few = Overclustering(10, pca_dim=20, seeds=(0, 1), nredo=1).evaluate(tokens, masks)
    many = Overclustering(10, 60, pca_dim=20, seeds=(0, 1), nredo=1).evaluate(tokens, masks)
    assert 0.3 < few.miou < many.miou < 1  # 0.05 by chance


def test_refusals():
    maps, masks = planted()
    overclustering = Overclustering(3, 6)
    poisoned = maps.clone()
    poisoned[2, 0, 1, 1] = torch.nan
    cases = (
        (poisoned, masks, ValueError, "features: expected finite numbers, got NaN .* row 56"),
        (maps.long(), masks, TypeError, "features: expected a floating-point dtype"),
        (maps[:, :2, 0], masks, ValueError, "features: expected a square number of tokens"),
        (maps[0, 0], masks, ValueError, r"features: expected maps \(B, D, h, w\)"),
        (maps, masks[:-1], ValueError, r"masks: expected shape \(6, H, W\), .*\(5, 40, 40\)"),
        (maps, masks.unsqueeze(1), ValueError, r"masks: expected shape \(6, H, W\)"),
        (maps, masks / 255, TypeError, r"masks: expected integers, .*round\(\)"),
        (maps[:1, :, :1], masks[:1], ValueError, "features: expected at least 50 patches .*got 5"),
    )
    for features, target, error, words in cases:
        with pytest.raises(error, match="Overclustering: " + words):
            overclustering.evaluate(features, target)
    with pytest.raises(ValueError, match="target: expected classes from 0 to 2, or 255 "):
        overclustering.evaluate(maps, masks + 1)
    settings = (
        ({"num_classes": 0}, "num_classes: expected an integer >= 1"),
        ({"num_clusters": 2.5}, "num_clusters: expected an integer >= 1"),
        ({"seeds": ()}, "seeds: expected at least one"),
        ({"pca_dim": 0}, "pca_dim: expected an integer >= 1, or None"),
        ({"mask_size": 0}, "mask_size: expected an integer >= 1"),
        ({"max_points_per_centroid": 0}, "max_points_per_centroid: expected an integer >= 1"),
        ({"matching": "greedy"}, "matching: expected one of hungarian"),
    )
    for setting, words in settings:
        with pytest.raises(ValueError, match="Overclustering: " + words):
            Overclustering(**{"num_classes": 3, **setting})


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    maps, masks = planted()
    with pytest.raises(ImportError, match=r"Overclustering needs faiss-cpu, .* pip install faiss"):
        Overclustering(3).evaluate(maps, masks)
