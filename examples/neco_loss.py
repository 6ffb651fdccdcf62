"""A training step of NeCo: the student must rank the references as the teacher does.

Random features stand for those of a vision transformer; the student is the teacher plus a
disturbance that the loss removes.
"""

import torch
from torch import nn

import fmkernels

IMAGES, PATCHES, DIM = 4, 49, 64


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    images = torch.randn(IMAGES, PATCHES, DIM)
    teacher = nn.Linear(DIM, DIM, bias=False).requires_grad_(False)
    student = nn.Linear(DIM, DIM, bias=False)
    student.weight.data = teacher.weight + 0.1 * torch.randn(DIM, DIM)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)

    # One weight per patch: here the left half of every image counts.
    foreground = torch.arange(PATCHES).expand(IMAGES, PATCHES) % 7 < 4

    for step in range(steps):
        targets = teacher(images)
        # References are teacher patches of any images, 49 for each query's image.
        shuffled = torch.randperm(IMAGES * PATCHES)
        references = targets.flatten(0, 1)[shuffled].view_as(targets)

        loss = fmkernels.patch_neighbor_loss(
            student(images), targets, references, mask=foreground, steepness=100.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0 or (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
