"""The layer under an adapter: any callable that is linear; what is known of it, and asked of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fmkernels._autocast import without_autocast

KNOWN = ("torch", "bitsandbytes", "torchao")
"""Packages whose layers with inputs and outputs are linear, though some round what comes in."""
TRIED = 16
"""Rows of random numbers that another layer must give the sums of, to be taken for linear."""
NONLINEAR = 0.25
"""Of ‖f(x + y) − f(0)‖, the most by which ‖f(x) + f(y) − f(x + y) − f(0)‖ may differ from 0: with
1024 inputs 0.01 where they are rounded to 8 bits and 0.20 where to 4; 0.42 with a ReLU after them,
0.40 with a GELU, 0.36 with a SiLU."""
META = torch.device("meta")
PROBES = 1024
"""Rows of the identity matrix that a base layer without a readable weight is asked for at once."""


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out); transformers need not be installed."""
    return any(base.__name__ == "Conv1D" and hasattr(module, "nf") for base in type(module).__mro__)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any kind, quantised ones too; None for another."""
    if is_conv1d(module):
        inputs, outputs = _weight(module).shape
        return inputs, outputs
    if isinstance(module, (nn.Bilinear, nn.Embedding, nn.EmbeddingBag)):
        return None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in sizes):
        return sizes  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or hasattr(module, "num_embeddings"):
        return None
    outputs, inputs = weight.shape
    is_quantised = weight.element_size() == 1
    return (inputs, outputs) if is_quantised or _gives(module, weight) else None


def is_linear(module: nn.Module) -> bool:
    """Whether a module with sizes is linear, tried with numbers where its class does not say so.

    One that cannot be tried, since its weights are not there yet or it takes other inputs, is taken
    to be. What is known from its class is that torch's or a library's own forward is called.
    """
    forward = getattr(type(module), "forward", None)
    package = str(getattr(forward, "__module__", None)).partition(".")[0]
    sizes, device = linear_sizes(module), base_device(module)
    if package in KNOWN or is_conv1d(module) or sizes is None or device == META:
        return sizes is not None
    generator = torch.Generator().manual_seed(0)
    x, y = 2 * torch.randn(2, TRIED, sizes[0], generator=generator).to(
        device, base_dtype(module) or torch.float32
    )
    try:
        given = [_called(module, each) for each in (x, y, x + y, torch.zeros_like(x))]
    except Exception:
        return True
    if any(not isinstance(z, Tensor) or z.shape != (TRIED, sizes[1]) for z in given):
        return False
    of_x, of_y, of_sum, of_zero = (z.float() for z in given)
    error = (of_x + of_y - of_sum - of_zero).norm()
    return not bool(error > NONLINEAR * (of_sum - of_zero).norm())


def _gives(module: nn.Module, weight: Tensor) -> bool:
    """Whether it gives n numbers for m, which not all with a weight (n, m) do, such as routers."""
    if type(module).__module__.startswith("torch.nn.") or not weight.is_floating_point():
        return False
    try:
        y = _called(module, weight.new_zeros(1, weight.shape[1]))
    except Exception:
        return False
    return isinstance(y, Tensor) and y.shape == (1, weight.shape[0])


def plain_weight(base: nn.Module) -> Tensor | None:
    """W0 (n, m) where Y = X W0ᵀ + bias is all that the layer does; otherwise it must be called.

    Hooks, a forward of its own (as offloading puts on), quantised and sharded weights are reasons.
    """
    # a third of the time that base.weight takes
    weight = base._parameters.get("weight")
    if weight is None:
        return None
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
    if hooks or base._backward_pre_hooks or "forward" in base.__dict__:
        return None
    if _has_any_global_hook():
        return None
    if type(weight) not in (Tensor, nn.Parameter) or not weight.dtype.is_floating_point:
        return None
    if type(base).forward is nn.Linear.forward:
        return weight
    return weight.mT if is_conv1d(base) and type(base).__name__ == "Conv1D" else None


def _weight(base: nn.Module) -> Tensor:
    return base.weight  # type: ignore[return-value]


def base_bias(base: nn.Module) -> Tensor | None:
    """(n), or None."""
    bias = base._parameters.get("bias")
    return getattr(base, "bias", None) if bias is None else bias


def base_dtype(base: nn.Module) -> torch.dtype | None:
    """The dtype of a weight that is held in a floating dtype."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.element_size() > 1:
        return weight.dtype
    return None


def base_device(base: nn.Module) -> torch.device:
    """Where the layer computes; accelerate keeps offloaded weights elsewhere until then."""
    tensors = [*base.parameters(), *base.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    hook = getattr(base, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if device == META and getattr(each, "execution_device", None) is not None:
            return torch.device(each.execution_device)
    return device


def dense_weight(base: nn.Module) -> Tensor:
    """W0 (n, m), without a gradient, of any linear layer.

    Of one without a readable weight, quantised ones among them, it is what the layer makes of an
    identity matrix.
    """
    weight = plain_weight(base)
    if weight is not None:
        return weight.detach()
    sizes = linear_sizes(base)
    assert sizes is not None
    offset = called_bias(base)
    columns = []
    for start in range(0, sizes[0], PROBES):
        probe = offset.new_zeros(min(PROBES, sizes[0] - start), sizes[0])
        probe[:, start : start + len(probe)].fill_diagonal_(1)
        columns.append(_called(base, probe) - offset)
    return torch.cat(columns).mT.contiguous()


def called_bias(base: nn.Module) -> Tensor:
    """(n): what a layer makes of zeros."""
    sizes = linear_sizes(base)
    assert sizes is not None
    dtype = base_dtype(base) or torch.float32
    zeros = torch.zeros(1, sizes[0], device=base_device(base), dtype=dtype)
    offset: Tensor = _called(base, zeros)[0]
    return offset


def _called(base: nn.Module, x: Tensor) -> Any:
    """What the layer makes of x, as it does in evaluation.

    That a gradient is wanted keeps bitsandbytes on a CPU from packing the weight, for good, in a
    form that cannot be trained over.
    """
    training = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(x):
            y = base(x.detach().clone().requires_grad_())
    finally:
        for module, was in training.items():
            module.training = was
    return y.detach() if isinstance(y, Tensor) else y


def wide_weight(base: nn.Module) -> Tensor:
    """W0 (n, m) in float32, or float64 if it is held in that."""
    weight = dense_weight(base)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
