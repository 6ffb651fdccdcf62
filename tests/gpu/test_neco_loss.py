"""NeCo's training loss on a GPU is that of the CPU."""

import torch
from gpu.target import DRY_RUN, running

from fmkernels.api import NeCoLoss, ProjectionHead, intersection_boxes
from fmkernels.testing import assert_parity

SIDES = (5, 5, 3) if DRY_RUN else (16, 16, 7, 7)
GRID = 2 if DRY_RUN else 7
BATCH, DIM = 2, 16


def gradient(device, dtype, maps, references):
    corners = [(0, 0, 200, 200), (60, 40, 260, 240), (80, 60, 150, 130), (90, 70, 160, 140)]
    crops = torch.tensor([corners[: len(SIDES)]] * BATCH, dtype=dtype, device=device)
    boxes = intersection_boxes(crops, [(side, side) for side in SIDES])
    student = [x.to(device, dtype).requires_grad_() for x in maps]
    teacher = [x.to(device, dtype).flip(0) for x in maps[:2]]
    criterion = NeCoLoss(GRID, queue_size=None)
    loss = criterion(student, teacher, boxes, references=references.to(device, dtype))
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, student)]).cpu()


def test_gradient_is_that_of_float64(backend, verifies, device):
    verifies("soft_sort_cross_entropy")
    maps = [torch.randn(BATCH, DIM, side, side) for side in SIDES]
    pairs = 2 * (len(SIDES) - 1)
    references = torch.randn(pairs, BATCH, GRID**2, DIM)
    with running(backend):
        found = gradient(device, torch.float32, maps, references)
    with running("reference"):
        same_dtype = gradient(device, torch.float32, maps, references)
        exact = gradient(device, torch.float64, maps, references)
    assert_parity(found, same_dtype, exact, name="gradient of the maps")


def losses_of_a_training(backend, device):
    torch.manual_seed(0)
    head = ProjectionHead(DIM, 32, 8).to(device)
    criterion = NeCoLoss(GRID, queue_size=64 if DRY_RUN else 512, dim=8).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    crops = torch.tensor([[(0, 0, 200, 200), (60, 40, 260, 240)]] * BATCH, device=device).float()
    boxes = intersection_boxes(crops, [(SIDES[0], SIDES[0])] * 2)
    tokens = [torch.randn(BATCH, SIDES[0], SIDES[0], DIM, device=device) for _ in range(2)]
    losses = []
    with running(backend):
        for _ in range(2 if DRY_RUN else 20):
            student = [head(x).movedim(-1, 1) for x in tokens]
            teacher = [x.detach().roll(1, 0) for x in student]
            loss = criterion(student, teacher, boxes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert all(parameter.device == tokens[0].device for parameter in head.parameters())
    return losses


def test_a_training_with_a_queue_is_that_of_the_reference(backend, verifies, device):
    verifies("soft_sort_cross_entropy")
    found, expected = (losses_of_a_training(name, device) for name in (backend, "reference"))
    # twenty steps of AdamW let rounding grow; a wrong gradient changes the second loss by more
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
