"""Which modules of a model an adapter is for: PEFT's rules."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .vera_base import is_conv1d, is_linear, linear_sizes
from .vera_config import VeraConfig
from .vera_layer import VeraLayer
from .vera_trained import TrainedModule

ALL_LINEAR = "all-linear"
CLASSIFIERS = ("classifier", "score")
HEADS = {
    "SEQ_CLS": CLASSIFIERS,
    "TOKEN_CLS": CLASSIFIERS,
    "QUESTION_ANS": ("qa_outputs",),
}
"""What transformers calls the last layer for a task: PEFT trains it whole."""
SHORTENED = 20
"""From so many linear layers PEFT shortens their paths to last names, to which, but not to whole
paths, ``layers_to_transform`` applies."""
ORIGINAL = "original_module"
"""What a module that an adapter trains whole is called in what stands in its place."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward."""
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
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        found = _all_linear(model, candidates, config.task_type)
        if len(found) >= SHORTENED:
            found = {n: m for n, m in found.items() if "." not in n or _transformed(op, n, config)}
    elif isinstance(wanted, str):
        pattern = _compiled(op, "target_modules", wanted)
        found = {name: m for name, m in candidates.items() if pattern.fullmatch(name)}
    else:
        found = {name: m for name, m in candidates.items() if _ends_in(name, wanted)}
        missing = [name for name in wanted if not any(_ends_in(path, [name]) for path in found)]
        if missing:
            place = "of the model outside of modules_to_save" if saved else "of the model"
            raise ValueError(
                f"{op}: target_modules: expected names of modules {place}, got "
                f"{missing}; linear layers here end in {_some(_last_names(modules))}"
            )
        own = {n: m for n, m in found.items() if n in wanted or _transformed(op, n, config)}
        if found and not own:
            raise ValueError(
                f"{op}: layers_to_transform: expected numbers of layers that have "
                f"{', '.join(wanted)}, got {config.layers_to_transform} of {_some(list(found))}"
            )
        found = own
    others = [name for name, m in found.items() if not _is_target(name, m, modules)]
    if others:
        kinds = _some([f"{name} ({type(found[name]).__name__})" for name in others])
        raise ValueError(f"{op}: target_modules: expected linear layers, got {kinds}")
    if not found:
        is_pattern = isinstance(wanted, str) and wanted.lower() != ALL_LINEAR
        hint = f" (a regular expression for whole paths; [{wanted!r}] is a name)" * is_pattern
        raise ValueError(
            f"{op}: target_modules: expected to fit at least one linear layer, got {wanted!r}{hint}"
            f"; linear layers here end in {_some(_last_names(modules))}"
        )
    return found


def _is_target(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it is a linear layer, adapted or not, and one that is called."""
    if _is_read(path, modules) or linear_sizes(base_of(module)) is None:
        return False
    return isinstance(module, VeraLayer) or is_linear(module)


def _is_read(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether PyTorch's attention reads its weight, so that an adapter would have no effect."""
    return isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def largest_sizes(targets: Mapping[str, nn.Module]) -> tuple[int, int]:
    """The most inputs and the most outputs of any: the sizes of A and B."""
    sizes = [linear_sizes(base_of(module)) for module in targets.values()]
    return max(size[0] for size in sizes if size), max(size[1] for size in sizes if size)


def input_readers(targets: Mapping[str, nn.Module]) -> dict[str, int]:
    """Path -> how many siblings have as many inputs: query, key and value may read the same."""
    families: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, module in targets.items():
        sizes = linear_sizes(base_of(module))
        assert sizes is not None
        families[name.rpartition(".")[0], sizes[0]].append(name)
    return {name: len(family) for family in families.values() for name in family}


def modules_named(op: str, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Path -> module, of those whose path ends in one of the names, outermost first.

    As in PEFT, ``"classifier"`` is the end of ``"aux_classifier"`` too.
    """
    modules = _own_modules(model)
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if path.endswith(tuple(names)) and not lies_in(path, found):
            found[path] = module
    missing = [name for name in names if not any(path.endswith(name) for path in modules)]
    if missing:
        raise ValueError(
            f"{op}: modules_to_save: expected names of modules of the model, got {missing}"
        )
    others = [path for path, module in found.items() if isinstance(module, CONTAINERS)]
    others += [path for path in found if _is_read(path, modules)]
    if others:
        kinds = _some([f"{path} ({type(found[path]).__name__})" for path in others])
        raise ValueError(
            f"{op}: modules_to_save: expected modules that are called, got {kinds}, of which the "
            "modules or weights within are used instead"
        )
    return found


def with_head(model: nn.Module, config: VeraConfig) -> VeraConfig:
    """The last layer that the task is named for is trained whole: PEFT's rule."""
    given = config.modules_to_save or []
    names = [n for n in HEADS.get(config.task_type or "", ()) if n not in given]
    names = [name for name in names if any(path.endswith(name) for path in _own_modules(model))]
    return dataclasses.replace(config, modules_to_save=[*given, *names] or None)


def with_present_names(model: nn.Module, config: VeraConfig) -> VeraConfig:
    """Without the names that fit no module that is left to them: PEFT's files may list some.

    It lists all names that a classifier might have, and as targets of ``"all-linear"`` layers of
    modules that are trained whole. Of targets one at least must be there.
    """
    paths = list(_own_modules(model))
    saved = [n for n in config.modules_to_save or [] if any(path.endswith(n) for path in paths)]
    wanted = config.target_modules
    if wanted is not None and not isinstance(wanted, str):
        left = [path for path in paths if not _matches_part(path, saved)]
        wanted = [n for n in wanted if any(_ends_in(path, [n]) for path in left)] or wanted
    return dataclasses.replace(config, target_modules=wanted, modules_to_save=saved or None)


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


def _all_linear(
    model: nn.Module, modules: Mapping[str, nn.Module], task: str | None
) -> dict[str, nn.Module]:
    """All but the layer that gives words; a classifier's last one too, if that is the task."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and task == "SEQ_CLS":
        names = [name for name in reversed(CLASSIFIERS) if getattr(model, name, None) is not None]
        head = getattr(model, names[0]) if names else None
    return {
        name: module
        for name, module in modules.items()
        if (isinstance(base_of(module), nn.Linear) or is_conv1d(base_of(module)))
        and _is_target(name, module, modules)
        and not (head is not None and base_of(module) is base_of(head))
    }


def _transformed(op: str, path: str, config: VeraConfig) -> bool:
    """Whether the number of the layer that a path leads through is one of the configuration's."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern
    if not patterns:
        # the first number, but not at the outermost
        regexes = [r".*?\.[^.]*\.(?P<number>\d+)\."]
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        regexes = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns]
    for regex in regexes:
        match = _compiled(op, "layers_pattern", regex).match(path)
        if match:
            number = int(match["number"])
            return number == wanted if isinstance(wanted, int) else number in wanted
    return False


def _compiled(op: str, argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{op}: {argument}: expected a regular expression, got {pattern!r}: {error}"
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
