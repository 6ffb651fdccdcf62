"""A small vision transformer that learns scikit-learn's digits without their labels.

It has a class token and plain linear layers, named as in timm: what FUNGI takes the gradient of,
``attn.proj``, is there to be seen. The first half of the digits is to learn from, the second, by
other writers, to test.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, PATCHES = 16, 16
"""Pixels along each side of an enlarged digit; patches of it that the network sees."""
DIM, HEADS, DEPTH = 64, 2, 2
TARGET_LAYER = f"blocks.{DEPTH - 1}.attn.proj"
BATCH = 128
LEARNING_RATE = 4e-3
TEMPERATURE = 0.2


class Digits(NamedTuple):
    """Both halves: images (N, 1, SIZE, SIZE) from 0 to 1, and labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def halves(seed: int) -> Digits:
    """The two halves; the seed orders the first, and so chooses the five of a class in few-shot."""
    from sklearn.datasets import load_digits

    drawings, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    drawings = drawings.float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(drawings, (SIZE, SIZE), mode="bicubic").clamp_(0, 1)
    half = len(images) // 2
    order = torch.randperm(half, generator=torch.Generator().manual_seed(seed))
    return Digits(images[:half][order], labels[:half][order], images[half:], labels[half:])


class Attention(nn.Module):
    """Self-attention whose output projection is a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, DIM) -> (B, T, DIM)"""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, HEADS, T, DIM / HEADS)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Attention and two layers, each after a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, DIM) -> (B, T, DIM)"""
        tokens = tokens + self.attn(self.norm1(tokens))
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class VisionTransformer(nn.Module):
    """Images (B, 1, SIZE, SIZE) -> embeddings (B, DIM): the class token, after the last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.GELU(),
            nn.Conv2d(32, DIM, 3, 2, 1), nn.BatchNorm2d(DIM), nn.GELU(),
            nn.Conv2d(DIM, DIM, 1),
        )  # fmt: skip
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + PATCHES, DIM))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, SIZE, SIZE) -> (B, DIM)"""
        patches = self.patch_embed(2 * images - 1).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        embeddings: Tensor = self.norm(self.blocks(tokens + self.pos_embed)[:, 0])
        return embeddings


def start(seed: int) -> tuple[VisionTransformer, Digits]:
    """An untrained network and the digits; also seeds what the training draws."""
    torch.manual_seed(seed)
    return VisionTransformer().eval(), halves(seed)


def random_view(images: Tensor) -> Tensor:
    """Every image turned, zoomed, squeezed and moved a little, with noise."""
    batch = len(images)
    angle, zoom = 0.2 * torch.randn(batch), 0.7 + 0.4 * torch.rand(batch)
    squeeze = 1 + 0.1 * torch.randn(batch)
    first = torch.stack([zoom * squeeze * angle.cos(), -zoom * angle.sin()], dim=1)
    second = torch.stack([zoom * angle.sin(), zoom / squeeze * angle.cos()], dim=1)
    shift = 0.6 * (2 * torch.rand(batch, 2) - 1) * (1.1 - zoom).unsqueeze(1)
    affine = torch.stack([first, second, shift], dim=2)  # (B, 2, 3)
    places = F.affine_grid(affine, list(images.shape), align_corners=False)
    views = F.grid_sample(images, places, "bilinear", "border", False)
    return views + 0.05 * torch.randn_like(views)


def pretrain(model: VisionTransformer, images: Tensor, steps: int) -> list[float]:
    """Bring two views of a digit together and all others apart (SimCLR); returns the losses."""
    head = nn.Sequential(nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, 64))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps + 1, pct_start=0.1
    )
    partner = torch.arange(2 * BATCH).roll(BATCH)
    itself = torch.eye(2 * BATCH, dtype=torch.bool)
    losses = []
    model.train()
    for _ in range(steps):
        chosen = images[torch.randint(len(images), (BATCH,))]
        latents = F.normalize(head(model(random_view(torch.cat([chosen, chosen])))), dim=1)
        scores = (latents @ latents.mT / TEMPERATURE).masked_fill(itself, -torch.inf)
        loss = F.cross_entropy(scores, partner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses
