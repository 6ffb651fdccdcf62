"""The default projection: every entry of the gradient goes to one of K buckets, with a sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fmkernels.ops.project_gradients import philox
from fmkernels.ops.project_gradients.projection import Projection, Settings


@dataclass(frozen=True, eq=False)
class CountSketch(Projection):
    """A count sketch that is hashed by blocks: dense quality at a small part of the work.

    The entries of the weight's gradient, row by row, and after them those of the bias's are cut
    into blocks of K. A block is rotated by its own random shift, multiplied by random signs, and
    added to the result:

        p[k] = Σ_c s(c, k) · block_c[(k − shift_c) mod K]

    So inner products of gradients are kept on average, with a variance of at most 2/K, as those of
    a dense matrix, for two operations per entry of the gradient instead of 2 K.

    Args:
        out_features: of the linear layer.
        in_features: of the linear layer.
        dim: K, the length of the result; any integer >= 1.
        bias: whether the layer has a bias, whose gradient is projected, too.
        seed: of the random matrix, from 0 to 2**63 − 1.
        layer: the number of the layer, from 0 to 2**24 − 1: different layers have independent
            matrices under one seed.
        repeats: so many independent sketches are added and divided by the root of their number,
            for lighter tails at as many times the work.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source:
        Charikar, Chen, Farach-Colton, *Finding Frequent Items in Data Streams*, ICALP 2002.

    Example:
        >>> import fmkernels
        >>> sketch = fmkernels.CountSketch(3, 2, dim=4, bias=False)
        >>> sketch
        CountSketch(out_features=3, in_features=2, dim=4, bias=False, seed=42, layer=0, repeats=1)
        >>> sketch.materialize().abs().sum(dim=0)  # one bucket for every entry
        tensor([1., 1., 1., 1., 1., 1.])
    """

    kind: ClassVar[str] = "count_sketch"

    dim: int
    bias: bool = True
    seed: int = 42
    layer: int = 0
    repeats: int = 1

    def __post_init__(self) -> None:
        self._check(
            out_features=self.out_features,
            in_features=self.in_features,
            dim=self.dim,
            repeats=self.repeats,
        )
        self._check_random(self.bias, self.seed, self.layer)

    def settings(self) -> Settings:
        """The arguments of the registered op."""
        return Settings(
            None,
            self.kind,
            self.dim,
            self.bias,
            1 / math.sqrt(self.repeats),
            self.seed,
            self.layer,
            self.repeats,
        )

    def materialize(self) -> Tensor:
        """The dense matrix (dim, out_features · columns), float32."""
        weights = self.out_features * self.in_features
        entries = torch.arange(weights + self.bias * self.out_features)
        row, column = entries // self.in_features, entries % self.in_features
        is_bias = entries >= weights
        row = torch.where(is_bias, entries - weights, row)
        column = torch.where(is_bias, self.in_features, column)
        block, place = entries // self.dim, entries % self.dim
        shape = (self.dim, self.out_features * self.columns)
        matrix = torch.zeros(shape, dtype=torch.float32)
        blocks = torch.arange(int(block[-1]) + 1)
        for copy in range(self.repeats):
            shift = philox.shifts(self.seed, self.layer, blocks, copy, self.dim)
            signs = philox.sketch_signs(
                self.seed, self.layer, 0, len(blocks), copy, torch.arange(self.dim)
            )
            bucket = (place + shift[block]) % self.dim
            position = (bucket, row * self.columns + column)
            matrix.index_put_(position, signs[block, bucket], accumulate=True)
        return matrix / math.sqrt(self.repeats)
