"""The same functions composed from the installed diffsort package, in PyTorch's eager mode."""

import functools

import torch
from diffsort.functional import sort
from diffsort.networks import get_sorting_network
from torch.nn import functional as F


@functools.lru_cache(maxsize=2)
def sorting_network(network, n, dtype):
    """DiffSortNet's matrices; to make them takes longer than to use them once."""
    layers = get_sorting_network(network, n, "cpu")
    return [[matrix.to(dtype) for matrix in layer] for layer in layers]


def soft_sort(scores, *, steepness, network="bitonic", distribution="cauchy"):
    """What ``DiffSortNet(network, n, steepness=…, distribution=…)(scores)`` computes."""
    matrices = sorting_network(network, scores.shape[-1], scores.dtype)
    return sort(matrices, scores, steepness, 0.25, distribution)


def soft_sort_cross_entropy(student, teacher, **settings):
    """Per row: −(1/n) Σ_ij Q·log P; diffsort has no clamp."""
    _, p = soft_sort(student, **settings)
    with torch.no_grad():
        _, q = soft_sort(teacher, **settings)
    return -(q * p.log()).sum(dim=-1).mean(dim=-1)


def patch_neighbor_loss(student, teacher, references, **settings):
    def similarities(patches):
        a, b = F.normalize(patches, dim=-1), F.normalize(references, dim=-1)
        return torch.einsum("bnd,brd->bnr", a, b).flatten(0, 1)

    with torch.no_grad():
        teacher_scores = similarities(teacher)
    return soft_sort_cross_entropy(similarities(student), teacher_scores, **settings).mean()
