"""From what a model returns to one embedding per view, or to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fmkernels import _checks

from .fungi_inputs import explained

POOLINGS = ("cls", "mean", "pooler")
Pooling: TypeAlias = str | Callable[[Any, Any], Tensor] | None


def check_pooling(op: str, pooling: Any) -> None:
    """One of the names, a function, or None."""
    if pooling is not None and not callable(pooling):
        _checks.choice(op, "pooling", pooling, POOLINGS)


def call(model: Callable[..., Any], views: Any) -> Any:
    """The model on a tensor, or on a mapping of keyword arguments.

    What it raises comes most often of views of a size that is not the model's.
    """
    with explained(lambda: _called_on(views)):
        return model(**views) if isinstance(views, Mapping) else model(views)


def _called_on(views: Any) -> str:
    return (
        f"the model was called on views of {_described(views)}; what makes them can be set with "
        "views=, such as views=ImageViews(size=32)"
    )


def _described(views: Any) -> str:
    if isinstance(views, Mapping):
        return ", ".join(f"{name}: {_described(value)}" for name, value in views.items())
    return f"shape {tuple(views.shape)}" if isinstance(views, Tensor) else type(views).__name__


def pooled(op: str, pooling: Pooling, output: Any, views: Any) -> Tensor:
    """The embeddings (N, E) in a model's output.

    | pooling | embedding |
    |---|---|
    | None | the output itself, (N, E) |
    | ``"cls"`` | the first of the tokens (N, T, E) |
    | ``"mean"`` | the mean over tokens, without those that an ``attention_mask`` leaves out |
    | ``"pooler"`` | ``output.pooler_output`` |
    | a function | what it returns for (output, views) |
    """
    embeddings: Any
    if callable(pooling):
        embeddings = pooling(output, views)
    elif pooling is None:
        embeddings = output
    elif pooling == "pooler":
        embeddings = getattr(output, "pooler_output", None)
    else:
        tokens = tokens_of(op, output)
        embeddings = tokens[:, 0] if pooling == "cls" else _mean(tokens, views)
    return _checked(op, embeddings, 2, "embeddings (N, E)", pooling)


def tokens_of(op: str, output: Any, pooling: Pooling = "cls", views: Any = None) -> Tensor:
    """The tokens (N, T, E) in a model's output; a function for ``pooling`` may find them."""
    if callable(pooling):
        output = pooling(output, views)
    tokens = getattr(output, "last_hidden_state", output)
    return _checked(op, tokens, 3, "tokens (N, T, E)", pooling)


def _mean(tokens: Tensor, views: Any) -> Tensor:
    mask = views.get("attention_mask") if isinstance(views, Mapping) else None
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens.mean(dim=1)
    weights: Tensor = mask.to(tokens.dtype).unsqueeze(-1)  # (N, T, 1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def _checked(op: str, found: Any, ndim: int, wanted: str, pooling: Pooling) -> Tensor:
    if isinstance(found, Tensor) and found.ndim == ndim and found.is_floating_point():
        return found
    got = f"{type(found).__name__}"
    if isinstance(found, Tensor):
        got = f"{found.dtype} of shape {tuple(found.shape)}"
    raise ValueError(
        f"{op}: pooling: expected {wanted} with pooling={pooling!r}, got {got} from the model; "
        f"take one of {', '.join(POOLINGS)}, or a function (output, views) -> embeddings"
    )
