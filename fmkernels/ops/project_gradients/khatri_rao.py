"""A projection that multiplies two short ones, entry by entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fmkernels.ops.project_gradients import philox
from fmkernels.ops.project_gradients.projection import Projection, Settings


@dataclass(frozen=True, eq=False)
class KhatriRao(Projection):
    """Row k of the matrix is the outer product of two rows of signs, r_k and s_k.

        p[k] = Σ_s (r_k · δ_s) (s_k · [a_s; 1]) / √K

    For matrix units: two products with small matrices, K (out + in) operations per row. Its
    variance is (2 + 6/r)/K at effective rank r, so 8/K for a gradient of rank 1 and near that of a
    dense matrix for the sum of many rows.

    Args:
        out_features: of the linear layer.
        in_features: of the linear layer.
        dim: K, the length of the result; any integer >= 1.
        bias: whether the layer has a bias, whose gradient is projected, too.
        seed: of the random matrix, from 0 to 2**63 − 1.
        layer: the number of the layer, from 0 to 2**24 − 1: different layers have independent
            matrices under one seed.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source:
        Sun, Guo, Tropp, Udell, *Tensor Random Projection for Low Memory Dimension Reduction*, 2018.

    Example:
        >>> import torch, fmkernels
        >>> matrix = fmkernels.KhatriRao(3, 2, dim=4, bias=False).materialize()
        >>> [int(torch.linalg.matrix_rank(row.view(3, 2))) for row in matrix]
        [1, 1, 1, 1]
    """

    kind: ClassVar[str] = "khatri_rao"

    dim: int
    bias: bool = True
    seed: int = 42
    layer: int = 0

    def __post_init__(self) -> None:
        self._check(out_features=self.out_features, in_features=self.in_features, dim=self.dim)
        self._check_random(self.bias, self.seed, self.layer)

    def settings(self) -> Settings:
        """The arguments of the registered op."""
        scale = 1 / math.sqrt(self.dim)
        return Settings(None, self.kind, self.dim, self.bias, scale, self.seed, self.layer)

    def materialize(self) -> Tensor:
        """The dense matrix (dim, out_features · columns), float32."""
        k = torch.arange(self.dim)
        left = factor(self.seed, self.layer, philox.LEFT, k, self.out_features)
        right = factor(self.seed, self.layer, philox.RIGHT, k, self.columns)
        return torch.einsum("ki,kj->kij", left, right).flatten(1) / math.sqrt(self.dim)


def factor(seed: int, layer: int, stream: int, outputs: Tensor, count: int) -> Tensor:
    """(k, count) signs: some rows of the left or the right factor."""
    return philox.signs(seed, layer, stream, torch.zeros_like(outputs), outputs, count)
