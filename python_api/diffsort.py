"""``diffsort.DiffSortNet`` on the fused op: change the import, keep the code."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor, nn

from fmkernels import _checks, soft_sort
from fmkernels.ops.soft_sort import check_settings, check_sorts
from fmkernels.ops.soft_sort.networks import NETWORKS
from fmkernels.ops.soft_sort.reference import DISTRIBUTIONS


class DiffSortNet(nn.Module):
    """A differentiable sorting network with the interface of ``diffsort.DiffSortNet``.

    The same constructor, results and (empty) ``state_dict``. Two documented differences: it refuses
    the sizes at which diffsort's bitonic wiring does not sort (22, 38, 42, …) and an ``art_lambda``
    above 1. The module has no tensors, so it works on whatever device its input is on.

    Args:
        sorting_network_type: ``"bitonic"`` or ``"odd_even"``; also ``"reflected_bitonic"`` and
            ``"odd_even_merge"``, which diffsort does not have.
        size: n, the length of the rows.
        device: accepted for compatibility; the input's device decides.
        steepness: s ≥ 0, per unit of score.
        art_lambda: exponent of ``"logistic_phi"``.
        interpolation_type: diffsort's older name of ``distribution``.
        distribution: see :func:`fmkernels.soft_sort`.

    Raises:
        ValueError: an argument that does not fit, at construction.

    Example:
        >>> import torch
        >>> from fmkernels.api import DiffSortNet
        >>> sorter = DiffSortNet("odd_even", 3, steepness=50)
        >>> values, permutation = sorter(torch.tensor([[3.0, 1.0, 2.0]]))
        >>> permutation.shape
        torch.Size([1, 3, 3])
    """

    def __init__(
        self,
        sorting_network_type: str,
        size: SupportsIndex,
        device: torch.device | str = "cpu",
        steepness: float = 10.0,
        art_lambda: float = 0.25,
        interpolation_type: str | None = None,
        distribution: str = "cauchy",
    ) -> None:
        super().__init__()
        if interpolation_type is not None:
            _checks.choice("DiffSortNet", "interpolation_type", interpolation_type, DISTRIBUTIONS)
            if distribution not in (None, "cauchy", interpolation_type):
                raise ValueError(
                    f"DiffSortNet: interpolation_type: expected the same as distribution, "
                    f"{distribution!r} (it is an older name of it), got {interpolation_type!r}"
                )
            distribution = interpolation_type
        self.sorting_network_type = sorting_network_type
        self.size = _checks.positive_integer("DiffSortNet", "size", size)
        self.steepness = steepness
        self.art_lambda = art_lambda
        self.distribution = distribution
        op = "DiffSortNet"  # refuse bad settings here and now
        _checks.choice(op, "sorting_network_type", sorting_network_type, NETWORKS)
        check_settings(op, steepness, sorting_network_type, distribution, art_lambda)
        check_sorts(op, sorting_network_type, self.size)

    def _sort(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return soft_sort(
            vectors,
            steepness=self.steepness,
            network=self.sorting_network_type,
            distribution=self.distribution,
            art_lambda=self.art_lambda,
        )

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, size) -> sorted values (batch, size), permutation (batch, size, size).

        ``permutation[b, i, j]`` is the weight of input i in slot j, as in diffsort.
        """
        _checks.floating_tensor("DiffSortNet", "vectors", vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ValueError(
                f"DiffSortNet: vectors: expected shape (batch, {self.size}), "
                f"got {tuple(vectors.shape)}"
            )
        return self._sort(vectors)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows between the parentheses."""
        return (
            f"{self.sorting_network_type!r}, {self.size}, steepness={self.steepness}, "
            f"distribution={self.distribution!r}"
        )
