"""Random crops of imaginary images."""

import torch

from fmkernels.api import intersection_boxes

SIZES = ((16, 16), (16, 16), (7, 7), (7, 7))
"""Patches of two global and two local crops."""


def random_crops(batch, sizes=SIZES, num_globals=2, dtype=torch.float64):
    """(B, V, 4): large global crops around the middle, local ones inside of their intersection."""
    images = []
    for _ in range(batch):
        boxes = []
        for crop in range(len(sizes)):
            low, high = (0.0, 90.0) if crop < num_globals else (95.0, 120.0)
            corner = low + (high - low) * torch.rand(2, dtype=dtype)
            side = (150 + 80 * torch.rand(2, dtype=dtype)) if crop < num_globals else 30.0
            boxes.append(torch.cat([corner, corner + side]))
        images.append(torch.stack(boxes))
    return torch.stack(images)


def random_batch(batch=2, dim=8, sizes=SIZES, num_globals=2, dtype=torch.float64):
    """Student maps, teacher maps and boxes."""
    student = [torch.randn(batch, dim, *size, dtype=dtype, requires_grad=True) for size in sizes]
    teacher = [tokens.detach() + 0.3 * torch.randn_like(tokens) for tokens in student[:num_globals]]
    crops = random_crops(batch, sizes, num_globals, dtype)
    return student, teacher, intersection_boxes(crops, sizes, num_globals=num_globals)


def random_references(pairs, batch, dim, grid_size=7):
    return torch.randn(pairs, batch, grid_size**2, dim, dtype=torch.float64)


def gradients(loss, student):
    return torch.autograd.grad(loss, student, allow_unused=True, materialize_grads=True)
