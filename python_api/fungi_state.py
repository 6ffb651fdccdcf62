"""What an extractor draws or computes once: heads, projection, negatives."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels.ops.project_gradients import Projection

from .arrays import checksum
from .fungi_objectives import Head, Objective
from .fungi_random import derived_seed

OP = "FungiExtractor.load_state_dict"


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
        cls, state: Mapping[str, Any], objectives: Mapping[str, Objective]
    ) -> ExtractorState:
        """From a :meth:`state_dict` of an extractor with the same objectives."""
        if not isinstance(state, Mapping) or state.keys() != {"heads", "negatives", "projection"}:
            raise ValueError(
                f"{OP}: state: expected the state_dict of an extractor, with heads, negatives and "
                f"projection, got {sorted(state) if isinstance(state, Mapping) else type(state)}"
            )
        if state["projection"] is None:
            raise ValueError(
                f"{OP}: state: expected one that was taken after the first features or negatives, "
                "got one without heads and projection"
            )
        expected = {
            name: dict.fromkeys(own.heads, own.latent_dim) for name, own in objectives.items()
        }
        found = {
            name: {key: len(head["weight"]) for key, head in own.items()}
            for name, own in state["heads"].items()
        }
        if found != expected:
            raise ValueError(
                f"{OP}: state: expected heads with these outputs: {expected}, got {found}; load it "
                "into an extractor with the same objectives"
            )
        heads = {
            name: {key: Head(head["weight"], head["bias"]) for key, head in own.items()}
            for name, own in state["heads"].items()
        }
        return cls(heads, dict(state["negatives"]), Projection.from_state_dict(state["projection"]))


def fingerprint(model: nn.Module, state: ExtractorState, *settings: object) -> str:
    """A checksum of all that features depend on, but for the inputs.

    A function counts by its name, which another process gives it, too, not by its address.
    """
    sums = [f"{name} {checksum(tensor)}" for name, tensor in model.state_dict().items()]
    sums += _sums("state", state.state_dict())
    sums += [re.sub(r" at 0x[0-9a-fA-F]+", "", str(setting)) for setting in settings]
    return f"{zlib.crc32(chr(10).join(sums).encode()):08x}"


def _sums(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, own in value.items() for line in _sums(f"{name}.{key}", own)]
    if isinstance(value, Tensor):
        return [f"{name} {checksum(value)}"]
    return [f"{name} {value}"]
