"""The paper's projection: a dense matrix of random signs, drawn or given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.project_gradients import philox
from fmkernels.ops.project_gradients.projection import Projection, Settings

PACKED = 2**22
"""Entries of a given matrix that are looked at, or made, at a time."""
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
"""Of a given matrix."""
OUTPUTS = 16
"""Whose words lie side by side: (tiles of outputs, words of a row, outputs)."""


@dataclass(frozen=True, eq=False)
class Rademacher(Projection):
    """A dense matrix of independent signs, p = R vec(G) / √K.

    The entries are drawn as they are needed and never stored: :class:`~fmkernels.CountSketch` has
    the same variance for a K-th of the work, and is the choice wherever the paper's own matrix is
    not asked for. That one is kept at 1 bit per entry by :meth:`from_matrix`.

    Args:
        out_features: of the linear layer.
        in_features: of the linear layer.
        dim: K, the length of the result; any integer >= 1.
        bias: whether the layer has a bias, whose gradient is projected, too.
        seed: of the random matrix, from 0 to 2**63 − 1.
        layer: the number of the layer, from 0 to 2**24 − 1: different layers have independent
            matrices under one seed.
        signs: packed bits of a given matrix; use :meth:`from_matrix`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source:
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024; Achlioptas, *Database-friendly random
        projections*, JCSS 2003.

    Example:
        >>> import fmkernels
        >>> matrix = fmkernels.Rademacher(3, 2, dim=4).materialize()
        >>> matrix.shape, matrix.abs().unique()
        (torch.Size([4, 9]), tensor([0.5000]))
    """

    kind: ClassVar[str] = "rademacher"

    dim: int
    bias: bool = True
    seed: int = 42
    layer: int = 0
    signs: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check(out_features=self.out_features, in_features=self.in_features, dim=self.dim)
        self._check_random(self.bias, self.seed, self.layer)
        if self.signs is None:
            return
        if not isinstance(self.signs, Tensor):
            raise _checks.no_tensor("Rademacher", "signs", self.signs)
        row = row_words(self.out_features, self.in_features, self.bias)
        expected = (-(-self.dim // OUTPUTS), row, OUTPUTS)
        if self.signs.dtype != torch.int32 or _checks.shape(self.signs) != expected:
            raise ValueError(
                f"Rademacher: signs: expected int32 of shape {expected}, "
                f"got {self.signs.dtype} of shape {_checks.shape(self.signs)}; "
                "make it with Rademacher.from_matrix"
            )
        object.__setattr__(self, "signs", self.signs.contiguous())

    @classmethod
    def from_matrix(
        cls, matrix: Tensor, out_features: int, in_features: int, bias: bool = True
    ) -> Rademacher:
        """A given matrix of ±1, kept at 1 bit per entry and applied as it is, without a scale.

        Args:
            matrix: (K, out_features · (in_features + bias)), of integers or of floats of at least
                16 bits: what vec(G) is multiplied with, where G (out_features, in_features + bias)
                has the gradient of the bias as its last column. It is not kept.
            out_features: of the linear layer.
            in_features: of the linear layer.
            bias: whether the layer has a bias.

        Returns:
            A projection with p = matrix @ vec(G). Rows are padded to whole words of 32 bits.

        Raises:
            ValueError: an entry is not 1 or −1 (a scaled matrix has to be divided by its scale),
                or the shape does not fit the layer.

        Example:
            >>> import torch, fmkernels
            >>> matrix = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
            >>> given = fmkernels.Rademacher.from_matrix(matrix, 2, 2, bias=False)
            >>> torch.equal(given.materialize(), matrix)
            True
        """
        op = "Rademacher.from_matrix"
        if not isinstance(matrix, Tensor):
            raise _checks.no_tensor(op, "matrix", matrix)
        if matrix.dtype not in DTYPES:
            raise TypeError(
                f"{op}: matrix: expected real numbers, integers or floats of at least 16 bits, got "
                f"{matrix.dtype}; convert it with matrix.float(), or truth values with "
                "2 * matrix.int() - 1"
            )
        if not isinstance(bias, bool):
            raise TypeError(f"{op}: bias: expected True or False, got {bias!r}")
        out_features = _checks.positive_integer(op, "out_features", out_features)
        in_features = _checks.positive_integer(op, "in_features", in_features)
        entries = out_features * (in_features + bias)
        if matrix.ndim != 2 or matrix.shape[1] != entries or not matrix.shape[0]:
            raise ValueError(
                f"{op}: matrix: expected shape (K, {entries}), one column for each of "
                f"{out_features} x {in_features + bias} entries of the gradient, "
                f"got {_checks.shape(matrix)}"
            )
        row = row_words(out_features, in_features, bias)
        tiles = -(-len(matrix) // OUTPUTS)
        packed = torch.zeros(tiles, row, OUTPUTS, dtype=torch.int32, device=matrix.device)
        step = max(1, PACKED // entries)
        for start in range(0, len(matrix), step):
            rows = matrix[start : start + step]
            _check_signs(op, rows)
            negative = (rows < 0).unflatten(1, (out_features, in_features + bias))
            outputs = torch.arange(start, start + len(rows), device=matrix.device)
            packed[outputs // OUTPUTS, :, outputs % OUTPUTS] = _packed(negative, in_features)
        return cls(out_features, in_features, len(matrix), bias, seed=0, signs=packed)

    def to(self, device: torch.device | str) -> Rademacher:
        """The same projection, with the bits of a given matrix on another device."""
        return self if self.signs is None else replace(self, signs=self.signs.to(device))

    def settings(self) -> Settings:
        """The arguments of the registered op."""
        scale = 1 / math.sqrt(self.dim) if self.signs is None else 1.0
        return Settings(self.signs, self.kind, self.dim, self.bias, scale, self.seed, self.layer)

    def materialize(self) -> Tensor:
        """The dense matrix (dim, out_features · columns), float32."""
        outputs = torch.arange(self.dim, device=self.device)
        weight, bias = dense_signs(
            self.signs, outputs, 0, self.out_features, self.out_features, self.in_features,
            self.seed, self.layer,
        )  # fmt: skip
        matrix = torch.cat([weight, bias.unsqueeze(-1)], dim=-1) if self.bias else weight
        return matrix.flatten(1) * self.settings().scale


def row_words(out_features: int, in_features: int, bias: bool) -> int:
    """Words of 32 bits for one row of the matrix: the weight's rows, then the bias's entries."""
    return out_features * -(-in_features // 32) + bias * -(-out_features // 32)


def dense_signs(
    packed: Tensor | None,
    outputs: Tensor,
    first: int,
    last: int,
    out_features: int,
    in_features: int,
    seed: int,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """Signs (k, rows, in_features) of the weight's rows first … last, and (k, rows) of the bias."""
    rows = torch.arange(first, last, device=outputs.device)
    if packed is None:
        of_bias = torch.full_like(outputs, out_features)
        weight = philox.signs(seed, layer, philox.DENSE, rows, outputs.unsqueeze(-1), in_features)
        bias = philox.signs(seed, layer, philox.DENSE, of_bias, outputs, last)
        return weight, bias[:, first:]
    per_row = -(-in_features // 32)
    chosen = packed[outputs // OUTPUTS, :, outputs % OUTPUTS]
    words = chosen[:, first * per_row : last * per_row].unflatten(1, (last - first, per_row))
    bias_words = chosen[:, out_features * per_row :]
    bias = philox.bits_to_signs(bias_words.long(), last)[:, first:]
    return philox.bits_to_signs(words.long(), in_features), bias


def _check_signs(op: str, rows: Tensor) -> None:
    size = rows.abs()
    if (size == 1).all():
        return
    found = size.flatten()[0].item()
    if found > 0 and (size == found).all():
        raise ValueError(
            f"{op}: matrix: expected entries 1 and -1, got {found:g} and {-found:g}; divide the "
            f"matrix by {found:g} and multiply the result by it"
        )
    wrong = rows[size != 1][0].item()
    raise ValueError(f"{op}: matrix: expected entries 1 and -1, got {wrong:g}")


def _packed(negative: Tensor, in_features: int) -> Tensor:
    """(k, out, in + bias) truth values -> (k, words), int32; each row is padded to whole words."""
    weight, bias = negative[..., :in_features], negative[..., in_features:]
    return torch.cat([_words(weight).flatten(1), _words(bias.mT).flatten(1)], dim=1)


def _words(bits: Tensor) -> Tensor:
    padding = -bits.shape[-1] % 32
    padded = torch.nn.functional.pad(bits, (0, padding)).unflatten(-1, (-1, 32))
    places = torch.arange(32, device=bits.device)
    # of which the largest is 2³² − 1: to int32 it is the word's bits
    words: Tensor = (padded.long() << places).sum(dim=-1)
    return words.to(torch.int32)
