"""What an adapter starts with: its matrices and its vectors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import vera_matrices

from .vera_base import META, base_device, wide_weight
from .vera_config import VeraConfig
from .vera_keys import vector_sizes
from .vera_shared import SharedMatrices
from .vera_targets import base_of


def own_config(op: str, config: Any) -> VeraConfig:
    """PEFT's configuration will do too; ours is copied, so that nobody changes it later."""
    if isinstance(config, VeraConfig):
        return dataclasses.replace(config)
    if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        return VeraConfig.from_dict(config.to_dict())
    raise TypeError(f"{op}: config: expected a VeraConfig, got {type(config).__name__}")


def named(config: VeraConfig, model: nn.Module) -> VeraConfig:
    """With what the model was loaded from, if transformers remembers it."""
    name = config.base_model_name_or_path or model.__dict__.get("name_or_path") or None
    return dataclasses.replace(config, base_model_name_or_path=name)


def new_vectors(
    config: VeraConfig, target: nn.Module, matrices: SharedMatrices
) -> dict[str, Tensor]:
    """lambda_d, lambda_b and magnitude of a layer to start with: the base model's output."""
    dtype = matrices.A.dtype
    base = base_of(target)
    sizes = vector_sizes(config, target)
    options: Any = {"device": base_device(base), "dtype": torch.promote_types(dtype, torch.float32)}
    if config.init_weights:
        vectors = {
            # rounded to float32 first, as PEFT does it over float64 too
            "lambda_d": torch.full((sizes["lambda_d"],), _start(config, matrices)).to(**options),
            "lambda_b": torch.zeros(sizes["lambda_b"], **options),
        }
    else:
        vectors = {
            "lambda_d": torch.randn(sizes["lambda_d"], **options),
            "lambda_b": torch.ones(sizes["lambda_b"], **options),
        }
    if config.use_dora:
        is_meta = options["device"] == META
        vectors["magnitude"] = (
            torch.empty(sizes["magnitude"], **options)
            if is_meta
            else wide_weight(base).norm(dim=1).to(options["dtype"])
        )
    return vectors


def _start(config: VeraConfig, matrices: SharedMatrices) -> float:
    """With what lambda_d starts: the same update, whatever the variance of A and B is."""
    if config.init != "position":
        return config.d_initial
    return config.d_initial * 2 / math.sqrt(matrices.A.numel())


def draw(
    config: VeraConfig, largest: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A and B of the configuration's seed, for layers of at most these inputs and outputs."""
    if device == META:
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        return empty(config.r, largest[0]), empty(largest[1], config.r)
    seed = config.projection_prng_key
    return vera_matrices(
        config.r, *largest, init=config.init, seed=seed, dtype=dtype, device=device
    )


def is_drawn(config: VeraConfig, largest: tuple[int, int], pair: SharedMatrices) -> bool:
    """Whether the configuration's seed gives these matrices."""
    return pair.is_equal(*draw(config, largest, pair.A.dtype, pair.A.device))


def narrowed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """In the base's dtype, if nothing is lost: PEFT writes what it rounded to it in float32."""
    narrow = matrix.to(dtype)
    return narrow if torch.equal(narrow.to(matrix.dtype), matrix) else matrix
