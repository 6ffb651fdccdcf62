"""Features and labels of training patches: what in-context segmentation retrieves from."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels import _checks

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
from .patch_index import PatchIndex
from .patch_labels import check_dataset, patch_label_counts
from .safe_file import SafeFile

FILE = SafeFile("PatchMemory", ("features", "labels", "origins"))


class MemoryReport(NamedTuple):
    """What a memory holds, and how many bytes each part of it takes."""

    patches: int
    features: int
    labels: int
    origins: int

    def __str__(self) -> str:
        parts = zip(self._fields[1:], self[1:], strict=True)
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts)
        return f"{self.patches:,} patches: {sizes}"


class PatchMemory:
    """Normalised features of patches, with the pixels of every class in each of them.

    Made by :meth:`build` from a frozen encoder and images with masks, or by :meth:`load`.

    Args:
        features: (M, D), floating, of norm 1 (or 0).
        labels: (M, C) counts or shares of the classes, as :func:`patch_label_counts` gives them.
        origins: (M, 2), integers: the image that a patch is from, in the order of the dataset
            (going on in later epochs), and its number in the image, row by row. Unknown (−1) if
            None.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from fmkernels.api import PatchMemory
        >>> images, masks = torch.rand(4, 3, 8, 8), torch.randint(3, (4, 8, 8))
        >>> encoder = torch.nn.Conv2d(3, 16, kernel_size=4, stride=4)
        >>> memory = PatchMemory.build(encoder, zip(images, masks), 3, size=8, num_images=4)
        >>> memory
        PatchMemory(8 patches of 4 images, 16 features, 3 classes)
    """

    def __init__(self, features: Tensor, labels: Tensor, origins: Tensor | None = None) -> None:
        op = "PatchMemory"
        _checks.floating_tensor(op, "features", features)
        _checks.dimensions(op, "features", features, "(M, D)")
        if origins is None:
            origins = torch.full((len(features), 2), -1, dtype=torch.int32, device=features.device)
        for name, table in (("labels", labels), ("origins", origins)):
            if not isinstance(table, Tensor) or table.is_complex() or table.dtype == torch.bool:
                if not isinstance(table, Tensor):
                    raise _checks.no_tensor(op, name, table)
                raise TypeError(f"{op}: {name}: expected numbers, got {table.dtype}")
            _checks.same_device(op, name, table, "features", features)
            columns = table.shape[-1] if name == "labels" and table.ndim else 2
            if tuple(table.shape) != (len(features), columns) or not columns:
                raise ValueError(
                    f"{op}: {name}: expected shape ({len(features)}, "
                    f"{'C' if name == 'labels' else 2}), a row for each of features, got "
                    f"{_checks.shape(table)}"
                )
        self.features, self.labels, self.origins = features, labels, origins
        self._index: PatchIndex | None = None

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        dataset: Iterable[Any],
        num_classes: int,
        *,
        size: int | None = None,
        num_images: int | None = None,
        patch_size: int | None = None,
        grid: tuple[int, int] | None = None,
        epochs: int = 1,
        augment: Augmentation | None = None,
        ignore_index: int = 255,
        ignored_as: int | None = 0,
        batch_size: int = 16,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> PatchMemory:
        """Encode images with masks, and keep their patches, or a share that favours rare classes.

        With a limit, every image gives K = size // (images · epochs) patches, those with the
        smallest

            score = U(0, 1) · Σ over the classes in the patch of the number of patches of the image
                    that have the class

        Args:
            encoder: any function of images (B, 3, H, W) that returns patch tokens (B, N, D), row by
                row and without a class token, or maps (B, D, rows, columns). A module runs in
                evaluation mode, and is left as it was found.
            dataset: an iterable of (image (3, H, W), mask (H, W)), or of batches of both, such as a
                DataLoader. Masks are integers, of a size that is a multiple of the grid.
            num_classes: C.
            size: the largest number of patches to keep; all of them if None.
            num_images: images in the dataset; needed with ``size`` if ``len(dataset)`` is not that.
            patch_size: of the encoder, in pixels; only needed where the grid of the tokens cannot
                be told from square patches that cover the image.
            grid: (rows, columns) of the tokens, instead.
            epochs: how often to go through the dataset.
            augment: changes an image and its mask at random, for every image and epoch.
            ignore_index: pixels without a class.
            ignored_as: the class that they count as; None leaves them out.
            batch_size: single images that are encoded together; batches stay as they are.
            seed: of the draw, and of PyTorch's generator while the dataset is read.
            device: where to keep the memory; that of the features if None.
            progress: show a bar (needs tqdm).

        Raises:
            TypeError: items that are no pairs, an encoder that returns no tensor, or float masks.
            ValueError: sizes that do not fit, classes out of range, features that are not finite.
        """
        op = "PatchMemory.build"
        positive = _checks.positive_integer
        num_classes = positive(op, "num_classes", num_classes)
        epochs, batch_size = positive(op, "epochs", epochs), positive(op, "batch_size", batch_size)
        if patch_size is not None:
            patch_size = positive(op, "patch_size", patch_size)
        if device is not None:
            device = _checks.device(op, "device", device)
        if epochs > 1 and iter(dataset) is dataset:
            raise ValueError(
                f"{op}: dataset: expected one that can be read {epochs} times, got an iterator, "
                "which can be read once; give a list or a DataLoader"
            )
        if num_images is None:
            num_images = length(dataset)
        kept = None if size is None else _share(op, size, num_images, epochs)
        draw = torch.Generator().manual_seed(seed)
        features, labels, origins = _Table(), _Table(), _Table()
        images_seen = 0
        with evaluating(encoder), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for epoch in range(epochs):
                source = batches(op, dataset, batch_size, augment)
                title, before = f"memory, epoch {epoch + 1} of {epochs}", images_seen
                for images, masks in counted(source, progress, num_images, title):
                    number = images_seen - before
                    check_dataset(op, masks, num_classes, ignore_index, number)
                    tokens, found = encode(op, encoder, images, grid, patch_size)
                    counts = patch_label_counts(
                        masks, num_classes, found, ignore_index=ignore_index, ignored_as=ignored_as
                    )
                    chosen = None
                    if kept is not None:
                        chosen = torch.stack([favour_rare(c, kept, draw) for c in counts])
                    numbers = torch.arange(images_seen, images_seen + len(images))
                    rows = _rows(tokens, counts, numbers, chosen)
                    images_seen += len(images)
                    if size is not None and num_images is not None:
                        _check_number(op, images_seen, num_images * (epoch + 1))
                    expected = len(rows[0]) // len(images) * epochs * (num_images or 0)
                    for table, part in zip((features, labels, origins), rows, strict=True):
                        table.append(part.to(device or tokens.device), expected)
        if not images_seen:
            raise nothing(op)
        return cls(features.finish(), labels.finish(), origins.finish())

    def __len__(self) -> int:
        """How many patches."""
        return len(self.features)

    @property
    def num_classes(self) -> int:
        """C, the columns of the labels."""
        return self.labels.shape[1]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k patches that are nearest to each feature (…, D): cosines and indices (…, k).

        The bank is made ready for the search the first time. The answer is that of
        :func:`fmkernels.knn`; fewer patches than k are followed by −inf and −1.
        """
        if self._index is None:
            features = self.features
            self._index = PatchIndex(
                features.shape[1], metric="cosine", dtype=features.dtype, device=features.device
            )
            self._index.add(features)
        return self._index.search(queries, k)

    def to(self, device: torch.device | str) -> PatchMemory:
        """The same memory on another device."""
        place = _checks.device("PatchMemory.to", "device", device)
        return PatchMemory(*(table.to(place) for table in self._tables().values()))

    def report(self) -> MemoryReport:
        """How large the memory is; print it."""
        return MemoryReport(len(self), *(table.nbytes for table in self._tables().values()))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, which replaces an older one only when it is complete.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
            ValueError: the folder is not there.
        """
        FILE.write(path, self._tables())

    @classmethod
    def load(
        cls, path: str | PathLike[str], device: torch.device | str | None = None
    ) -> PatchMemory:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ImportError: safetensors is not installed.
            ValueError: it is damaged, incomplete, or something else.
        """
        if device is not None:
            device = _checks.device("PatchMemory.load", "device", device)
        memory = FILE.read(path, lambda tables, _: cls(**tables))
        return memory if device is None else memory.to(device)

    def _tables(self) -> dict[str, Tensor]:
        return {"features": self.features, "labels": self.labels, "origins": self.origins}

    def __repr__(self) -> str:
        images = len(self.origins[:, 0].unique())
        return (
            f"PatchMemory({len(self)} patches of {images} images, {self.features.shape[1]} "
            f"features, {self.num_classes} classes)"
        )


