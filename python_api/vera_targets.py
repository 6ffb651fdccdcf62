"""Which modules of a model an adapter is for: PEFT's rules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .vera_base import is_conv1d, linear_sizes
from .vera_config import VeraConfig
from .vera_layer import VeraLayer
from .vera_trained import TrainedModule

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier", "qa_outputs")
"""What transformers calls the last layer of a classifier."""
ORIGINAL = "original_module"
"""What a module that an adapter trains whole is called in what stands in its place."""
LISTED = 12
"""Names of modules that an error lists."""


def find_targets(op: str, model: nn.Module, config: VeraConfig) -> dict[str, nn.Module]:
    """Path -> module, for the linear layers (adapted ones, or not yet) that a configuration names.

    Raises:
        ValueError: a name fits no module, or what it fits is no linear layer.
    """
    modules = _own_modules(model)
    wanted = config.target_modules
    if wanted is None:
        raise ValueError(
            f"{op}: target_modules: expected names, a regular expression or {ALL_LINEAR!r}, got "
            f"None; linear layers here end in {_some(_last_names(modules))}"
        )
    saved = config.modules_to_save or []
    candidates = {
        name: module for name, module in modules.items() if not _matches_part(name, saved)
    }
    if wanted == ALL_LINEAR:
        found = _all_linear(model, candidates)
    elif isinstance(wanted, str):
        pattern = _compiled(op, wanted)
        found = {name: m for name, m in candidates.items() if pattern.fullmatch(name)}
    else:
        found = {name: m for name, m in candidates.items() if _ends_in(name, wanted)}
        missing = [name for name in wanted if not any(_ends_in(path, [name]) for path in found)]
        if missing:
            raise ValueError(
                f"{op}: target_modules: expected names of modules of the model, got "
                f"{missing}; linear layers here end in {_some(_last_names(modules))}"
            )
        found = {name: m for name, m in found.items() if _is_transformed(op, name, config)}
    others = [name for name, module in found.items() if linear_sizes(base_of(module)) is None]
    if isinstance(wanted, str):  # a pattern may fit more than what it is meant for, as in PEFT
        found = {name: module for name, module in found.items() if name not in others}
    elif others:
        kinds = ", ".join(f"{name} ({type(found[name]).__name__})" for name in others[:LISTED])
        raise ValueError(f"{op}: target_modules: expected linear layers, got {kinds}")
    if not found:
        raise ValueError(
            f"{op}: target_modules: expected to fit at least one linear layer, got {wanted!r}; "
            f"linear layers here end in {_some(_last_names(modules))}"
        )
    return found


def largest_sizes(targets: Mapping[str, nn.Module]) -> tuple[int, int]:
    """The most inputs and the most outputs of any: the sizes of A and B."""
    sizes = [linear_sizes(base_of(module)) for module in targets.values()]
    return max(size[0] for size in sizes if size), max(size[1] for size in sizes if size)


def input_sharers(targets: Mapping[str, nn.Module]) -> set[str]:
    """Those with a sibling of as many inputs, which may read the same one: query, key and value."""
    families: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, module in targets.items():
        sizes = linear_sizes(base_of(module))
        assert sizes is not None
        families[name.rpartition(".")[0], sizes[0]].append(name)
    return {name for family in families.values() if len(family) > 1 for name in family}


def modules_named(op: str, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Path -> module, of those whose path is or ends in one of the names, outermost first."""
    modules = _own_modules(model)
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if _ends_in(path, names) and not lies_in(path, found):
            found[path] = module
    missing = [name for name in names if not any(_ends_in(path, [name]) for path in modules)]
    if missing:
        raise ValueError(
            f"{op}: modules_to_save: expected names of modules of the model, got {missing}"
        )
    return found


def has_module(model: nn.Module, name: str) -> bool:
    """Whether the path of a module is the name, or ends in it."""
    return any(_ends_in(path, [name]) for path in _own_modules(model))


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of the model as it was; an adapted layer stands for what it holds."""
    found: dict[str, nn.Module] = {}
    hidden: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (hidden and name.startswith(hidden)):
            continue
        if isinstance(module, VeraLayer):
            hidden += (f"{name}.",)
        elif isinstance(module, TrainedModule):
            hidden += (f"{name}.copies",)
            module = module.original_module
        found[name.replace(f".{ORIGINAL}", "")] = module
    return found


def base_of(module: nn.Module) -> nn.Module:
    """The linear layer itself, adapted or not."""
    return module.base_layer if isinstance(module, VeraLayer) else module


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [output] if output is not None else [getattr(model, name, None) for name in HEADS]
    return {
        name: module
        for name, module in modules.items()
        if (isinstance(base_of(module), nn.Linear) or is_conv1d(base_of(module)))
        and not any(head is not None and base_of(module) is base_of(head) for head in heads)
    }


def _is_transformed(op: str, path: str, config: VeraConfig) -> bool:
    """Whether the number of the layer that a path leads through is one of the configuration's."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        match = _compiled(op, rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\..*").match(path)
        if match:
            number = int(match["number"])
            return number == wanted if isinstance(wanted, int) else number in wanted
    return False


def _compiled(op: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{op}: target_modules: expected a regular expression, got {pattern!r}: {error}"
        ) from error


def _ends_in(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _matches_part(path: str, names: Sequence[str]) -> bool:
    """Whether a module is called one of these, or lies within one that is."""
    return any(re.search(rf"(^|\.){re.escape(name)}($|\.)", path) for name in names)


def lies_in(path: str, outer: Iterable[str]) -> bool:
    """Whether a module is, or lies within, one of these paths."""
    return any(path == other or path.startswith(f"{other}.") for other in outer)


def _last_names(modules: Mapping[str, nn.Module]) -> list[str]:
    linear = (n for n, m in modules.items() if linear_sizes(base_of(m)) is not None)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:LISTED]) or "(there are none)"
    return listed + (", …" if len(names) > LISTED else "")
