"""What a VeRA adapter is: the fields of PEFT's configuration, and what fmkernels adds to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from fmkernels import _checks

OP = "VeraConfig"

PEFT_TYPE = "VERA"
DVORA_TYPE = "DVORA"
SEED_TYPE = "VERA_SEED"
"""PEFT refuses files of these types. Of a VERA file it would drop the magnitudes of DVoRA, or draw
other matrices for the seed, and go on."""

BIASES = ("none", "all", "vera_only")
TASKS = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)
INITS = ("kaiming_uniform", "kaiming_normal", "position")

_OF_PEFT = (
    "alora_invocation_tokens", "auto_mapping", "inference_mode", "peft_type", "peft_version",
    "revision",
)  # fmt: skip
"""Fields of PEFT's files that say nothing about what the adapter computes."""


@dataclasses.dataclass
class VeraConfig:
    """The settings of one VeRA or DVoRA adapter, named as in PEFT.

    Args:
        r: the rank: rows of A and columns of B.
        target_modules: which linear layers get vectors: names (``["query", "value"]`` matches every
            module whose path ends in one of them), a regular expression for whole paths, or
            ``"all-linear"`` for all but the layer that gives words.
        projection_prng_key: the seed of A and B.
        save_projection: whether A and B are written to files and to ``state_dict()``; otherwise the
            seed makes them again.
        vera_dropout: the share of a layer's input that the adapter does not see in training.
        d_initial: with what ``lambda_d`` starts; ``lambda_b`` starts with 0. With
            ``init="position"``, whose A and B have variance 1, it is multiplied by 2/√(m r), which
            gives products of PEFT's size; so should the learning rate of ``lambda_d`` be.
        fan_in_fan_out: kept for PEFT's files; GPT-2's ``Conv1D`` is recognised by itself.
        bias: which biases of the model are trained too: ``"none"``, ``"all"``, or ``"vera_only"``,
            those of the adapted layers.
        modules_to_save: names of modules that are trained whole and saved, such as a classifier.
        init_weights: False starts from random vectors, for tests of training code.
        layers_to_transform: the numbers of the layers that are adapted; None for all. As in PEFT
            it limits names, but neither whole paths nor regular expressions; and ``"all-linear"``
            in models of at least 20 linear layers.
        layers_pattern: the name of the list that these numbers count, such as ``"layers"``.
        task_type: as in PEFT, ``"SEQ_CLS"`` and ``"TOKEN_CLS"`` add the model's ``classifier`` or
            ``score`` to ``modules_to_save``, and ``"QUESTION_ANS"`` its ``qa_outputs``.
        base_model_name_or_path: what the base model is loaded from, for PEFT's files; by default
            what transformers remembers.
        init: how A and B are drawn, as in :func:`fmkernels.vera_matrices`. PEFT draws
            ``"kaiming_uniform"``.
        use_dora: DVoRA: the norm of every row of the adapted weight is trained apart from its
            direction.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field does not fit; the message names it.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024; Liu
        et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, ICML 2024.

    Example:
        >>> from fmkernels.api import VeraConfig
        >>> config = VeraConfig(r=64, target_modules=["query", "value"])
        >>> VeraConfig.from_dict(config.to_dict()) == config
        True
    """

    r: int = 256
    target_modules: str | Sequence[str] | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    init: str = "kaiming_uniform"
    use_dora: bool = False

    def __post_init__(self) -> None:
        self.r = _checks.positive_integer(OP, "r", self.r)
        self.projection_prng_key = _checks.integer_below(
            OP, "projection_prng_key", self.projection_prng_key, power=63
        )
        _checks.choice(OP, "bias", self.bias, BIASES)
        _checks.choice(OP, "init", self.init, INITS)
        _checks.non_negative(OP, "vera_dropout", self.vera_dropout)
        if self.vera_dropout > 1 or isinstance(self.vera_dropout, bool):
            raise ValueError(
                f"{OP}: vera_dropout: expected a share from 0 to 1, got {self.vera_dropout}"
            )
        if isinstance(self.d_initial, bool) or not isinstance(self.d_initial, Real):
            raise TypeError(f"{OP}: d_initial: expected a number, got {self.d_initial!r}")
        if not math.isfinite(self.d_initial):
            raise ValueError(f"{OP}: d_initial: expected a finite number, got {self.d_initial}")
        self.vera_dropout, self.d_initial = float(self.vera_dropout), float(self.d_initial)
        for name in ("save_projection", "fan_in_fan_out", "init_weights", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{OP}: {name}: expected True or False, got {getattr(self, name)!r}"
                )
        self.target_modules = _names("target_modules", self.target_modules, regex=True)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save, regex=False)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern, regex=True)
        self.layers_to_transform = _numbers(self.layers_to_transform)
        self.task_type = getattr(self.task_type, "value", self.task_type)  # PEFT's is an Enum
        if self.task_type is not None:
            _checks.choice(OP, "task_type", self.task_type, TASKS)
        name = self.base_model_name_or_path
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{OP}: base_model_name_or_path: expected a name or None, got {name!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"{OP}: layers_to_transform: expected the numbers of layers, because "
                "layers_pattern is given, got None"
            )

    @property
    def peft_type(self) -> str:
        """What ``adapter_config.json`` calls it: VERA if PEFT computes the same."""
        if self.use_dora:
            return DVORA_TYPE
        is_drawn_by_peft = self.init == "kaiming_uniform" or self.save_projection
        return PEFT_TYPE if is_drawn_by_peft else SEED_TYPE

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``adapter_config.json``; of type VERA it has the fields of PEFT alone."""
        fields = {"peft_type": self.peft_type, **dataclasses.asdict(self)}
        if self.peft_type == PEFT_TYPE:
            del fields["init"], fields["use_dora"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VeraConfig:
        """The configuration in an ``adapter_config.json``, or in a PEFT configuration's fields.

        Raises:
            ValueError: it is no VeRA adapter's, or has a setting that is not known here.
        """
        kind = fields.get("peft_type")
        kind = getattr(kind, "value", kind)
        if kind not in (PEFT_TYPE, DVORA_TYPE, SEED_TYPE):
            raise ValueError(
                f"{OP}: peft_type: expected {PEFT_TYPE}, {DVORA_TYPE} or {SEED_TYPE}, "
                f"got {kind!r}, which PEFT may load"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        others = {
            name: value
            for name, value in fields.items()
            if name not in known
            and name not in _OF_PEFT
            and value is not None
            and value is not False
        }
        if others:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(others.items()))
            raise ValueError(
                f"{OP}: expected the settings of a VeRA adapter, got others too: {listed}"
            )
        own = {name: value for name, value in fields.items() if name in known}
        modules = own.get("modules_to_save")
        if isinstance(modules, list) and all(isinstance(name, str) for name in modules):
            own["modules_to_save"] = list(dict.fromkeys(modules))  # PEFT repeats names
        own["layers_pattern"] = own.get("layers_pattern") or None  # to PEFT "" and [] are None
        if (kind == DVORA_TYPE) != bool(own.get("use_dora", False)):
            raise ValueError(
                f"{OP}: use_dora: expected {kind == DVORA_TYPE} in a file of type {kind}, "
                f"got {own.get('use_dora', False)!r}"
            )
        return cls(**own)


def _names(argument: str, value: Any, regex: bool) -> str | list[str] | None:
    """A list of names, sorted if it was a set; or one string where that means something."""
    if value is None or (regex and isinstance(value, str) and value):
        return value
    if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)):
        alternative = "a non-empty string or " if regex else ""
        raise TypeError(f"{OP}: {argument}: expected {alternative}a list of names, got {value!r}")
    if not all(isinstance(name, str) and name for name in value):
        raise TypeError(f"{OP}: {argument}: expected non-empty names, got {value!r}")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def _numbers(value: Any) -> int | list[int] | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = list(value)
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers):
            return numbers
    raise TypeError(
        f"{OP}: layers_to_transform: expected the number of a layer or a list of them, "
        f"got {value!r}"
    )
