"""Small frozen models with random weights, of which FUNGI features are taken in tests."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer as timm names its parts; images (N, 3, 16, 16) -> (N, dim).

    ``pool``: "cls", "mean", or None for all tokens (N, 17, dim).
    """

    def __init__(self, dim=24, depth=2, heads=2, size=16, patch=4, pool="cls"):
        super().__init__()
        self.pool = pool
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images):
        patches = self.embed(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool is None:
            return x
        return x[:, 0] if self.pool == "cls" else x.mean(dim=1)


LAST = "blocks.1.attn.proj"
"""The target layer of a SmallViT of depth 2."""


def small_vit(dtype=torch.float32, **settings):
    """The same weights each time."""
    torch.manual_seed(7)
    return SmallViT(**settings).to(dtype)
