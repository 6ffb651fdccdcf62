"""FUNGI features of every patch: a loss over the tokens of an image, a sketch for each token.

After the target layer of a last block, what happens to a token depends on that token alone. The
gradient at the layer's output then splits into one row per token, G_s = δ_s ⊗ [a_s; 1]: rank 1, and
never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmkernels import knn

from .fungi_passes import OP, Backbone, Factors, Ready, loss_gradient, widened
from .fungi_pooling import call, tokens_of
from .gradient_capture import capture, evaluation_mode

KINDS = ("plain", "patches")
"""Views of the objectives that tokens can take the place of; DINO's crops have no tokens."""


def embed_tokens(backbone: Backbone, views: Any) -> Tensor:
    """Tokens (B, T, E), float32 or float64, without any gradient."""
    views = backbone.prepared(views)
    with evaluation_mode(backbone.model), torch.inference_mode(False), torch.no_grad():
        with backbone.precision():
            output = call(backbone.model, views)
            tokens = tokens_of(OP, output, backbone.pooling, views)
        return widened(tokens)


def patch_tokens(tokens: Tensor, prefix: int) -> Tensor:
    """(B, T, E) without the first tokens, which are no patches."""
    if prefix >= tokens.shape[1]:
        raise ValueError(
            f"{OP}: prefix_tokens: expected fewer than the {tokens.shape[1]} tokens of an input, "
            f"got {prefix}"
        )
    return tokens[:, prefix:]


def token_pass(
    backbone: Backbone, views: Any, objectives: Sequence[Ready], neighbors: int
) -> tuple[Tensor, list[Factors]]:
    """Tokens (B, T, E), and for each objective δ (B, T, out) and a (B, T, in).

    The tokens of an image are the views of its loss. Negatives, where a loss needs them, are the
    latents of the ``neighbors`` nearest tokens in the memory for every token.
    """
    views = backbone.prepared(views)
    with (
        capture(OP, backbone.model, backbone.target_layer) as record,
        backbone.precision(),
    ):
        output = call(backbone.model, views)
        result = tokens_of(OP, output, backbone.pooling, views)
    tokens = widened(result)
    found = []
    for position, ready in enumerate(objectives, start=1):
        unit, norm = _loss_gradient(backbone, ready, tokens, neighbors)
        delta = record.gradient(result, unit.to(result.dtype), more=position < len(objectives))
        if delta.shape[:-1] != result.shape[:-1]:
            raise ValueError(
                f"{OP}: target_layer: expected a layer with a row for each of the tokens, "
                f"{tuple(result.shape[:2])}, got {tuple(delta.shape)} from "
                f"{backbone.target_layer!r}"
            )
        found.append(Factors(delta, record.activation, norm))
    return tokens, found


def _loss_gradient(
    backbone: Backbone, ready: Ready, tokens: Tensor, neighbors: int
) -> tuple[Tensor, Tensor]:
    """Image by image: InfoNCE of 1,024 tokens with 5 neighbours each is a table of 6 M numbers."""
    units, norms = [], []
    for image in tokens.split(1):
        own = ready
        if ready.negatives is not None:
            memory = ready.negatives.to(image.dtype)
            nearest = knn(image[0], memory, min(neighbors, len(memory)))[1]  # (T, k)
            head = ready.heads["head"].like(image)
            own = ready._replace(negatives=head(memory[nearest.flatten()]))
        unit, norm = loss_gradient(backbone, own, image)
        units.append(unit)
        norms.append(norm)
    return torch.cat(units), torch.cat(norms)
