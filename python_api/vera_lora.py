"""A VeRA adapter as the LoRA adapter that it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .vera_base import is_conv1d
from .vera_config import VeraConfig
from .vera_file import whole
from .vera_keys import PREFIX
from .vera_layer import VeraLayer


def lora_adapter(
    config: VeraConfig, name: str, model: nn.Module, layers: Mapping[str, VeraLayer]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the factors, in PEFT's names.

        lora_A = diag(d) A,    lora_B = diag(b) B,    scaling 1

    DVoRA is DoRA with these, and its magnitudes.
    """
    fields = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.r,
        "lora_dropout": config.vera_dropout,
        "target_modules": _targets(model, layers),
        "use_dora": config.use_dora,
        "fan_in_fan_out": any(is_conv1d(layer.base_layer) for layer in layers.values()),
        "bias": {"vera_only": "lora_only"}.get(config.bias, config.bias),
        "modules_to_save": config.modules_to_save,
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
    }
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        matrices = layer.state.adapters[name].matrices
        vectors = layer.vectors(name)
        d, b = whole(vectors["lambda_d"]), whole(vectors["lambda_b"])
        A, B = matrices.on(d.device, d.dtype)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = d.unsqueeze(1) * A[:, : layer.in_features]
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.unsqueeze(1) * B[: layer.out_features]
        if config.use_dora:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = vectors["magnitude"]
    return fields, tensors


def _targets(model: nn.Module, layers: Mapping[str, VeraLayer]) -> list[str] | str:
    """Their paths; where others end in one of these, which PEFT would take too, an expression."""
    paths = [path for path, _ in model.named_modules() if path not in layers]
    if any(other.endswith(f".{path}") for other in paths for path in layers):
        return "|".join(re.escape(path) for path in layers)
    return list(layers)
