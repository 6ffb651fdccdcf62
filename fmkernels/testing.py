"""Tools for testing kernels: the parity rule, awkward memory layouts, poisoned allocation.

Usable by any project that writes PyTorch ops; needs nothing but PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fmkernels import _library

__all__ = [
    "assert_parity",
    "check_gradient_layouts",
    "layouts",
    "poisoned_allocation",
    "spacing",
]


def spacing(values: Tensor) -> float:
    """The rounding error that a value as large as the largest of ``values`` may carry.

    Estimated as flash-attention's tests do: twice max\\|x + 0.3 − 0.3 − x\\|, in the dtype of
    ``values``; never less than one unit in the last place of the largest.

    Example:
        >>> spacing(torch.tensor([1.0, 2.0])) < 1e-6
        True
    """
    finite = values[values.isfinite()]
    if finite.numel() == 0:
        return 0.0
    estimate = 2 * (finite + 0.3 - 0.3 - finite).abs().max().item()
    return max(estimate, finite.abs().max().item() * torch.finfo(values.dtype).eps)


def assert_parity(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0, name: str = "output"
) -> None:
    """Fail unless ``actual`` errs at most ``factor`` times as much as PyTorch in the same dtype.

        max|actual − exact| ≤ factor · max|same_dtype − exact| + spacing

    Args:
        actual: what the kernel computed, any shape.
        same_dtype: the same by plain PyTorch in the dtype of ``actual``.
        exact: the same in float64, from the same inputs.
        factor: 2 is the rule of this project.
        name: for the message.

    Raises:
        AssertionError: with both errors; also if NaN or infinities are elsewhere than in ``exact``.

    Example:
        >>> x = torch.linspace(0, 1, 9)
        >>> assert_parity(x.exp(), x.exp(), x.double().exp())
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {exact.shape}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, not {same_dtype.dtype}"
    rounded = exact.to(actual.dtype)
    for kind, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        wrong = int((test(actual) != test(rounded)).sum())
        assert wrong == 0, f"{name}: {wrong} elements are {kind} in only one of the two"
    finite = rounded.isfinite()
    if not finite.any():
        return
    reference = exact[finite].double()
    error = (actual[finite].double() - reference).abs().max().item()
    allowed = (same_dtype[finite].double() - reference).abs().nan_to_num(0, 0, 0).max().item()
    floor = spacing(rounded)
    assert error <= factor * allowed + floor, (
        f"{name}: error {error:.3e} against float64; PyTorch in {actual.dtype} errs {allowed:.3e}, "
        f"so at most {factor:g} times that plus the spacing {floor:.3e} is allowed"
    )


def layouts(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors equal to ``values`` whose memory is laid out in every way that autograd produces.

    Yields:
        ``(name, tensor)``: contiguous; sliced out of a ``cat``; transposed; every other element of
        a larger tensor; with an offset; and, where ``values`` is constant along a dimension,
        expanded (stride 0) along it.

    Example:
        >>> [name for name, _ in layouts(torch.ones(2, 3))]
        ['contiguous', 'sliced', 'transposed', 'strided', 'offset', 'expanded']
    """
    values = values.detach()
    yield "contiguous", values.contiguous().clone()
    if values.ndim:
        yield (
            "sliced",
            torch.cat([values, values, values], dim=-1).narrow(
                -1, values.shape[-1], values.shape[-1]
            ),
        )
        if values.ndim > 1:
            yield "transposed", values.mT.contiguous().mT
        yield "strided", torch.stack([values, torch.full_like(values, torch.nan)], dim=-1)[..., 0]
    yield (
        "offset",
        torch.cat([values.new_full((3,), torch.nan), values.flatten()])[3:].view(values.shape),
    )
    for dim in range(values.ndim):
        first = values.narrow(dim, 0, min(1, values.shape[dim]))
        if values.numel() and torch.equal(first.expand_as(values), values):
            yield "expanded", first.expand_as(values)
            return


def check_gradient_layouts(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> None:
    """Fail unless ``function`` and its gradients are the same for every memory layout.

    Every floating input is laid out in every way (the others contiguous), and so is the gradient
    that arrives at every output; results must be bitwise equal to the contiguous case.

    Args:
        function: tensors to a tensor or a tuple of tensors.
        inputs: at least one that requires a gradient.

    Raises:
        AssertionError: naming the input or output and the layout.

    Example:
        >>> check_gradient_layouts(torch.sin, torch.ones(2, 3, requires_grad=True))
    """

    def run(inputs: tuple[Tensor, ...], grads: list[Tensor]) -> list[Tensor]:
        leaves = [x for x in inputs if x.requires_grad]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    for constant in (False, True):  # constant gradients can be expanded ones
        grads = [
            torch.ones_like(x)
            if constant
            else torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
            for x in outputs
        ]
        expected = run(inputs, grads)

        def compare(actual: list[Tensor], what: str, expected: list[Tensor] = expected) -> None:
            for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert torch.equal(a, b), f"{what}: result {index} differs from the contiguous case"

        for position, value in enumerate(inputs):
            if not value.dtype.is_floating_point:
                continue
            for name, laid_out in layouts(value):
                changed = list(inputs)
                changed[position] = laid_out.requires_grad_(value.requires_grad)
                compare(run(tuple(changed), grads), f"input {position}, {name}")
        for position, value in enumerate(grads):
            for name, laid_out in layouts(value):
                changed = list(grads)
                changed[position] = laid_out
                compare(run(inputs, changed), f"gradient of output {position}, {name}")


@contextlib.contextmanager
def poisoned_allocation() -> Iterator[None]:
    """Inside the block, fresh floating-point memory holds NaN instead of whatever was there.

    An element that a kernel reads before it is written, or never writes, becomes a NaN in the
    result. It covers what PyTorch allocates (``torch.empty`` and what is built on it) and what
    fmkernels' own CPU kernels allocate, their working memory included.

    Example:
        >>> with poisoned_allocation():
        ...     torch.empty(2).isnan().all().item()
        True
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    native = _library.native
    before = native.poison_allocations(True) if native is not None else False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if native is not None:
            native.poison_allocations(before)
