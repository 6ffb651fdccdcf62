"""Unsupervised segmentation by k-means of patch features, with K = the classes, or many more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels import _checks

from .arrays import optional
from .evaluation_inputs import finite_rows, integers, sides
from .linear_segmentation import token_maps
from .segmentation_metrics import MATCHINGS, ConfusionMatrix

OP = "Overclustering"
COUNTED = 64
"""Images whose masks are resized and counted at a time."""


class OverclusteringResult(NamedTuple):
    """How well clusters fit classes, for every seed of k-means."""

    mious: Tensor
    """(seeds,), float64."""
    iou: Tensor
    """(seeds, C), float64, NaN where a class is in neither masks nor prediction."""
    assignments: Tensor
    """(seeds, K), int64: the class of every cluster."""

    @property
    def miou(self) -> float:
        """Mean over the seeds, which is what is published."""
        return float(self.mious.mean())

    @property
    def std(self) -> float:
        """Standard deviation over the seeds (of the population: 0 for one seed)."""
        return float(self.mious.std(correction=0))


class Overclustering:
    """Cluster the patches of all images with faiss's k-means and measure how clusters fit classes.

    Features are standardised, reduced by PCA, and clustered. Each cluster is taken for a class (one
    to one where there are as many clusters as classes, otherwise each for the class that most of
    its pixels have), and mIoU is computed from one confusion matrix of all pixels.

    Args:
        num_classes: C, classes of the masks.
        num_clusters: K; C if None. The published settings are C and 500.
        pca_dim: dimensions after PCA; None, or features that are not wider, for no PCA.
        mask_size: side (or (height, width)) to which masks and cluster maps are resized, by nearest
            neighbour; None enlarges the cluster maps to the masks.
        ignore_index: class of the masks that is left out, or None.
        seeds: one k-means for each.
        niter: iterations of each run of k-means.
        nredo: runs per seed, of which the best by its own objective is taken.
        max_points_per_centroid: k-means is trained on this many patches for each cluster, drawn at
            random, or on all if there are fewer. 256 is faiss's default, on which the published
            numbers rest: K = 21 is then trained on 5,376 patches.
        spherical: normalise the centroids, and assign by inner product.
        matching: ``"hungarian"``, ``"many_to_one"`` (by pixel precision) or ``"many_to_one_iou"``,
            see :meth:`ConfusionMatrix.matched`; None for the published rule above.

    Raises:
        ImportError: faiss is not installed; the Hungarian matching without SciPy.
        TypeError: features that are not floating-point, masks that are not integers.
        ValueError: shapes that do not fit, classes out of range, fewer patches than clusters.

    Numerics:
        float32, as faiss. The same seed gives the same clusters on one machine; on another, or with
        another number of threads, products may round otherwise and k-means end elsewhere.

    Source:
        Ziegler and Asano, *Self-Supervised Learning of Object Parts*, CVPR 2022 (Leopart); Pariza
        et al., *NeCo*, ICLR 2025; and their released code.

    Example:
        >>> from fmkernels.api import Overclustering
        >>> Overclustering(21, 500).matching, Overclustering(21).matching
        ('many_to_one', 'hungarian')

        With features (N, h·w, D) and masks (N, H, W) of all images::

            result = Overclustering(21, 500).evaluate(features, masks)
            print(result.miou, result.std)
    """

    def __init__(
        self,
        num_classes: int,
        num_clusters: int | None = None,
        *,
        pca_dim: int | None = 50,
        mask_size: int | tuple[int, int] | None = 100,
        ignore_index: int | None = 255,
        seeds: Sequence[int] = (0, 1, 2, 3, 4),
        niter: int = 100,
        nredo: int = 5,
        max_points_per_centroid: int = 256,
        spherical: bool = False,
        matching: str | None = None,
    ) -> None:
        self.num_classes = _checks.positive_integer(OP, "num_classes", num_classes)
        self.num_clusters = self.num_classes
        if num_clusters is not None:
            self.num_clusters = _checks.positive_integer(OP, "num_clusters", num_clusters)
        self.pca_dim = None
        if pca_dim is not None:
            self.pca_dim = _checks.positive_integer(OP, "pca_dim", pca_dim, ", or None")
        self.mask_size = None if mask_size is None else sides(OP, "mask_size", mask_size)
        self.ignore_index = ignore_index
        self.seeds = list(seeds)
        if not self.seeds:
            raise ValueError(f"{OP}: seeds: expected at least one, got none")
        self.kmeans = {
            "niter": _checks.positive_integer(OP, "niter", niter),
            "nredo": _checks.positive_integer(OP, "nredo", nredo),
            "max_points_per_centroid": _checks.positive_integer(
                OP, "max_points_per_centroid", max_points_per_centroid
            ),
            "spherical": bool(spherical),
        }
        if matching is None:
            matching = "hungarian" if self.num_clusters == self.num_classes else "many_to_one"
        _checks.choice(OP, "matching", matching, MATCHINGS)
        self.matching = matching

    def __repr__(self) -> str:
        names = ("pca_dim", "mask_size", "ignore_index", "seeds", "matching")
        settings = {name: getattr(self, name) for name in names} | self.kmeans
        words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"Overclustering({self.num_classes}, {self.num_clusters}, {words})"

    def evaluate(
        self,
        features: Tensor,
        masks: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        absent: str = "skip",
    ) -> OverclusteringResult:
        """Cluster the features of all images, once for each seed, and compare with the masks.

        Args:
            features: of all images: tokens (N, h·w, D) without CLS, or maps (N, D, h, w).
            masks: (N, H, W), integer classes.
            grid: (h, w) of tokens; a square if None.
            absent: see :meth:`ConfusionMatrix.miou`; ``"zero"`` is the published rule.

        Returns:
            An :class:`OverclusteringResult`.
        """
        maps = token_maps(OP, features, grid)
        labels = _check_masks(masks, len(maps)).cpu()
        rows = self._reduced(maps)
        mious, overlaps, assignments = [], [], []
        for seed in self.seeds:
            confusion = ConfusionMatrix(
                self.num_classes, self.ignore_index, num_predicted=self.num_clusters
            )
            clusters = self._clustered(rows, seed, maps)
            pairs = zip(clusters.split(COUNTED), labels.split(COUNTED), strict=True)
            for predicted, target in pairs:
                size = self.mask_size or tuple(target.shape[1:])
                confusion.update(_resized(predicted, size), _resized(target, size))
            matching = confusion.matched(self.matching)
            mious.append(matching.miou(absent))
            overlaps.append(matching.iou)
            assignments.append(matching.assignment)
        return OverclusteringResult(
            torch.tensor(mious, dtype=torch.float64),
            torch.stack(overlaps),
            torch.stack(assignments),
        )

    def cluster(
        self, features: Tensor, seed: int = 0, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """The cluster of every patch: (N, h, w), int64, on the CPU."""
        maps = token_maps(OP, features, grid)
        return self._clustered(self._reduced(maps), seed, maps)

    def _reduced(self, maps: Tensor) -> Any:
        """(N, D, h, w) -> (N·h·w, D'), float32: standardised, then PCA."""
        width = maps.shape[1]
        rows = maps.detach().permute(0, 2, 3, 1).reshape(-1, width)
        rows = finite_rows(OP, "features", rows).to("cpu", torch.float32)
        needed = max(self.num_clusters, self.pca_dim or 0)
        if len(rows) < needed:
            raise ValueError(
                f"{OP}: features: expected at least {needed} patches (num_clusters and pca_dim), "
                f"got {len(rows)}"
            )
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        deviation = variance.sqrt()
        varies = deviation > torch.finfo(torch.float32).eps * mean.abs()
        standardised = ((rows - mean) / deviation.where(varies, 1)).numpy()
        if self.pca_dim is None or self.pca_dim >= width:
            return standardised
        pca = _faiss().PCAMatrix(width, self.pca_dim)
        pca.train(standardised)
        return pca.apply(standardised)

    def _clustered(self, rows: Any, seed: int, maps: Tensor) -> Tensor:
        kmeans = _faiss().Kmeans(
            rows.shape[1],
            self.num_clusters,
            seed=int(seed),
            min_points_per_centroid=1,  # below it faiss only prints a warning
            **self.kmeans,
        )
        kmeans.train(rows)
        clusters = torch.from_numpy(kmeans.index.search(rows, 1)[1])
        return clusters.view(len(maps), *maps.shape[2:])


def _check_masks(masks: Any, images: int) -> Tensor:
    hint = "; of masks that were scaled to 0 … 1 take (255 * masks).round().long()"
    labels = integers(OP, "masks", masks, hint)
    if labels.ndim != 3 or len(labels) != images:
        raise ValueError(
            f"{OP}: masks: expected shape ({images}, H, W), one for each image of features, "
            f"got {_checks.shape(labels)}"
        )
    return labels


def _resized(labels: Tensor, size: Any) -> Tensor:
    """(N, H, W) -> (N, *size), int64, by nearest neighbour; float64 holds every label."""
    scaled = F.interpolate(labels.double().unsqueeze(1), size=tuple(size), mode="nearest")
    return scaled.squeeze(1).long()


def _faiss() -> Any:
    return optional("faiss", OP, "faiss-cpu")
