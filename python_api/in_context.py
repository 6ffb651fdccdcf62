"""In-context segmentation: labels carried over from the nearest patches of labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels import _checks
from fmkernels.ops.knn_label_propagation import check_temperature, vote, weights

from . import in_context_pictures
from .arrays import optional
from .patch_encoder import (
    Augmentation,
    Encoder,
    batches,
    counted,
    encode,
    evaluating,
    length,
    nothing,
)
from .patch_labels import check_dataset
from .patch_memory import PatchMemory
from .segmentation_metrics import ConfusionMatrix, Matching

CLASSES = 8
"""Classes whose full-size maps are in memory at a time."""


class SegmentationResult(NamedTuple):
    """How well an evaluation's predictions overlap with the truth."""

    confusion: ConfusionMatrix
    """Pixels, truth in rows and predictions in columns."""
    iou: Tensor
    """(C,), float64, NaN for a class that is in neither truth nor prediction."""
    miou: float
    """Mean of ``iou`` over the classes that there are."""
    matching: Matching
    """The Hungarian assignment of predicted to true classes, and the IoU that follows from it."""
    matched_miou: float
    """Mean IoU after this assignment, as the published evaluation reports it: an absent class
    counts as 0."""

    def __str__(self) -> str:
        return f"mIoU {self.miou:.4f}, after Hungarian matching {self.matched_miou:.4f}"