def rarity_scores(counts: Tensor) -> Tensor:
    """(N, C) counts of an image -> (N,): how common the classes of each patch are in the image.

    The sum, over the classes in the patch, of the number of patches that have the class; a patch
    without a class gets infinity, and so comes last.
    """
    present = counts > 0
    frequency = present.sum(dim=0)  # (C,)
    scores = (present * frequency).sum(dim=1).float()
    return scores.masked_fill(~present.any(dim=1), torch.inf)


def favour_rare(counts: Tensor, kept: int, draw: torch.Generator) -> Tensor:
    """The patches of an image to keep, (kept,) or all N, in the order of their scores.

    Uniform numbers are drawn for the patches that have a class, in their order, as published.
    """
    scores = rarity_scores(counts).cpu()
    some = scores.isfinite()
    scores[some] *= torch.rand(int(some.sum()), generator=draw)
    return scores.argsort(stable=True)[:kept]


def _rows(
    tokens: Tensor, counts: Tensor, numbers: Tensor, chosen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised features (R, D), counts (R, C) and origins (R, 2) of the chosen patches."""
    batch, patches = tokens.shape[:2]
    if chosen is None:
        chosen = torch.arange(patches).expand(batch, -1)
    origins = torch.stack([numbers[:, None].expand_as(chosen), chosen], dim=-1).int()
    within = torch.arange(batch)[:, None]
    features = tokens[within.to(tokens.device), chosen.to(tokens.device)]
    labels = counts[within.to(counts.device), chosen.to(counts.device)]
    return F.normalize(features.flatten(0, 1), dim=-1), labels.flatten(0, 1), origins.flatten(0, 1)


class _Table:
    """Rows that arrive in parts; space for all that are expected is taken at once."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.used = 0

    def append(self, part: Tensor, expected: int) -> None:
        needed = self.used + len(part)
        if self.rows is None or needed > len(self.rows):
            grown = part.new_empty(max(needed, expected, 3 * self.used // 2), *part.shape[1:])
            if self.rows is not None:
                if part.shape[1:] != self.rows.shape[1:]:
                    raise ValueError(
                        f"PatchMemory.build: encoder: expected {self.rows.shape[1]} features per "
                        f"patch, as in the first batch, got {part.shape[1]}"
                    )
                grown[: self.used] = self.rows[: self.used]
            self.rows = grown
        self.rows[self.used : needed] = part
        self.used = needed

    def finish(self) -> Tensor:
        """The rows, and no more memory than they take."""
        assert self.rows is not None
        return self.rows if self.used == len(self.rows) else self.rows[: self.used].clone()


def _share(op: str, size: Any, num_images: int | None, epochs: int) -> int:
    """K, the patches that every image may keep."""
    limit = _checks.positive_integer(op, "size", size, ", or None for no limit")
    if num_images is None:
        raise ValueError(
            f"{op}: num_images: expected the number of images, by which size is divided, because "
            "the dataset has no length; got None"
        )
    num_images = _checks.positive_integer(op, "num_images", num_images)
    if limit < num_images * epochs:
        raise ValueError(
            f"{op}: size: expected at least a patch for each of {num_images} images and {epochs} "
            f"epochs, {num_images * epochs}, got {limit}"
        )
    return limit // (num_images * epochs)


def _check_number(op: str, seen: int, expected: int) -> None:
    if seen > expected:
        raise ValueError(
            f"{op}: num_images: expected at most {expected} images so far, got {seen}, and the "
            "limit would not hold; give num_images (the length of a list of batches is not it)"
        )
