"""Segmentation by retrieval on scenes of digits, and what NeCo post-pretraining changes.

A small vision transformer learns which digit a scene shows, from one label per image: no mask takes
part. It is then frozen, and its patch tokens segment other scenes by the labels of their nearest
patches. NeCo post-pretraining goes on from there without any label. As a control, the same encoder
goes on with its image labels for as many steps, at the same learning rate.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels.api import InContextSegmenter, NeCoLoss, ProjectionHead, intersection_boxes
from fmkernels.demo import scenes

PATCH, DIM = 4, 64
ONE_DIGIT = 36
"""Pixels along each side of a scene with one digit."""
LEARNING_RATE, POST_LEARNING_RATE = 2e-3, 2e-4
GRIDS = ((12, 12), (12, 12), (6, 6), (6, 6))
"""Patches of the two global crops and of the two local ones."""
SHARES = ((0.7, 1.0), (0.7, 1.0), (0.4, 0.6), (0.4, 0.6))
"""Smallest and largest side of each crop, of the scene's."""
SIZES = (400, 1600, 6400)
"""Patches in the memory; then all of them."""
PICTURES = ("in_context.png", "in_context_neighbors.png")
"""Predictions on test scenes, and what was retrieved for some patches."""


class Report(NamedTuple):
    """mIoU on held-out scenes."""

    by_size: dict[int, float]
    """Of the first seed before NeCo, by the number of patches in the memory."""
    untrained: list[float]
    """One for each seed, as all that follow."""
    before: list[float]
    control: list[float]
    after: list[float]


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> maps (B, 64, H / 4, W / 4), 0.1 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.GELU(),
            nn.Conv2d(32, DIM, 3, 2, 1), nn.BatchNorm2d(DIM), nn.GELU(),
            nn.Conv2d(DIM, DIM, 3, 1, 1),
        )  # fmt: skip
        layers = (
            nn.TransformerEncoderLayer(
                DIM, 4, 2 * DIM, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, images: Tensor) -> Tensor:
        """The patch tokens, as a map."""
        tokens = self.stem(4 * (images - 0.5))
        size = tokens.shape[2:]
        maps: Tensor = self.norm(self.blocks(tokens.flatten(2).mT)).mT.unflatten(-1, size)
        return maps


class Classifier(nn.Module):
    """The encoder with a linear layer on the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(DIM, len(scenes.DIGITS))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, digits)."""
        logits: Tensor = self.head(self.encoder(images).mean(dim=(2, 3)))
        return logits


def jitter(images: Tensor) -> Tensor:
    """Brightness and contrast of every channel, at random."""
    shape = (len(images), 3, 1, 1)
    return (images - 0.5) * (0.7 + 0.6 * torch.rand(shape)) + 0.5 + 0.1 * torch.randn(shape)


def pretrain(model: Classifier, data: scenes.Scenes, steps: int, peak: float) -> None:
    """Learn which digit a scene shows, in batches of 32."""
    digits = data.tags().argmax(dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps + 1, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(digits), (32,))
        loss = F.cross_entropy(model(jitter(data.images[chosen])), digits[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def random_crops(images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Four resized crops of every image, and their boxes (B, 4, 4) in its pixels."""
    batch, _, size, _ = images.shape
    views, boxes = [], []
    for (low, high), (rows, columns) in zip(SHARES, GRIDS, strict=True):
        side = size * (low + (high - low) * torch.rand(batch, 1))
        corner = torch.rand(batch, 2) * (size - side)
        centre = (corner + side / 2) * 2 / size - 1  # from −1 to 1
        scale = (side / size)[:, :, None] * torch.eye(2)
        affine = torch.cat([scale, centre[:, :, None]], dim=2)
        shape = [batch, 3, PATCH * rows, PATCH * columns]
        places = F.affine_grid(affine, shape, align_corners=False)
        views.append(jitter(F.grid_sample(images, places, "bilinear", "border", False)))
        boxes.append(torch.cat([corner, corner + side], dim=1))
    return views, torch.stack(boxes, dim=1)


def neco(encoder: Encoder, images: Tensor, steps: int) -> list[float]:
    """NeCo post-pretraining in batches of 12, without labels; returns the losses."""
    student = nn.ModuleList([encoder, ProjectionHead(DIM, hidden_dim=128, out_dim=64)])
    teacher = copy.deepcopy(student).requires_grad_(False)
    criterion = NeCoLoss(grid_size=7, queue_size=1024, dim=64)
    groups = [
        {"params": student[0].parameters(), "lr": POST_LEARNING_RATE},
        {"params": student[1].parameters(), "lr": 10 * POST_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def project(model: nn.ModuleList, crop: Tensor) -> Tensor:
        projected: Tensor = model[1](model[0](crop).movedim(1, 3)).movedim(3, 1)
        return projected

    losses = []
    for _ in range(steps):
        views, boxes = random_crops(images[torch.randint(len(images), (12,))])
        with torch.no_grad():
            targets = [project(teacher, crop) for crop in views[:2]]
        predictions = [project(student, crop) for crop in views]
        loss = criterion(predictions, targets, intersection_boxes(boxes, GRIDS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        losses.append(loss.item())
    return losses


def run(
    seeds: int = 3,
    steps: int = 250,
    neco_steps: int = 40,
    *,
    pictures: Path | None = None,
    say: Callable[[str], object] = print,
) -> Report:
    """Train, segment, draw and go on with NeCo, once per seed.

    Args:
        seeds: repetitions, with other weights and training scenes; the test scenes are the same.
        steps: of learning the image labels.
        neco_steps: of NeCo, and of the control.
        pictures: a folder for ``PICTURES``; None for none.
        say: where the lines go.
    """
    start = time.perf_counter()
    memory, test = scenes.make(200, seed=1), scenes.make(64, seed=2, test=True)
    report = Report({}, [], [], [], [])

    def miou(encoder: Encoder) -> float:
        return _segmenter(encoder).fit(memory.pairs()).evaluate(test.pairs()).miou

    for seed in range(seeds):
        torch.manual_seed(seed)
        model = Classifier()
        labelled = scenes.make(2000, seed=100 + seed, size=ONE_DIGIT, attempts=1)
        unlabelled = scenes.make(600, seed=200 + seed).images
        report.untrained.append(miou(model.encoder))
        pretrain(model, labelled, steps, LEARNING_RATE)
        if seed == 0:
            report.by_size.update(_by_size(model.encoder, memory, test, pictures, say))
            report.before.append(list(report.by_size.values())[-1])
        else:
            report.before.append(miou(model.encoder))
        goes_on = copy.deepcopy(model)
        pretrain(goes_on, labelled, neco_steps, POST_LEARNING_RATE)
        report.control.append(miou(goes_on.encoder))
        neco(model.encoder, unlabelled, neco_steps)
        report.after.append(miou(model.encoder))
        say(
            f"seed {seed}: mIoU {report.untrained[-1]:.3f} untrained, {report.before[-1]:.3f} "
            f"pretrained, {report.control[-1]:.3f} after more of it, {report.after[-1]:.3f} after "
            "NeCo instead"
        )
    for name, values in (("more of the same", report.control), ("NeCo", report.after)):
        gains = [after - before for after, before in zip(values, report.before, strict=True)]
        spread = f" ± {statistics.stdev(gains):.3f} (deviation over seeds)" if seeds > 1 else ""
        say(f"gain by {neco_steps} steps of {name}: {statistics.mean(gains):+.3f}{spread}")
    say(f"done in {time.perf_counter() - start:.0f} s")
    return report


def _segmenter(encoder: Encoder, size: int | None = None) -> InContextSegmenter:
    return InContextSegmenter(encoder, len(scenes.CLASSES), memory_size=size, batch_size=50)


def _by_size(
    encoder: Encoder,
    memory: scenes.Scenes,
    test: scenes.Scenes,
    pictures: Path | None,
    say: Callable[[str], object],
) -> dict[int, float]:
    """mIoU with a part of the memory, and with all of it, which also draws."""
    found = {}
    for size in (*SIZES, None):
        segmenter = _segmenter(encoder, size).fit(memory.pairs())
        picture = pictures / PICTURES[0] if pictures is not None and size is None else None
        result = segmenter.evaluate(test.pairs(), picture, shown=12)
        found[len(segmenter.memory)] = result.miou
        say(f"{len(segmenter.memory):6} patches in the memory: mIoU {result.miou:.3f}")
    if pictures is not None:
        _draw_neighbors(segmenter, memory, test, pictures / PICTURES[1])
    return found


def _draw_neighbors(
    segmenter: InContextSegmenter, memory: scenes.Scenes, test: scenes.Scenes, picture: Path
) -> None:
    """What was retrieved for patches of the busiest test scene."""
    number = int(test.tags().sum(dim=1).argmax())
    covered = F.avg_pool2d((test.masks[number] > 0).float()[None], PATCH)[0]
    best = covered.flatten().argsort(descending=True, stable=True)[::9][:4]
    patches = [divmod(int(patch), covered.shape[1]) for patch in best]
    segmenter.draw_neighbors(picture, test.images[number], patches, memory.pairs())