class InContextSegmenter:
    """Segment images by the labels of the nearest patches of other images; nothing is trained.

    With q a patch of the image, b_j its k nearest patches in the memory and y_j their labels,

        label(q) = Σ_j softmax_j(cos(q, b_j) / temperature) y_j

    The labels of an image's patches are upsampled bilinearly, and each pixel takes the largest.

    Args:
        encoder: as for :meth:`PatchMemory.build`.
        num_classes: C.
        patch_size: of the encoder, in pixels; see :meth:`PatchMemory.build`.
        grid: (rows, columns) of its tokens, instead.
        k: neighbours of each patch.
        temperature: > 0, in units of the cosine.
        memory_size: the largest number of patches to keep; all of them if None.
        epochs: how often :meth:`fit` goes through the dataset.
        augment: changes an image and its mask at random, for the memory.
        ignore_index: pixels without a class: 0 in the memory, left out of the evaluation.
        batch_size: single images that are encoded together; batches stay as they are.
        seed: of the choice of patches.
        device: where to keep the memory; that of the features if None.
        progress: show bars (needs tqdm).

    Raises:
        TypeError, ValueError: a setting that does not fit.

    Numerics:
        Neighbours are exact (:func:`fmkernels.knn`); labels are summed in float32 (float64 for
        float64 features). Neither the neighbours' features, nor a one-hot mask, nor full-size maps
        of more than 8 classes are ever in memory.

    Source:
        Balažević et al., *Towards In-Context Scene Understanding*, NeurIPS 2023; protocol of its
        open reproduction, with the differences that docs/guides/from_open_hummingbird.md lists.

    Example:
        >>> import torch
        >>> from fmkernels.api import InContextSegmenter
        >>> images = torch.rand(8, 3, 16, 16)
        >>> masks = (images.mean(dim=1) > 0.5).long()
        >>> encoder = torch.nn.PixelUnshuffle(2)  # (B, 3, 16, 16) -> (B, 12, 8, 8)
        >>> segmenter = InContextSegmenter(encoder, num_classes=2).fit(zip(images, masks))
        >>> segmenter.predict(images[:1]).shape
        torch.Size([1, 16, 16])
        >>> segmenter.evaluate(zip(images, masks)).miou > 0.5
        True
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        *,
        patch_size: int | None = None,
        grid: tuple[int, int] | None = None,
        k: int = 30,
        temperature: float = 0.02,
        memory_size: int | None = None,
        epochs: int = 1,
        augment: Augmentation | None = None,
        ignore_index: int = 255,
        batch_size: int = 16,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> None:
        op = "InContextSegmenter"
        if not callable(encoder):
            raise TypeError(
                f"{op}: encoder: expected a function of images, got {type(encoder).__name__}"
            )
        check_temperature(op, temperature)
        self.encoder = encoder
        self.num_classes = _checks.positive_integer(op, "num_classes", num_classes)
        self.patch_size, self.grid = patch_size, grid
        self.k = _checks.positive_integer(op, "k", k)
        self.temperature = float(temperature)
        self.memory_size, self.epochs, self.augment = memory_size, epochs, augment
        self.ignore_index, self.batch_size, self.seed = ignore_index, batch_size, seed
        self.device = None if device is None else _checks.device(op, "device", device)
        self.progress = progress
        self._memory: PatchMemory | None = None

    @property
    def memory(self) -> PatchMemory:
        """What predictions are retrieved from; set by :meth:`fit`, or to one that was loaded."""
        if self._memory is None:
            raise ValueError(
                "InContextSegmenter: memory: expected one to predict from, got none; call "
                "fit(dataset) first, or set memory = PatchMemory.load(path)"
            )
        return self._memory

    @memory.setter
    def memory(self, memory: PatchMemory) -> None:
        if memory.num_classes != self.num_classes or not len(memory):
            raise ValueError(
                f"InContextSegmenter: memory: expected patches with labels of {self.num_classes} "
                f"classes, got {memory!r}"
            )
        self._memory = memory

    def fit(self, dataset: Iterable[Any], num_images: int | None = None) -> InContextSegmenter:
        """Build the memory from images with masks, by :meth:`PatchMemory.build`; returns itself."""
        self.memory = PatchMemory.build(
            self.encoder,
            dataset,
            self.num_classes,
            size=self.memory_size,
            num_images=num_images,
            patch_size=self.patch_size,
            grid=self.grid,
            epochs=self.epochs,
            augment=self.augment,
            ignore_index=self.ignore_index,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            progress=self.progress,
        )
        return self

    def propagate(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> labels of their patches, (B, rows, columns, C), of sum 1."""
        tokens, grid = self._encode(images)
        memory = self.memory
        scores, indices = memory.search(tokens.flatten(0, 1), min(self.k, len(memory)))
        shares = weights(scores, indices, self.temperature)
        labels = vote(shares, indices, memory.labels, self.num_classes)
        return labels.view(len(images), *grid, self.num_classes)

    def predict_proba(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, H, W) -> (B, C, H, W), or of another ``size`` (height, width)."""
        maps = self.propagate(images).permute(0, 3, 1, 2)
        return F.interpolate(maps, size or images.shape[2:], mode="bilinear", align_corners=False)

    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, H, W) -> classes (B, H, W), int64, or of another ``size``.

        The largest of :meth:`predict_proba`, the lower class where two are equal, without its
        memory.
        """
        maps = self.propagate(images).permute(0, 3, 1, 2)
        return _largest(maps, size or (images.shape[2], images.shape[3]))

    def evaluate(
        self,
        dataset: Iterable[Any],
        picture: str | PathLike[str] | None = None,
        *,
        shown: int = 6,
    ) -> SegmentationResult:
        """Predict a dataset, and compare with its masks (needs SciPy, for the matching).

        Args:
            dataset: of (image, mask) or batches of both. Predictions have the size of the masks.
            picture: a file for the first images, their masks and their predictions, side by side
                (needs matplotlib).
            shown: how many images the picture shows.

        Returns:
            A :class:`SegmentationResult`, all from one confusion matrix.

        Raises:
            ImportError: SciPy, or matplotlib for a picture, is not installed.
            TypeError: items that are no pairs, masks that are not integers.
            ValueError: no images, classes out of range, a picture that cannot be written.
        """
        op = "InContextSegmenter.evaluate"
        optional("scipy.optimize", f"{op}, which matches classes,")
        if picture is not None:
            in_context_pictures.check(op, picture)
        confusion = ConfusionMatrix(self.num_classes, self.ignore_index)
        examples: list[tuple[Tensor, Tensor, Tensor]] = []
        source, seen = batches(op, dataset, self.batch_size), 0
        for images, masks in counted(source, self.progress, length(dataset), "evaluation"):
            check_dataset(op, masks, self.num_classes, self.ignore_index, seen)
            seen += len(images)
            prediction = self.predict(images, (masks.shape[1], masks.shape[2]))
            confusion.update(prediction, masks.to(prediction.device))
            if picture is not None and len(examples) < shown:
                examples += zip(images.cpu(), masks.cpu(), prediction.cpu(), strict=True)
        if not seen:
            raise nothing(op)
        if picture is not None:
            in_context_pictures.predictions(
                picture, examples[:shown], self.num_classes, self.ignore_index
            )
        matching = confusion.matched("hungarian")
        return SegmentationResult(
            confusion, confusion.iou(), confusion.miou(), matching, matching.miou(absent="zero")
        )

    def neighbors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The patches that each patch is labelled by: cosines and rows of the memory, best first.

        Images (B, 3, H, W) -> (B, rows, columns, k) and the same in int64; ``memory.origins`` says
        which image and patch a row is from.
        """
        tokens, grid = self._encode(images)
        scores, indices = self.memory.search(tokens, min(self.k, len(self.memory)))
        return scores.unflatten(1, grid), indices.unflatten(1, grid)

    def draw_neighbors(
        self,
        picture: str | PathLike[str],
        image: Tensor,
        patches: Iterable[tuple[int, int]],
        dataset: Any,
        *,
        shown: int = 8,
    ) -> None:
        """Draw some patches of an image with what was retrieved for each (needs matplotlib).

        Args:
            picture: a file.
            image: (3, H, W)
            patches: (row, column) of each patch in the grid.
            dataset: that the memory was built from, with ``dataset[i]`` an (image, mask) that is
                the same each time.
            shown: neighbours to draw, at most k.

        Raises:
            ValueError: the memory does not say where its patches are from, or was built from
                images that were augmented, which nobody has any more.
        """
        if self.augment is not None or bool((self.memory.origins < 0).any()):
            raise ValueError(
                "InContextSegmenter.draw_neighbors: dataset: expected the very images that the "
                "memory was built from, got a memory of augmented ones, or without origins; fit "
                "without augment"
            )
        scores, indices = (found[0] for found in self.neighbors(image[None]))
        in_context_pictures.neighbors(
            picture, image, list(patches), scores, indices, self.memory.origins, dataset, shown
        )

    def _encode(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        op = "InContextSegmenter.predict"
        memory = self.memory
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{op}: images: expected a batch (B, 3, H, W), got {got}")
        with evaluating(self.encoder):
            tokens, grid = encode(op, self.encoder, images, self.grid, self.patch_size)
        if tokens.shape[2] != memory.features.shape[1]:
            raise ValueError(
                f"{op}: encoder: expected {memory.features.shape[1]} features per patch, as the "
                f"memory has, got {tokens.shape[2]}"
            )
        return tokens.to(memory.features.device), grid

    def __repr__(self) -> str:
        memory = "not fitted" if self._memory is None else repr(self._memory)
        return (
            f"InContextSegmenter({self.num_classes} classes, k={self.k}, "
            f"temperature={self.temperature}, {memory})"
        )


def _largest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, rows, columns) -> (B, H, W): the class that is largest after bilinear upsampling.

    A full-size map of 150 classes has 157 MB for an image of 512 × 512 pixels, so it is made for
    one image and a few classes at a time; each class is upsampled as if alone.
    """
    classes = torch.zeros(len(maps), *size, dtype=torch.int64, device=maps.device)
    for image, chosen in zip(maps, classes, strict=True):
        best = torch.full(size, -torch.inf, dtype=maps.dtype, device=maps.device)
        for first in range(0, maps.shape[1], CLASSES):
            part = image[None, first : first + CLASSES]
            full = F.interpolate(part, size, mode="bilinear", align_corners=False)[0]
            for c, share in enumerate(full, first):  # takes half the time of full.max(dim=0)
                chosen.masked_fill_(share > best, c)
                torch.maximum(best, share, out=best)
            del full, share  # before the next ones are made
    return classes
