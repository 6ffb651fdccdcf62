"""A projection of the rows and of the columns of the gradient, each by a short matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.project_gradients import philox
from fmkernels.ops.project_gradients.khatri_rao import factor
from fmkernels.ops.project_gradients.projection import Projection, Settings


@dataclass(frozen=True, eq=False)
class Kronecker(Projection):
    """A left matrix of signs for the outputs and a right one for the inputs, p = L G Rᵀ / √K.

        p[u k₂ + v] = Σ_s (l_u · δ_s) (r_v · [a_s; 1]) / √K,    K = k₁ k₂

    The cheapest and the poorest: for a gradient of rank 1 its K numbers are worth about
    1/(1/k₁ + 1/k₂) of a dense matrix's. It is here to compare with what others have computed.

    Args:
        out_features: of the linear layer.
        in_features: of the linear layer.
        dim: K, the length of the result; any integer >= 1.
        dims: (k₁, k₂), whose product is ``dim``; the two most nearly equal ones if None.
        bias: whether the layer has a bias, whose gradient is projected, too.
        seed: of the random matrix, from 0 to 2**63 − 1.
        layer: the number of the layer, from 0 to 2**24 − 1: different layers have independent
            matrices under one seed.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source:
        Choe et al., *What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence
        Functions*, 2024.

    Example:
        >>> import fmkernels
        >>> fmkernels.Kronecker(768, 768, dim=768).dims
        (24, 32)
    """

    kind: ClassVar[str] = "kronecker"

    dim: int
    dims: tuple[int, int] | None = None
    bias: bool = True
    seed: int = 42
    layer: int = 0

    def __post_init__(self) -> None:
        self._check(out_features=self.out_features, in_features=self.in_features, dim=self.dim)
        self._check_random(self.bias, self.seed, self.layer)
        object.__setattr__(self, "dims", self._checked_dims())

    def _checked_dims(self) -> tuple[int, int]:
        if self.dims is None:
            left = next(n for n in range(math.isqrt(self.dim), 0, -1) if self.dim % n == 0)
            return left, self.dim // left
        if not isinstance(self.dims, (tuple, list)) or len(self.dims) != 2:
            raise ValueError(
                f"Kronecker: dims: expected two integers whose product is {self.dim}, "
                f"got {self.dims!r}"
            )
        left, right = (_checks.positive_integer("Kronecker", "dims", n) for n in self.dims)
        if left * right != self.dim:
            raise ValueError(
                f"Kronecker: dims: expected two integers whose product is dim, {self.dim}, "
                f"got {left} * {right} = {left * right}"
            )
        return left, right

    def settings(self) -> Settings:
        """The arguments of the registered op."""
        left, _ = self._checked_dims()
        scale = 1 / math.sqrt(self.dim)
        return Settings(
            None, self.kind, self.dim, self.bias, scale, self.seed, self.layer, left=left
        )

    def materialize(self) -> Tensor:
        """The dense matrix (dim, out_features · columns), float32."""
        k1, k2 = (torch.arange(n) for n in self._checked_dims())
        left = factor(self.seed, self.layer, philox.LEFT, k1, self.out_features)
        right = factor(self.seed, self.layer, philox.RIGHT, k2, self.columns)
        return torch.kron(left, right) / math.sqrt(self.dim)
