"""What follows a layer token by token is computed for those tokens alone that somebody reads.

Where the embedding is the CLS token after the last block, all that comes behind the block's
attention, three quarters of its work, is needed for one token of 197. The model is not asked what
it is made of. It is handed a tensor that has not been computed: functions that treat every token
alike (linear layers, norms, activations, sums) are noted, and run when tokens are picked, on those.
Any other function gets all tokens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ARITHMETIC = ("add", "sub", "mul", "div", "__radd__", "__rsub__", "__rmul__", "__rdiv__", "neg")
ACTIVATIONS = ("gelu", "silu", "relu", "tanh", "sigmoid", "dropout")
COPIES = ("to", "float", "double", "half", "bfloat16", "contiguous", "clone")
ELEMENTWISE = frozenset((*ARITHMETIC, *ACTIVATIONS, *COPIES))
"""Functions of numbers by themselves, by name; of sums and products, also with tensors."""
FEATUREWISE = frozenset(("linear", "layer_norm", "rms_norm"))
"""Functions of the features of each token; the first argument has the tokens."""
FACTS = frozenset(("shape", "dtype", "device", "ndim", "layout"))
"""Properties that are known before anything is computed, beside those that begin with ``is_``."""
QUESTIONS = frozenset(("size", "dim", "numel", "is_floating_point", "is_complex", "__len__"))
"""Methods of the same kind."""
FIRST = range(1)


_THREAD = threading.local()


class NotDeferrableError(RuntimeError):
    """The model changes a tensor in place that something not yet computed depends on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        _THREAD.refusals = refusals() + 1


def refusals() -> int:
    """How often the error was raised in this thread; compiled code hides it behind its own."""
    found: int = getattr(_THREAD, "refusals", 0)
    return found


FOREIGN = ("Deferred", "tensor subclass", "storage", "setting up backward hooks")
"""Words of errors that PyTorch raises where it is handed what has not been computed."""


def is_refusal(error: Exception, before: int) -> bool:
    """Whether a pass, ``before`` which there were so many, failed for want of tokens."""
    return refusals() > before or any(word in str(error) for word in FOREIGN)


class Tokens:
    """Tokens (N, T, C), of which those that are asked for are computed, once.

    The first one is at once: it is mostly the one that is wanted, and gives shape and dtype. Others
    are in the modes (autograd, autocast) that were on at first.

    Args:
        count: T.
        compute: some of the tokens, as a range of their numbers -> (N, len(range), C).
        inputs: tensors that ``compute`` reads.
    """

    def __init__(
        self, count: int, compute: Callable[[range], Tensor], inputs: Sequence[Tensor] = ()
    ) -> None:
        self.count, self._compute = count, compute
        self._inputs = [(tensor, _version(tensor)) for tensor in inputs]
        first = compute(FIRST)
        self._found, self._grad = {FIRST: first}, torch.is_grad_enabled()
        place = first.device
        self._autocast = (
            place.type,
            torch.get_autocast_dtype(place.type),
            torch.is_autocast_enabled(place.type),
        )

    def rows(self, wanted: range) -> Tensor:
        """(N, len(wanted), C)"""
        if wanted not in self._found:
            if any(_version(tensor) != seen for tensor, seen in self._inputs):
                raise NotDeferrableError("a tensor was changed in place")
            with self._modes():
                self._found[wanted] = self._compute(wanted)
        return self._found[wanted]

    def all(self) -> Tensor:
        """(N, T, C)"""
        return self.rows(range(self.count))

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        with torch.set_grad_enabled(self._grad), torch.autocast(*self._autocast):
            yield


def deferred(tensor: Tensor) -> Tensor:
    """The same tensor, of which functions are noted; itself if it has no tokens (N, T, C)."""
    if type(tensor) is not Tensor or tensor.ndim != 3 or tensor.shape[1] < 2:
        return tensor
    count = tensor.shape[1]
    return Deferred(Tokens(count, lambda rows: taken(tensor, rows, count), [tensor]))


def taken(tensor: Tensor, rows: range, count: int) -> Tensor:
    """Some of the ``count`` tokens (…, T, C) of a tensor, without the memory of the others."""
    if len(rows) == count:
        return tensor
    return tensor[..., rows.start : rows.stop : rows.step, :].contiguous()


