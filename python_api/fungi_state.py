"""What an extractor draws or computes once: heads, projection, negatives."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels.ops.project_gradients import Projection

from .arrays import checksum
from .fungi_inputs import crc
from .fungi_objectives import Head, Objective
from .fungi_random import derived_seed

OP = "FungiExtractor.load_state_dict"
KEYS = {"heads", "negatives", "projection", "settings"}


@dataclasses.dataclass(frozen=True)
class ExtractorState:
    """Replaced as a whole when it changes, so that a call that is under way keeps its own.

    Args:
        heads: objective -> head -> its weights; empty until the embedding's width is known.
        negatives: objective -> (M, L), or tokens (M, E).
        projection: None until its size is known.
    """

    heads: Mapping[str, Mapping[str, Head]] = dataclasses.field(default_factory=dict)
    negatives: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    projection: Projection | None = None

    @classmethod
    def drawn(
        cls,
        objectives: Mapping[str, Objective],
        embedding_dim: int,
        seed: int,
        projection: Projection,
    ) -> ExtractorState:
        """New heads; each is a function of the seed and of its own name."""
        heads = {}
        for name, objective in objectives.items():
            heads[name] = {
                head: Head.draw(
                    embedding_dim,
                    objective.latent_dim,
                    torch.Generator().manual_seed(derived_seed(seed, "head", name, head)),
                )
                for head in objective.heads
            }
        return cls(heads, {}, projection)

    def with_negatives(self, name: str, negatives: Tensor) -> ExtractorState:
        """The same with the negatives of one objective."""
        return dataclasses.replace(self, negatives={**self.negatives, name: negatives})

    def to(self, device: torch.device) -> ExtractorState:
        """The same on a device; it is moved only once."""
        placed: dict[torch.device, ExtractorState] = self.__dict__.setdefault("_placed", {})
        if device not in placed:
            heads = {
                name: {key: head.to(device) for key, head in own.items()}
                for name, own in self.heads.items()
            }
            negatives = {name: rows.to(device) for name, rows in self.negatives.items()}
            projection = None if self.projection is None else self.projection.to(device)
            placed[device] = ExtractorState(heads, negatives, projection)
        return placed[device]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text, as ``torch.save`` and ``torch.load`` take them."""
        return {
            "heads": {
                name: {key: head._asdict() for key, head in own.items()}
                for name, own in self.heads.items()
            },
            "negatives": dict(self.negatives),
            "projection": None if self.projection is None else self.projection.state_dict(),
        }

    @classmethod
    def loaded(
        cls, state: Mapping[str, Any], objectives: Mapping[str, Objective], per_token: bool
    ) -> ExtractorState:
        """From a :meth:`state_dict` of an extractor with the same objectives; a copy."""
        if not isinstance(state, Mapping) or state.keys() != KEYS:
            got = ", ".join(map(str, state)) if isinstance(state, Mapping) else repr(state)
            raise ValueError(
                f"{OP}: state: expected the state_dict of an extractor, with "
                f"{', '.join(sorted(KEYS))}, got {textwrap.shorten(got, 60, placeholder=' …')}"
            )
        if state["projection"] is None:
            raise ValueError(
                f"{OP}: state: expected one that was taken after the first features or negatives, "
                "got one without heads and projection"
            )
        heads, width = _checked_heads(state["heads"], objectives)
        negatives = _copied(state["negatives"])
        _check_negatives(negatives, objectives, width if per_token else None)
        projection = Projection.from_state_dict(_copied(state["projection"]))
        return cls(heads, negatives, projection)


def _checked_heads(
    heads: Any, objectives: Mapping[str, Objective]
) -> tuple[dict[str, dict[str, Head]], int]:
    """Copies of heads, as many and as large as the objectives have, and their width E."""
    try:
        made = {
            name: {key: _head(value) for key, value in own.items()} for name, own in heads.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{OP}: state: expected heads with weight (L, E) and bias (L,), got others; take what "
            "state_dict() of an extractor gives"
        ) from error
    wanted = {name: dict.fromkeys(own.heads, own.latent_dim) for name, own in objectives.items()}
    found = {name: {key: len(head.bias) for key, head in own.items()} for name, own in made.items()}
    if found != wanted:
        raise ValueError(
            f"{OP}: state: expected heads with these outputs: {wanted}, got {found}; load it into "
            "an extractor with the same objectives"
        )
    widths = {head.weight.shape[1] for own in made.values() for head in own.values()}
    if len(widths) > 1:
        raise ValueError(
            f"{OP}: state: expected heads for embeddings of one width, got {sorted(widths)}; take "
            "those of one extractor"
        )
    return made, max(widths, default=0)


def _head(value: Mapping[str, Any]) -> Head:
    head = Head(_copied(value["weight"]), _copied(value["bias"]))
    if head.weight.ndim != 2 or head.bias.shape != head.weight.shape[:1]:
        raise ValueError("shapes that do not fit")
    return head


def _check_negatives(
    negatives: Any, objectives: Mapping[str, Objective], token_width: int | None
) -> None:
    """Latents (M, L) of objectives that need some, or tokens (M, E)."""
    needed = {
        name: own.latent_dim if token_width is None else token_width
        for name, own in objectives.items()
        if own.wanted_negatives
    }
    for name, rows in negatives.items():
        if not isinstance(rows, Tensor) or rows.shape[1:] != (needed.get(name),):
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"{OP}: state: expected negatives of these widths: {needed}, got {got} for "
                f"{name!r}; load it into an extractor with the same objectives"
            )


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(own) for key, own in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """In words; empty if there are none."""
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: {found.get(name)}, not {wanted.get(name)}" for name in names)


def checksums(model: nn.Module, state: ExtractorState) -> dict[str, str]:
    """Of all tensors that features depend on, but for the inputs."""
    parts = {"weights of the model": model.state_dict(), **state.state_dict()}
    return {name: crc("\n".join(_sums(name, own)).encode()) for name, own in parts.items()}


def _sums(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, own in value.items() for line in _sums(f"{name}.{key}", own)]
    if isinstance(value, Tensor):
        return [f"{name} {checksum(value.reshape(-1))}"]
    return [f"{name} {value}"]
