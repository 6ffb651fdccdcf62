"""The input of a linear layer and the gradient at its output, without touching the model.

The gradient of a loss with respect to the weight and bias of a linear layer is
G = Σ_s δ_s ⊗ [a_s; 1]: a is the layer's input and δ the gradient at its output. A forward hook cuts
the graph at that output, so that autograd's tape begins there and no parameter has to be frozen.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .fungi_rows import Deferred, Tokens, deferred, taken

_LOCK = threading.Lock()
_EVALUATING: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()
"""How many passes need a module in evaluation mode, and whether it was in training before them."""


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while any pass through the model, or a part of it, is in here.

    Afterwards each module is as it was found before the first of them, in whatever order they end.
    """
    modules = list(model.modules())
    with _LOCK:
        for module in modules:
            users, training = _EVALUATING.get(module, (0, module.training))
            _EVALUATING[module] = users + 1, training
            if module.training:
                module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                users, training = _EVALUATING.pop(module)
                if users > 1:
                    _EVALUATING[module] = users - 1, training
                elif training:
                    module.training = True


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
            f"{op}: target_layer: expected the name of a torch.nn.Linear of the model, "
            f"{_nearest(target_layer, names)}, got {target_layer!r}; model.named_modules() lists "
            "them"
        ) from error
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{op}: target_layer: expected a torch.nn.Linear, got {type(layer).__name__} under "
            f"{target_layer!r}"
        )
    return layer


def _nearest(wrong: Any, names: list[str]) -> str:
    """Of the names the three that are written most alike, which the model may have them by."""
    found = difflib.get_close_matches(str(wrong), names, cutoff=0.0)
    return f"such as {', '.join(map(repr, found))}" if found else "which has none"


def _is_compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)``, or in place by ``module.compile()``."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class LayerRecord:
    """What the hooks saw in one forward pass, and the gradients that start from it.

    Args:
        op: for messages.
        model: that has the layer.
        target_layer: its name.
        rows: whether the layer, and what follows it, may be computed for those tokens alone that
            are read, see :mod:`fmkernels.api.fungi_rows`.

    Attributes:
        leaves: outputs of the layer that autograd's tape begins at, with the inputs that belong to
            them: (N, …, out), (N, …, in). One pair, but for parts of the tokens, read one by one.
    """

    def __init__(self, op: str, model: nn.Module, target_layer: str, rows: bool = False) -> None:
        self.op, self.target_layer, self._rows = op, target_layer, rows
        self.layer = linear_layer(op, model, target_layer)
        parent = target_layer.rpartition(".")[0]
        self._in_attention = isinstance(model.get_submodule(parent), nn.MultiheadAttention)
        self._thread = threading.get_ident()
        self._calls = 0
        self._given = torch.empty(0)
        self.leaves: list[tuple[Tensor, Tensor]] = []

    @property
    def activation(self) -> Tensor:
        """(N, …, in), the layer's input."""
        return self.leaves[0][1]

    @property
    def output(self) -> Tensor:
        """(N, …, out), the leaf that autograd's tape begins at."""
        return self.leaves[0][0]

    def before(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """Keep the input, and hand the layer one that computes what is read.

        ``rest`` is (keyword arguments,), but nothing in another thread's pass during which this
        hook is removed; see ``after``.
        """
        if threading.get_ident() != self._thread:
            return None
        (kwargs,) = rest
        self._given = (args[0] if args else kwargs["input"]).detach()
        if not self._rows:
            return None
        tokens = deferred(self._given)
        return ((tokens, *args[1:]), kwargs) if args else (args, {**kwargs, "input": tokens})

    def after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        """Cut the graph at the layer's output, and begin one there.

        ``rest`` is (keyword arguments, output), but (output,) in another thread's pass during which
        this hook is removed.
        """
        if threading.get_ident() != self._thread:
            return None
        output = rest[-1]
        self._calls += 1
        torch.set_grad_enabled(True)  # until capture() ends
        if not isinstance(output, Deferred):
            return self._leaf(output, self._given)
        tokens, count = output.tokens, output.tokens.count

        def begin(rows: range) -> Tensor:
            return self._leaf(tokens.rows(rows), taken(self._given, rows, count))

        return Deferred(Tokens(count, begin))

    def _leaf(self, output: Tensor, activation: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self.leaves.append((leaf, activation))
        return leaf.clone()  # a leaf could not be changed in place

    def factors(
        self, result: Tensor, grad_result: Tensor, more: bool = False
    ) -> tuple[Tensor, Tensor]:
        """δ (N, …, out), the gradient of (result · grad_result) at the layer's output, and its a.

        Only of rows that the result may depend on. ``more`` keeps the graph for another call.
        """
        self._check_passed()
        found: tuple[Tensor | None, ...] = ()
        leaves = [leaf for leaf, _ in self.leaves]
        if result.requires_grad:
            found = torch.autograd.grad(
                result, leaves, grad_result, retain_graph=more, allow_unused=True
            )
        pairs = [
            (delta, activation)
            for delta, (_, activation) in zip(found, self.leaves, strict=False)
            if delta is not None
        ]
        if not pairs:
            raise ValueError(
                f"{self.op}: target_layer: expected a layer that the model's result depends on, "
                f"got {self.target_layer!r}: its output does not reach the result, or the model "
                "leaves autograd off after it"
            )
        if len(pairs) == 1:
            return pairs[0]
        deltas, activations = zip(*pairs, strict=True)
        return torch.cat(deltas, dim=1), torch.cat(activations, dim=1)

    def gradient(self, result: Tensor, grad_result: Tensor, more: bool = False) -> Tensor:
        """The first of :meth:`factors`."""
        return self.factors(result, grad_result, more)[0]

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
def capture(
    op: str, model: nn.Module, target_layer: str, rows: bool = False
) -> Iterator[LayerRecord]:
    """Record one linear layer during the forward pass in this block, in this thread.

    With ``rows`` what follows it may be computed for some of the tokens only. The model is in
    evaluation mode; autograd is off before the layer and on after it. On leaving, also by an
    exception, hooks, modes and autograd are as before. Parameters are not touched.

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
    record = LayerRecord(op, model, target_layer, rows)
    with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
        with _LOCK:  # two threads could get one number for their hooks
            before = record.layer.register_forward_pre_hook(record.before, with_kwargs=True)
            # before the user's own, which may change what the layer returned
            after = record.layer.register_forward_hook(record.after, prepend=True, with_kwargs=True)
        try:
            yield record
        finally:
            with _LOCK:
                after.remove()
                before.remove()


def factor_rows(
    record: LayerRecord, delta: Tensor, activation: Tensor, views: int
) -> tuple[Tensor, Tensor]:
    """δ and a of all views, (N, …, out) and (N, …, in), as (N, T, out), (N, T, in).

    Positions at which δ is exactly zero in every view are left out: with an embedding that is read
    off the CLS token after the last block, all but that one.
    """
    if len(delta) != views or len(activation) != views:
        raise ValueError(
            f"{record.op}: target_layer: expected a layer with the {views} views in the first "
            f"dimension, got an output of shape {tuple(delta.shape)} from {record.target_layer!r}"
        )
    delta = delta.reshape(views, -1, delta.shape[-1])
    activation = activation.reshape(views, -1, activation.shape[-1])
    used = (delta != 0).any(dim=-1).any(dim=0)  # (T,)
    return (delta, activation) if bool(used.all()) else (delta[:, used], activation[:, used])
