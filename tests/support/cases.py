"""What the seven kinds of test run on: one Case per op and configuration. A new op adds its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fmkernels
from fmkernels.ops.soft_sort import DISTRIBUTIONS, NETWORKS
from fmkernels.testing import assert_parity


@dataclass(frozen=True)
class Case:
    """A function of tensors, and how to make its inputs.

    ``make(rows, n)`` gives float64 tensors; those that require a gradient are differentiated.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[int, int], tuple[Tensor, ...]]

    def inputs(
        self,
        rows: int,
        n: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, ...]:
        def cast(x: Tensor) -> Tensor:
            if not x.dtype.is_floating_point:
                return x.to(device)
            return x.detach().to(device, dtype).requires_grad_(x.requires_grad)

        return tuple(cast(x) for x in self.make(rows, n))


def scores(rows: int, n: int, requires_grad: bool = True) -> Tensor:
    """Similarities as NeCo has them: a spread of 0.15."""
    return (0.15 * torch.randn(rows, n, dtype=torch.float64)).requires_grad_(requires_grad)


def features(rows: int, n: int, references: bool = False) -> Tensor:
    count = n if references else max(1, rows // 2)
    return torch.randn(2, count, 16, dtype=torch.float64).requires_grad_()


def _sort(**settings: Any) -> Case:
    name = "soft_sort-" + "-".join(str(value) for value in settings.values())
    return Case(name, partial(fmkernels.soft_sort, **settings), lambda rows, n: (scores(rows, n),))


def _cross_entropy(masked: bool = False, **settings: Any) -> Case:
    name = "cross_entropy-" + "-".join(str(value) for value in settings.values())

    def run(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return fmkernels.soft_sort_cross_entropy(student, teacher, mask=mask, **settings)

    def make(rows: int, n: int) -> tuple[Tensor, ...]:
        pair = (scores(rows, n), scores(rows, n, requires_grad=False))
        return (*pair, torch.arange(rows) % 3 > 0) if masked else pair

    return Case(name + ("-masked" if masked else ""), run, make)


def _neighbors(**settings: Any) -> Case:
    def run(student: Tensor, teacher: Tensor, references: Tensor) -> Tensor:
        return fmkernels.patch_neighbor_loss(student, teacher.detach(), references, **settings)

    def make(rows: int, n: int) -> tuple[Tensor, ...]:
        teacher = features(rows, n).detach()
        return features(rows, n), teacher, features(rows, n, references=True)

    return Case("neighbors-" + "-".join(str(v) for v in settings.values()), run, make)


CASES = [
    *(_sort(network="bitonic", distribution=d) for d in DISTRIBUTIONS),
    *(_sort(network=n, distribution="cauchy", steepness=30.0) for n in NETWORKS[1:]),
    *(_cross_entropy(network="bitonic", distribution=d) for d in DISTRIBUTIONS),
    *(_cross_entropy(network=n, distribution="logistic", steepness=30.0) for n in NETWORKS[1:]),
    _cross_entropy(reduction="none", teacher_steepness=50.0),
    _cross_entropy(reduction="sum", masked=True),
    _cross_entropy(reduction="mean", masked=True),
    _neighbors(metric="cosine", steepness=20.0),
    _neighbors(metric="euclidean", steepness=2.0, reduction="none"),
]

FEW = [
    case for case in CASES if "cauchy" in case.name or "mean" in case.name or "none" in case.name
]
"""Enough for the kinds of test that do not depend on the configuration."""


def tuple_of(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def values_and_gradients(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs, and the gradient of a fixed random combination of them."""
    outputs = tuple_of(case.function(*inputs))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in outputs]
    leaves = [x for x in inputs if x.requires_grad]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]


def with_reference(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with fmkernels.backend("reference"):
        return values_and_gradients(case, inputs)


def in_float64(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.dtype.is_floating_point else x
        for x in inputs
    )


def check_parity(case: Case, inputs: tuple[Tensor, ...], where: str) -> None:
    """Fail unless outputs and gradients err at most twice as much as the reference's."""
    actual = values_and_gradients(case, inputs)
    same_dtype = with_reference(case, inputs)
    exact = with_reference(case, in_float64(inputs))
    for index, compared in enumerate(zip(actual, same_dtype, exact, strict=True)):
        assert_parity(*compared, name=f"result {index} at {where}")
