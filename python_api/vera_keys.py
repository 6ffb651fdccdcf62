"""The names that an adapter's tensors have in PEFT's files, and what a file must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .vera_base import base_dtype, linear_sizes
from .vera_config import VeraConfig
from .vera_layer import VeraLayer
from .vera_targets import base_of, lies_in
from .vera_trained import TrainedModule

PREFIX = "base_model.model."
A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"
VECTORS = {
    "lambda_d": "vera_lambda_d",
    "lambda_b": "vera_lambda_b",
    "magnitude": "vera_magnitude",
}
"""In the layers, and in the files."""
REPEATED = (".modules_to_save.", ".original_module.")
"""Under which PEFT writes the biases of modules that are trained whole once more."""


class AdapterTensors(NamedTuple):
    """What a file holds, sorted by what it is for."""

    vectors: dict[str, dict[str, Tensor]]
    """path of a layer -> lambda_d, lambda_b and magnitude"""
    trained: dict[str, dict[str, Tensor]]
    """path of a module that is trained whole -> its state"""
    biases: dict[str, Tensor]
    """path in the base model -> (n)"""
    matrices: tuple[Tensor, Tensor] | None = None


def vector_sizes(config: VeraConfig, target: nn.Module) -> dict[str, int]:
    """Of a layer's vectors."""
    sizes = linear_sizes(base_of(target))
    assert sizes is not None
    plain = {"lambda_d": config.r, "lambda_b": sizes[1]}
    return {**plain, "magnitude": sizes[1]} if config.use_dora else plain


def bias_parameters(
    model: nn.Module, config: VeraConfig, targets: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(path without wrappers, key in a file, parameter) of the biases that are trained too."""
    if config.bias == "none":
        return
    whole = [name for name, m in model.named_modules() if isinstance(m, TrainedModule)]
    modules = ((name, m) for name, m in model.named_modules() if not isinstance(m, VeraLayer))
    for name, module in modules:
        bias = module._parameters.get("bias")
        path = name.removesuffix(".base_layer")
        is_other = config.bias == "vera_only" and path not in targets
        if bias is None or is_other or lies_in(name, whole):
            continue
        own = [path, "base_layer"] if path in targets else [path] if path else []
        yield f"{path}.bias", PREFIX + ".".join([*own, "bias"]), bias


def sorted_tensors(
    op: str,
    source: str,
    model: nn.Module,
    config: VeraConfig,
    targets: Mapping[str, nn.Module],
    saved: Mapping[str, nn.Module],
    largest: tuple[int, int],
    tensors: Mapping[str, Tensor],
) -> AdapterTensors:
    """The tensors of a file, if they are all that the adapter needs, in the right shapes.

    Raises:
        ValueError: some are missing, unknown, or of another shape; the message names them all.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    vectors: dict[str, dict[str, Tensor]] = {path: {} for path in targets}
    trained: dict[str, dict[str, Tensor]] = {path: {} for path in saved}
    places: list[tuple[str, dict[str, Tensor], str]] = []
    not_floating: set[str] = set()
    for path, target in targets.items():
        for name, size in vector_sizes(config, target).items():
            key = f"{PREFIX}{path}.{VECTORS[name]}"
            wanted[key] = (size,)
            places.append((key, vectors[path], name))
    for path, module in saved.items():
        original = module.original_module if isinstance(module, TrainedModule) else module
        for name, value in original.state_dict().items():
            key = f"{PREFIX}{path}.{name}"
            wanted[key] = tuple(value.shape)
            places.append((key, trained[path], name))
            if not value.dtype.is_floating_point:  # a count, say
                not_floating.add(key)
    biases: dict[str, Tensor] = {}
    for path, key, bias in bias_parameters(model, config, targets):
        if key not in wanted:
            wanted[key] = tuple(bias.shape)
            places.append((key, biases, path))
    missing = [key for key in wanted if key not in tensors]
    unknown = [
        key
        for key in tensors
        if key not in wanted
        and key not in (A_KEY, B_KEY)
        and not (config.bias == "all" and any(part in key for part in REPEATED))
    ]
    kinds = [
        f"{key} {tensors[key].dtype}"
        for key in (*wanted, A_KEY, B_KEY)
        if key in tensors and key not in not_floating and not tensors[key].dtype.is_floating_point
    ]
    shapes = [
        f"{key} {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in wanted.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    shapes += _misshapen(config.r, largest, tensors)
    given = [key for key in (A_KEY, B_KEY) if key in tensors]
    if config.save_projection or len(given) == 1:
        missing += [key for key in (A_KEY, B_KEY) if key not in tensors]
    problems = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": shapes,
        "of no floating dtype": kinds,
    }
    if any(problems.values()):
        parts = [f"{word}: {', '.join(keys)}" for word, keys in problems.items() if keys]
        raise ValueError(
            f"{op}: path: expected the adapter of this model in {source}, got tensors that do not "
            f"fit ({'; '.join(parts)}); nothing was loaded"
        )
    for key, place, name in places:
        place[name] = tensors[key]
    for path, target in targets.items():  # trained in float32 however they were saved
        dtype = torch.promote_types(base_dtype(base_of(target)) or torch.float32, torch.float32)
        vectors[path] = {name: vector.to(dtype) for name, vector in vectors[path].items()}
    matrices = (tensors[A_KEY], tensors[B_KEY]) if given else None
    return AdapterTensors(vectors, trained, biases, matrices)


def _misshapen(rank: int, largest: tuple[int, int], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The shared matrices may be larger than what the layers take."""
    inputs, outputs = largest
    for key, dim, least in ((A_KEY, 1, inputs), (B_KEY, 0, outputs)):
        shape = tuple(tensors[key].shape) if key in tensors else None
        if shape is not None and (len(shape) != 2 or shape[1 - dim] != rank or shape[dim] < least):
            fitting = f"({rank}, >= {least})" if dim else f"(>= {least}, {rank})"
            yield f"{key} {shape}, not {fitting}"
