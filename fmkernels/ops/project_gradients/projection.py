"""What all projections have in common: a random matrix that is described, not stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.project_gradients.philox import LAYERS

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS: dict[str, type[Projection]] = {}
"""The projections, by the name that a state dict has."""


class Settings(NamedTuple):
    """What the registered op is told about a projection."""

    signs: Tensor | None
    kind: str
    dim: int
    bias: bool
    scale: float
    seed: int = 0
    layer: int = 0
    repeats: int = 1
    left: int = 0
    """Rows of a Kronecker product's left factor."""


@dataclass(frozen=True, eq=False)
class Projection(ABC):
    """A random matrix (dim, D) for the gradients of one linear layer, D = out × (in + bias).

    A small value object: it holds the numbers that the matrix is a function of, compares by them,
    and can be pickled, copied, saved and used as a key. Nothing is drawn before it is used.
    """

    kind: ClassVar[str]

    out_features: int
    in_features: int

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    @property
    def columns(self) -> int:
        """Columns of the gradient, (out_features, columns): the bias is the last one."""
        return self.in_features + bool(self.settings().bias)

    @property
    def device(self) -> torch.device | None:
        """Of what is stored; None where nothing is, and so every device will do."""
        signs = self.settings().signs
        return None if signs is None else signs.device

    def to(self, device: torch.device | str) -> Self:
        """The same projection, with what is stored on another device."""
        return self

    @abstractmethod
    def settings(self) -> Settings:
        """The arguments of the registered op."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """The dense matrix (dim, out_features · columns), float32: for tests and small layers."""

    def state_dict(self) -> dict[str, Any]:
        """Its kind and its arguments: numbers, truth values, text, and the bits that are stored."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind} | {k: v for k, v in values.items() if v is not None}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The projection that a :meth:`state_dict` describes, of any kind that ``cls`` covers."""
        op = cls.__name__
        known = [name for name, kind in KINDS.items() if issubclass(kind, cls)]
        kind = state.get("kind") if isinstance(state, dict) else None
        if kind not in known:
            raise ValueError(
                f"{op}: state: expected a state_dict of a projection, with a kind of "
                f"{', '.join(known)}, got {kind!r}"
            )
        found = KINDS[kind]
        arguments = {name: value for name, value in state.items() if name != "kind"}
        names = {field.name for field in fields(found)}
        needed = {field.name for field in fields(found) if field.default is not None}
        if not needed <= arguments.keys() <= names:
            raise ValueError(
                f"{op}: state: expected {', '.join(sorted(needed))}, "
                f"got {', '.join(sorted(map(str, arguments)))}"
            )
        projection = found(**arguments)
        assert isinstance(projection, cls)
        return projection

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "signs")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self) or self._values() != other._values():
            return False
        mine, theirs = self.settings().signs, other.settings().signs
        if mine is None or theirs is None:
            return mine is theirs
        return torch.equal(mine.cpu(), theirs.cpu())

    def __hash__(self) -> int:
        return hash((self.kind, self._values()))

    def _check(self, **integers: Any) -> None:
        """Refuse what is no integer >= 1, and keep each as Python's."""
        for name, value in integers.items():
            checked = _checks.positive_integer(type(self).__name__, name, value)
            object.__setattr__(self, name, checked)

    def _check_random(self, bias: Any, seed: Any, layer: Any) -> None:
        """Refuse a bias that is no truth value, and a seed or a layer out of range."""
        op = type(self).__name__
        if not isinstance(bias, bool):
            raise TypeError(f"{op}: bias: expected True or False, got {bias!r}")
        for name, value, power in (("seed", seed, 63), ("layer", layer, LAYERS.bit_length() - 1)):
            object.__setattr__(self, name, _checks.integer_below(op, name, value, power))
