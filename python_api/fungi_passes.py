"""One pass of the model over views, and from the losses of its embeddings to δ and a."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels import _inference

from .fungi_objectives import Head, Objective
from .fungi_pooling import Pooling, call, pooled
from .fungi_rows import is_refusal, refusals
from .gradient_capture import LayerRecord, capture, factor_rows

OP = "FungiExtractor"

_WHOLE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that need all tokens after the target layer, because of how they are written."""


class Ready(NamedTuple):
    """An objective with what its loss needs, on the model's device."""

    objective: Objective
    heads: Mapping[str, Head]
    negatives: Tensor | None


class Factors(NamedTuple):
    """The gradients of some samples, as factors: G = scale · Σ_s δ_s ⊗ [a_s; 1]."""

    delta: Tensor
    """(B, S, out)"""
    activation: Tensor
    """(B, S, in)"""
    scale: Tensor
    """(B,): norm of the loss's gradient at the embeddings, which δ was divided by."""

    @property
    def nbytes(self) -> int:
        """Bytes of δ and a."""
        return self.delta.nbytes + self.activation.nbytes

    def rows(self, chosen: slice) -> Factors:
        """Some of the rows of every sample."""
        return self._replace(delta=self.delta[:, chosen], activation=self.activation[:, chosen])

    def pair(self, apart: bool) -> tuple[Tensor, Tensor]:
        """(δ, a) as a projection takes them; ``apart`` makes every row a sample of its own."""
        if apart:
            return self.delta.flatten(0, 1), self.activation.flatten(0, 1)
        return self.delta, self.activation

    def scaled_delta(self) -> Tensor:
        """δ with its scale, in float32 or float64."""
        return widened(self.delta) * self.scale.view(-1, 1, 1)


class Backbone(NamedTuple):
    """A model, and how to get embeddings and gradients out of it."""

    model: nn.Module
    target_layer: str
    pooling: Pooling
    dtype: torch.dtype | None
    halves: _inference.Halves | None = None
    """Weights in half precision, where passes share them."""

    def in_one_go(self) -> Backbone:
        """The same for passes between which no weight changes."""
        return self._replace(halves={})

    @property
    def device(self) -> torch.device:
        """Of the model's first parameter."""
        return next(self.model.parameters()).device

    def prepared(self, views: Any) -> Any:
        """Views whose floating tensors have the dtype of the model's parameters."""
        dtype = next(self.model.parameters()).dtype
        if isinstance(views, Mapping):
            return {name: _cast(value, dtype) for name, value in views.items()}
        return _cast(views, dtype)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, if a dtype was asked for; otherwise as the caller has it."""
        place = self.device
        with contextlib.ExitStack() as stack:
            if self.dtype is not None:
                stack.enter_context(torch.autocast(place.type, dtype=self.dtype))
            half = next(self.model.parameters()).dtype == torch.bfloat16
            if half or torch.is_autocast_enabled(place.type):
                halves = {} if self.halves is None else self.halves
                stack.enter_context(_inference.half_precision(place, halves))
            yield

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """No autocast: losses are computed in the dtype of the embeddings they are given."""
        place = self.device
        with torch.autocast(place.type, enabled=False):
            yield

    def embed(self, views: Any) -> Tensor:
        """Embeddings (N, E), float32 or float64, without any gradient."""
        return torch.cat([widened(result) for result, _ in self.passes(views)])

    def passes(self, views: Any) -> Iterator[tuple[Tensor, LayerRecord]]:
        """Embeddings (n, E) of part after part of the views, and what the target layer saw.

        They are in a graph that begins at that layer.
        """
        views = self.prepared(views)
        size = _inference.pass_size(views) if isinstance(views, Tensor) else 0
        for part in views.split(size) if size else (views,):
            yield self._pass(part)

    def _pass(self, views: Any) -> tuple[Tensor, LayerRecord]:
        if self.model not in _WHOLE:
            before = refusals()
            try:
                return self._recorded(views, rows=True)
            except Exception as error:
                if not is_refusal(error, before):
                    raise
        found = self._recorded(views, rows=False)
        _WHOLE.add(self.model)
        return found

    def _recorded(self, views: Any, rows: bool) -> tuple[Tensor, LayerRecord]:
        with (
            capture(OP, self.model, self.target_layer, rows) as record,
            self.precision(),
        ):
            return pooled(OP, self.pooling, call(self.model, views), views), record


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_inference():
        value = value.clone()  # the tape takes none of torch.inference_mode
    return value.to(dtype) if value.is_floating_point() else value


def widened(embeddings: Tensor) -> Tensor:
    """Out of the graph, in float32 unless it is float64."""
    found = embeddings.detach()
    return found if found.dtype == torch.float64 else found.float()


def loss_gradient(backbone: Backbone, ready: Ready, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each image's loss at its embeddings (B, V, E), as (unit gradient, norm).

    The norm is taken out because a gradient of KL is about 1e-8, which float16 does not have.
    """
    objective, heads, negatives = ready
    leaf = embeddings.detach().requires_grad_()
    with torch.enable_grad(), backbone.full_precision():
        used = {name: head.like(leaf) for name, head in heads.items()}
        losses = objective.loss(leaf, used, negatives)
        if losses.shape != (len(leaf),):
            raise ValueError(
                f"{OP}: objectives: expected {objective.name}.loss to return one loss per image, "
                f"({len(leaf)},), got shape {tuple(losses.shape)}"
            )
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    norm = gradient.flatten(1).norm(dim=1)  # (B,)
    divisor = torch.where(norm > 0, norm, 1)
    return gradient / divisor.view(-1, 1, 1), norm


def image_pass(
    backbone: Backbone, views: Any, samples: int, count: int, objectives: Sequence[Ready]
) -> tuple[Tensor, list[Factors]]:
    """Embeddings (B, V, E) of ``count`` views of each sample, and every objective's gradients.

    All objectives share the forward pass.
    """
    if not objectives:
        return _per_sample(backbone.embed(views), samples, count), []
    passes = list(backbone.passes(views))
    embeddings = _per_sample(torch.cat([widened(own) for own, _ in passes]), samples, count)
    found = []
    for position, ready in enumerate(objectives, start=1):
        unit, norm = loss_gradient(backbone, ready, embeddings)
        parts = unit.flatten(0, 1).split([len(own) for own, _ in passes])
        more = position < len(objectives)
        pairs = [
            factor_rows(record, *record.factors(result, part.to(result.dtype), more), len(result))
            for (result, record), part in zip(passes, parts, strict=True)
        ]
        delta, activation = (
            rows.unflatten(0, (samples, -1)).flatten(1, 2) for rows in joined(pairs)
        )
        found.append(Factors(delta, activation, norm))
    return embeddings, found


def _per_sample(embeddings: Tensor, samples: int, count: int) -> Tensor:
    """(B·V, E) -> (B, V, E)"""
    if len(embeddings) != samples * count:
        raise ValueError(
            f"{OP}: views: expected {count} for each of {samples} inputs, got "
            f"{len(embeddings)} embeddings"
        )
    return embeddings.view(samples, count, -1)


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One batch of (δ, a) of parts; where these have different numbers of rows, zeros fill up."""
    if len(pairs) == 1:
        return pairs[0]
    rows = max(delta.shape[1] for delta, _ in pairs)
    deltas, activations = (
        torch.cat([F.pad(own, (0, 0, 0, rows - own.shape[1])) for own in side])
        for side in zip(*pairs, strict=True)
    )
    return deltas, activations
