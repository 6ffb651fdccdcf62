"""Who segments in context, features given: fmkernels, and the published order of steps with faiss.

A provider has two parts: ``labeller`` makes of a memory a function from patch features to labels;
``builder`` makes a memory of features and masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels.api import InContextSegmenter, PatchMemory
from knn.providers import flat_index, search_in

K, TEMPERATURE = 30, 0.02
IGNORED = 255

Memory = tuple[Tensor, Tensor]
"""Features (M, D) of norm 1, and labels (M, C), of any sum."""


class Provider(NamedTuple):
    """``None``: has no such."""

    labeller: Callable[[Memory], Callable[[Tensor], Tensor]]
    builder: Callable[[Tensor, Tensor, int, int, int], Memory] | None = None


def images_of(batch: int) -> Tensor:
    """Stand-ins whose features are given: no pixel of them is read, and they take no memory."""
    return torch.zeros(1, 1, 1, 1).expand(batch, 3, 504, 504)


def prepared(memory: Memory) -> PatchMemory:
    """As after the first search, which makes the features ready for all that follow."""
    patches = PatchMemory(*memory)
    patches.search(patches.features[:1], K)
    return patches


def our_labels(memory: Memory) -> Callable[[Tensor], Tensor]:
    given: list[Tensor] = []  # what the encoder returns next
    segmenter = InContextSegmenter(
        lambda images: given.pop(), memory[1].shape[1], k=K, temperature=TEMPERATURE
    )
    segmenter.memory = prepared(memory)

    def label(tokens: Tensor) -> Tensor:
        given.append(tokens)
        return segmenter.propagate(images_of(len(tokens))).flatten(0, 2)

    return label


def our_search(memory: Memory) -> Callable[[Tensor], Any]:
    """What ``our_labels`` does before the labels are carried over."""
    patches = prepared(memory)
    return lambda tokens: patches.search(tokens.flatten(0, 1), K)


def our_memory(features: Tensor, masks: Tensor, classes: int, kept: int, batch: int) -> Memory:
    given = iter(features.split(batch))
    memory = PatchMemory.build(
        lambda images: next(given),
        [(images_of(len(part)), part) for part in masks.split(batch)],
        classes,
        size=kept * len(features),
        num_images=len(features),
    )
    return memory.features, memory.labels


def published_labels(memory: Memory) -> Callable[[Tensor], Tensor]:
    """Search; gather the features and the labels of all neighbours; normalise both sides; cosines
    once more; softmax; weighted sum."""
    features, counts = memory
    labels = counts.float() / counts.sum(dim=1, keepdim=True)
    index = flat_index(features)

    def label(tokens: Tensor) -> Tensor:
        batch, patches, dim = tokens.shape
        neighbors = search_in(index, tokens.reshape(-1, dim), K)[1].flatten()
        keys = features[neighbors].reshape(batch, patches, K, dim)
        values = labels[neighbors].reshape(batch, patches, K, -1)
        queries, keys = F.normalize(tokens, dim=-1), F.normalize(keys, dim=-1)
        cosines = torch.einsum("bnld,bnmd->bnlm", queries.unsqueeze(2), keys) / TEMPERATURE
        shares = F.softmax(cosines.squeeze(2), dim=-1).unsqueeze(-1)
        return torch.einsum("bnms,bnmc->bnsc", shares, values).squeeze(-2).flatten(0, 1)

    return label


def published_memory(
    features: Tensor, masks: Tensor, classes: int, kept: int, batch: int
) -> Memory:
    """One-hot pixels; the classes of every patch twice, one patch after the other; the patches
    with the smallest scores; gathered and normalised."""
    side = round(features.shape[1] ** 0.5)
    draw = torch.Generator().manual_seed(0)
    memory = torch.zeros(kept * len(features), features.shape[2], dtype=features.dtype)
    labels = torch.zeros(len(memory), classes, dtype=features.dtype)
    filled = 0
    for tokens, part in zip(features.split(batch), masks.split(batch), strict=True):
        part = part.clone()
        part[part == IGNORED] = 0
        patches = patches_of(part, side)  # (B, side, side, pixels)
        shares = F.one_hot(patches, classes).to(features.dtype).mean(dim=3).flatten(1, 2)
        chosen = torch.stack([draw_patches(image, classes, kept, draw) for image in patches])
        found = torch.stack([image[rows] for image, rows in zip(tokens, chosen, strict=True)])
        found = found / found.norm(dim=2, keepdim=True)
        block = slice(filled, filled + chosen.numel())
        memory[block] = found.flatten(0, 1)
        labels[block] = shares.gather(1, chosen.unsqueeze(-1).repeat(1, 1, classes)).flatten(0, 1)
        filled += chosen.numel()
    return memory, labels


def patches_of(masks: Tensor, side: int) -> Tensor:
    """(B, H, W) -> (B, side, side, pixels)"""
    height, width = masks.shape[1] // side, masks.shape[2] // side
    tiles = masks.reshape(len(masks), side, height, side, width)
    return tiles.permute(0, 1, 3, 2, 4).flatten(3)


def draw_patches(patches: Tensor, classes: int, kept: int, draw: torch.Generator) -> Tensor:
    """The patches of an image to keep: those with rare classes, mostly."""
    frequency = torch.zeros(classes)
    scores = torch.zeros(patches.shape[:2])
    for row in patches:
        for patch in row:
            frequency[patch.unique()] += 1
    for i, row in enumerate(patches):
        for j, patch in enumerate(row):
            scores[i, j] = frequency[patch.unique()].sum()
    scores = scores.flatten()
    scores *= torch.rand(len(scores), generator=draw)
    return scores.topk(kept, largest=False).indices


PROVIDERS: dict[str, Provider] = {
    "fmkernels": Provider(our_labels, our_memory),
    "fmkernels-search": Provider(our_search),
    "published": Provider(published_labels, published_memory),
}
