"""NeCo on photographs: a small vision transformer, its slow teacher, six crops of every image."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from fmkernels.api import NeCoLoss, ProjectionHead, intersection_boxes
from fmkernels.demo import photographs

PATCH, DIM = 14, 96
PATCHES = [(10, 10)] * 2 + [(5, 5)] * 4  # two global crops, four local ones


class Student(nn.Module):
    """Images -> (B, 64, height, width): patch tokens, projected."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, DIM, *PATCHES[0]))
        layers = (
            nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, 0.0, "gelu", batch_first=True)
            for _ in range(3)
        )
        self.blocks = nn.Sequential(*layers)
        self.head = ProjectionHead(DIM, hidden_dim=256, out_dim=64)

    def forward(self, images):
        tokens = self.embed(images)
        size = tokens.shape[2:]
        tokens = tokens + F.interpolate(self.position, size, mode="bicubic")
        return self.head(self.blocks(tokens.flatten(2).mT)).mT.unflatten(-1, size)


def random_crops(photo):
    """Six resized crops of a photograph, and their boxes in its pixels."""
    _, height, width = photo.shape
    sides = [int(share * min(height, width)) for share in (0.8, 0.7, 0.4, 0.35, 0.3, 0.25)]
    centre = torch.rand(2) * (torch.tensor([width, height]) - sides[0]) + sides[0] / 2
    views, boxes = [], []
    for side, (rows, columns) in zip(sides, PATCHES, strict=True):
        corner = centre - side / 2 + (torch.rand(2) - 0.5) * 0.4 * side
        x = int(corner[0].clamp(0, width - side))
        y = int(corner[1].clamp(0, height - side))
        part, size = photo[None, :, y : y + side, x : x + side], (rows * PATCH, columns * PATCH)
        views.append(4 * F.interpolate(part - 0.5, size, mode="bilinear", antialias=True)[0])
        boxes.append([x, y, x + side, y + side])
    return views, torch.tensor(boxes)


def main(steps: int = 100) -> list[float]:
    torch.manual_seed(0)
    photos = list(photographs.load().values())
    student = Student()
    teacher = copy.deepcopy(student).requires_grad_(False)
    criterion = NeCoLoss(grid_size=7, queue_size=1024, dim=64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
    losses = []
    for step in range(steps):
        views, boxes = zip(*map(random_crops, photos), strict=True)
        crops = [torch.stack(images) for images in zip(*views, strict=True)]
        boxes = intersection_boxes(torch.stack(boxes), PATCHES)
        loss = criterion([student(crop) for crop in crops], [teacher(c) for c in crops[:2]], boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.004)
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            print(f"step {step + 1:3}  loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    return losses


if __name__ == "__main__":
    main()
