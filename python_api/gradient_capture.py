"""The input of a linear layer and the gradient at its output, without touching the model.

The gradient of a loss with respect to the weight and bias of a linear layer is
G = Σ_s δ_s ⊗ [a_s; 1]: a is the layer's input and δ the gradient at its output. A forward hook cuts
the graph at that output, so that autograd's tape begins there and no parameter has to be frozen.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LOCK = threading.Lock()
_EVALUATING: weakref.WeakKeyDictionary[nn.Module, _Mode] = weakref.WeakKeyDictionary()


class _Mode:
    """How many threads need a model in evaluation mode, and what it was in before the first."""

    def __init__(self, model: nn.Module) -> None:
        self.users = 0
        self.before = [(module, module.training) for module in model.modules()]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while any thread is in here; afterwards as it was found."""
    with _LOCK:
        mode = _EVALUATING.get(model)
        if mode is None:
            mode = _EVALUATING[model] = _Mode(model)
        mode.users += 1
    try:
        if any(training for _, training in mode.before):
            model.eval()
        yield
    finally:
        with _LOCK:
            mode.users -= 1
            if not mode.users:
                del _EVALUATING[model]
                for module, training in mode.before:
                    module.training = training


def linear_layer(op: str, model: Any, target_layer: Any) -> nn.Linear:
    """The linear layer of a model under a dotted name, such as ``"blocks.11.attn.proj"``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model: expected a torch.nn.Module, got {type(model).__name__}")
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    if compiled:
        raise ValueError(
            f"{op}: model: expected one that is not compiled, because compiled models do not call "
            f"their layers one by one, got torch.compile of {compiled[0] or 'the model'!r}; pass "
            "the model as it was before"
        )
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        layer = model.get_submodule(target_layer)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{op}: target_layer: expected the name of a torch.nn.Linear of the model, such as "
            f"{names[-1] if names else None!r}, got {target_layer!r}; model.named_modules() lists "
            "them"
        ) from error
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{op}: target_layer: expected a torch.nn.Linear, got {type(layer).__name__} under "
            f"{target_layer!r}"
        )
    return layer


def _is_compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)``, or in place by ``module.compile()``."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class LayerRecord:
    """What the hook saw in one forward pass, and the gradients that start from it.

    Attributes:
        activation: (N, …, in), the layer's input.
        output: (N, …, out), the leaf that autograd's tape begins at.
    """

    def __init__(self, op: str, model: nn.Module, target_layer: str) -> None:
        self.op, self.target_layer = op, target_layer
        self.layer = linear_layer(op, model, target_layer)
        parent = target_layer.rpartition(".")[0]
        self._in_attention = isinstance(model.get_submodule(parent), nn.MultiheadAttention)
        self._thread = threading.get_ident()
        self._calls = 0
        self.activation = self.output = torch.empty(0)

    def hook(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        """Cut the graph at the layer's output, and begin one there.

        ``rest`` is (keyword arguments, output), but (output,) in another thread's pass during which
        this hook is removed.
        """
        if threading.get_ident() != self._thread:
            return None
        kwargs, output = rest
        self._calls += 1
        self.activation = (args[0] if args else kwargs["input"]).detach()
        self.output = output.detach().requires_grad_()
        torch.set_grad_enabled(True)  # until capture() ends
        return self.output.clone()  # a leaf could not be changed in place

    def gradient(self, result: Tensor, grad_result: Tensor, more: bool = False) -> Tensor:
        """δ: the gradient of (result · grad_result) at the layer's output.

        ``more`` keeps the graph for another call.
        """
        self._check_passed()
        found = None
        if result.requires_grad:
            (found,) = torch.autograd.grad(
                result, self.output, grad_result, retain_graph=more, allow_unused=True
            )
        if found is None:
            raise ValueError(
                f"{self.op}: target_layer: expected a layer that the model's result depends on, "
                f"got {self.target_layer!r}: its output does not reach the result, or the model "
                "leaves autograd off after it"
            )
        return found

    def _check_passed(self) -> None:
        expected = f"{self.op}: target_layer: expected a layer that is called once in each pass"
        if self._calls > 1:
            raise ValueError(
                f"{expected}, got {self.target_layer!r}, which was called {self._calls} times; its "
                "gradient would be a sum over calls"
            )
        if not self._calls and self._in_attention:
            raise ValueError(
                f"{expected}, got {self.target_layer!r}: torch.nn.MultiheadAttention uses its "
                "weight without calling it, so that its input cannot be seen; take a linear layer "
                "of the block's MLP, or a model with its own attention (timm, transformers)"
            )
        if not self._calls:
            raise ValueError(
                f"{expected}, got {self.target_layer!r}, which was not called; a fused path does "
                "not call its layers"
            )


@contextlib.contextmanager
def capture(op: str, model: nn.Module, target_layer: str) -> Iterator[LayerRecord]:
    """Record one linear layer during the forward pass in this block, in this thread.

    The model is in evaluation mode; autograd is off before the layer and on after it. On leaving,
    also by an exception, hooks, modes and autograd are as before. Parameters are not touched.

    Example:
        >>> import torch
        >>> layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> with capture("example", model, "2") as record:
        ...     result = model(torch.ones(5, 3))
        >>> delta = record.gradient(result, torch.ones(5, 2))
        >>> delta.shape, record.activation.shape
        (torch.Size([5, 2]), torch.Size([5, 4]))
    """
    record = LayerRecord(op, model, target_layer)
    with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
        with _LOCK:  # two threads could get one number for their hooks
            handle = record.layer.register_forward_hook(record.hook, with_kwargs=True)
        try:
            yield record
        finally:
            with _LOCK:
                handle.remove()


def factor_rows(
    op: str, record: LayerRecord, delta: Tensor, views: int, samples: int
) -> tuple[Tensor, Tensor]:
    """δ and a of all views, (N, …, out) and (N, …, in), as (samples, S, out), (samples, S, in).

    Positions at which δ is exactly zero in every view are left out: with an embedding that is read
    off the CLS token after the last block, all but that one.
    """
    activation = record.activation
    if len(delta) != views or len(activation) != views:
        raise ValueError(
            f"{op}: target_layer: expected a layer with the {views} views in the first dimension, "
            f"got an output of shape {tuple(delta.shape)} from {record.target_layer!r}"
        )
    delta = delta.reshape(views, -1, delta.shape[-1])  # (N, T, out)
    activation = activation.reshape(views, -1, activation.shape[-1])
    used = (delta != 0).any(dim=-1).any(dim=0)  # (T,)
    if not bool(used.all()):
        delta, activation = delta[:, used], activation[:, used]
    rows = delta.shape[1] * (views // samples)
    return (
        delta.reshape(samples, rows, delta.shape[-1]),
        activation.reshape(samples, rows, activation.shape[-1]),
    )