class Deferred(Tensor):
    """A tensor (N, T, C) for a model to work with, whose numbers :class:`Tokens` finds."""

    tokens: Tokens

    @staticmethod
    def __new__(cls, tokens: Tokens) -> Deferred:
        """Has the shape and the dtype, and no memory."""
        first = tokens.rows(FIRST)
        shape = (first.shape[0], tokens.count, first.shape[2])
        found: Deferred = Tensor._make_wrapper_subclass(
            cls, shape, dtype=first.dtype, device=first.device
        )
        found.tokens = tokens
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note it, if it treats every token alike; otherwise do it with all tokens."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
            if name in FACTS or name.startswith("is_"):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args)
            if name == "requires_grad":
                return args[0].tokens.rows(FIRST).requires_grad
        elif name in QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        elif name == "__getitem__" and isinstance(args[0], Deferred):
            picked = _picked(args[0].tokens, args[1])
            if picked is not None:
                return picked
        elif _treats_tokens_alike(name, args, kwargs):
            return _noted(func, name, args, kwargs)
        return _with_all(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Where ``__torch_function__`` was not asked, autograd would not see what is done."""
        raise NotDeferrableError(f"{func} was called past __torch_function__")


def _treats_tokens_alike(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Of a function by that name, not in place, with at least one argument deferred."""
    if any(each is True for each in (*args, *kwargs.values())):
        return False  # in place, or dropout that is on
    if _any_deferred(kwargs.values()):
        return False
    if name in FEATUREWISE:
        alone = isinstance(args[0], Deferred) and not _any_deferred(args[1:])
        return alone and (name == "linear" or len(tuple(args[1])) == 1)
    if name not in ELEMENTWISE:
        return False
    if name == "dropout" and len(args) < 3 and "training" not in kwargs:
        return False  # it is on
    counts = {each.tokens.count for each in args if isinstance(each, Deferred)}
    fitting = (1, *counts)
    others = [each for each in args if isinstance(each, Tensor) and not isinstance(each, Deferred)]
    return len(counts) == 1 and all(
        each.ndim < 2 or (each.ndim <= 3 and each.shape[-2] in fitting) for each in others
    )


def _any_deferred(values: Any) -> bool:
    return any(isinstance(each, Deferred) for each in values)


def _noted(
    func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    count = next(each.tokens.count for each in args if isinstance(each, Deferred))
    whole = args[1:] if name in FEATUREWISE else ()
    parted = args[:1] if name in FEATUREWISE else args

    def part(value: Any, rows: range) -> Any:
        if isinstance(value, Deferred):
            return value.tokens.rows(rows)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-2] == count:
            return taken(value, rows, count)
        return value

    def compute(rows: range) -> Tensor:
        found: Tensor = func(*(part(value, rows) for value in parted), *whole, **kwargs)
        return found

    inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    return Deferred(Tokens(count, compute, [x for x in inputs if not isinstance(x, Deferred)]))


def _picked(tokens: Tokens, index: Any) -> Tensor | None:
    """``x[:, 0]``, ``x[:, 1:]`` and the like; None for any other index."""
    index = index if isinstance(index, tuple) else (index,)
    everything = all(type(each) is slice and each == slice(None) for each in index[:1] + index[2:])
    if len(index) not in (2, 3) or not everything:
        return None
    wanted = index[1]
    if type(wanted) is int and -tokens.count <= wanted < tokens.count:
        row = wanted % tokens.count
        return tokens.rows(range(row, row + 1))[:, 0]
    bounds = (wanted.start, wanted.stop, wanted.step) if type(wanted) is slice else (wanted,)
    if any(each is not None and type(each) is not int for each in bounds):
        return None
    if type(wanted) is not slice or (wanted.step or 1) < 1:
        return None
    chosen = range(tokens.count)[wanted]
    if len(chosen) < 2:
        return tokens.rows(chosen) if chosen else None
    return Deferred(
        Tokens(len(chosen), lambda rows: tokens.rows(chosen[rows.start : rows.stop : rows.step]))
    )


def _with_all(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given: list[Tensor] = []
    args, kwargs = _computed(args, given), _computed(kwargs, given)
    before = [_version(tensor) for tensor in given]
    result = func(*args, **kwargs)
    if before != [_version(tensor) for tensor in given]:
        raise NotDeferrableError(f"{func} changed a tensor in place")
    return result


def _computed(value: Any, given: list[Tensor]) -> Any:
    """With all tokens of what is deferred, which are added to ``given``."""
    if isinstance(value, Deferred):
        given.append(value.tokens.all())
        return given[-1]
    if isinstance(value, Mapping):
        return {key: _computed(each, given) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_computed(each, given) for each in value)
    return value


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    if tensor.is_inference():
        raise NotDeferrableError("a tensor of torch.inference_mode does not count changes in place")
    return tensor._version
