"""The published dense retrieval evaluation, step by step as it describes itself, with faiss.

One-hot labels, keys gathered for every neighbour, cosines computed a second time, every pixel kept
until the end. It shares no code with fmkernels, and is as slow and as large as it looks.
"""

import faiss
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F


def patchify(masks, patch):
    """(B, H, W) -> (B, N, pixels), 255 counted as 0."""
    masks = masks.long().clone()
    masks[masks == 255] = 0
    blocks = [
        mask[top : top + patch, left : left + patch].flatten()
        for mask in masks
        for top in range(0, mask.shape[0], patch)
        for left in range(0, mask.shape[1], patch)
    ]
    return torch.stack(blocks).view(len(masks), -1, patch * patch)


def patch_labels(masks, num_classes, patch):
    """(B, N, C): the mean of the pixels' one-hot classes."""
    return F.one_hot(patchify(masks, patch), num_classes).float().mean(dim=2)


def patch_scores(patches, num_classes):
    """(N, pixels) of one image -> (N,): patches of the image with each class present, added up."""
    present = [set(patch.tolist()) for patch in patches]
    frequency = [sum(c in classes for classes in present) for c in range(num_classes)]
    scores = [float(sum(frequency[c] for c in classes)) if classes else 1e6 for classes in present]
    return torch.tensor(scores), torch.tensor([bool(classes) for classes in present])


def build_memory(features, masks, num_classes, patch, *, size=None, epochs=1, draws=None):
    """Features (B, N, D) and masks of all epochs -> keys (M, D), labels (M, C).

    ``draws`` gives the uniform numbers of one image after the other.
    """
    labels = patch_labels(masks, num_classes, patch)
    if size is None:
        return F.normalize(features, dim=2).flatten(0, 1), labels.flatten(0, 1)
    per_image = size // len(features)  # all epochs are in features
    assert len(features) % epochs == 0
    keys, values = [], []
    for image, patches in enumerate(patchify(masks, patch)):
        scores, some = patch_scores(patches, num_classes)
        scores[some] = scores[some] * draws[image][: int(some.sum())]
        chosen = torch.topk(scores, per_image, largest=False).indices
        keys.append(features[image][chosen])
        values.append(labels[image][chosen])
    keys = torch.cat(keys)
    return keys / keys.norm(dim=1, keepdim=True), torch.cat(values)


def nearest(queries, keys, k):
    """(Q, D) -> indices (Q, k) of the largest inner products."""
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(np.ascontiguousarray(keys.numpy()))
    return torch.from_numpy(index.search(np.ascontiguousarray(queries.numpy()), k)[1])


def propagate(queries, keys, labels, k=30, temperature=0.02):
    """(Q, D) -> (Q, C)"""
    indices = nearest(queries, keys, k)
    gathered, values = keys[indices], labels[indices]  # (Q, k, D), (Q, k, C)
    cosines = torch.cosine_similarity(queries[:, None], gathered, dim=2)
    shares = torch.softmax(cosines / temperature, dim=1)
    return torch.einsum("qk,qkc->qc", shares, values)


def upsample(labels, grid, size):
    """(B, N, C) -> (B, C, H, W)"""
    maps = labels.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=size, mode="bilinear")


def class_iou(predicted, target, classes):
    """IoU of each pair (target class, predicted class), from a list of all pixels."""
    table = np.zeros((classes, classes))
    for c in range(classes):
        for d in range(classes):
            both = np.logical_and(target == c, predicted == d).sum()
            either = np.logical_or(target == c, predicted == d).sum()
            table[c, d] = both / either if either else np.nan
    return table


def miou(predictions, masks, num_classes):
    """(mean over the classes that there are, mean over all classes after Hungarian matching)."""
    kept = masks != 255
    predicted, target = predictions[kept].numpy(), masks[kept].numpy()
    table = class_iou(predicted, target, num_classes)
    rows, columns = linear_sum_assignment(1 - np.nan_to_num(table))
    return np.nanmean(np.diag(table)), np.nan_to_num(table)[rows, columns].sum() / num_classes
