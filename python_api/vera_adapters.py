"""The adapters in a model: what they are for, and how they get in and out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .vera_base import base_device, base_dtype
from .vera_config import VeraConfig
from .vera_keys import PREFIX, VECTORS, AdapterTensors, bias_parameters
from .vera_layer import VeraLayer
from .vera_shared import SharedMatrices
from .vera_start import draw, narrowed
from .vera_state import BASE, Adapter, AdapterState
from .vera_targets import (
    base_of,
    find_targets,
    input_readers,
    largest_sizes,
    lies_in,
    modules_named,
)
from .vera_trained import TrainedModule, trained_copy


class NewAdapter(NamedTuple):
    """All that an adapter brings with it, before the model is touched."""

    config: VeraConfig
    matrices: SharedMatrices
    targets: Mapping[str, nn.Module]
    """path -> layer that it is for"""
    saved: Mapping[str, nn.Module]
    """path -> module that it trains whole"""
    tensors: AdapterTensors


class AdapterSet:
    """All adapters of one model.

    Args:
        model: where they are.
        shared: the matrices that they share, which are registered there.
    """

    def __init__(self, model: nn.Module, shared: nn.ModuleDict) -> None:
        self.model = model
        self.shared = shared
        self.state = AdapterState()

    def layers(self) -> dict[str, VeraLayer]:
        """Path -> layer that some adapter is for."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, VeraLayer)}

    def trained(self) -> dict[str, TrainedModule]:
        """Path -> module that some adapter trains whole."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, TrainedModule)}

    def targets(self, name: str) -> dict[str, VeraLayer]:
        """Path -> layer that an adapter is for."""
        return {path: layer for path, layer in self.layers().items() if name in layer.lambda_d}

    def check_known(self, op: str, argument: str, name: Any) -> None:
        """Refuse a name that no adapter has."""
        if not isinstance(name, str) or name not in self.state.adapters:
            raise ValueError(
                f"{op}: {argument}: expected one of {list(self.state.adapters)}, got {name!r}"
            )

    def check_name(self, op: str, argument: str, name: Any) -> None:
        """Refuse a name that a new adapter cannot have."""
        if not isinstance(name, str) or not name or "." in name or name == BASE:
            raise ValueError(
                f"{op}: {argument}: expected a name without dots that is not {BASE!r}, got {name!r}"
            )
        if any(hasattr(holder(), name) for holder in (nn.ModuleDict, nn.ParameterDict)):
            raise ValueError(
                f"{op}: {argument}: expected a name that is none of torch.nn.Module's, got {name!r}"
            )
        if name in self.state.adapters:
            raise ValueError(
                f"{op}: {argument}: expected a new name, got {name!r}, which is taken; "
                "delete_adapter or rename_adapter first"
            )

    def places(
        self, op: str, name: Any, config: VeraConfig
    ) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """The layers that a new adapter is for, and the modules that it trains whole.

        Raises:
            ValueError: the adapter does not fit the model, or not beside its other adapters.
        """
        self.check_name(op, "adapter_name", name)
        for other_name, (other, _) in self.state.adapters.items():
            are_peft = {config.init, other.init} == {"kaiming_uniform"}
            if are_peft and other.projection_prng_key != config.projection_prng_key:
                raise ValueError(
                    f"{op}: projection_prng_key: expected {other.projection_prng_key}, as of "
                    f"adapter {other_name!r}, because PEFT holds one seed per model; "
                    f"got {config.projection_prng_key}"
                )
            if config.bias != "none" or other.bias != "none":
                raise ValueError(
                    f"{op}: bias: expected 'none' where a model has several adapters, because they "
                    f"share its biases; got {config.bias!r} beside {other.bias!r} of {other_name!r}"
                )
        targets = find_targets(op, self.model, config)
        saved = modules_named(op, self.model, config.modules_to_save or [])
        trained = self.trained()
        whole = {**trained, **saved}
        clashes = [path for path in targets if lies_in(path, whole)]
        clashes += [p for p in self.layers() if p not in clashes and lies_in(p, saved)]
        if clashes:
            raise ValueError(
                f"{op}: target_modules: expected layers outside of the modules that an adapter "
                f"trains whole, got {', '.join(clashes)}; name these modules in the "
                "modules_to_save of all adapters"
            )
        nested = [path for path in whole if lies_in(path, whole.keys() - {path})]
        if nested:
            raise ValueError(
                f"{op}: modules_to_save: expected modules of which none lies within another that "
                f"an adapter trains whole, got {', '.join(nested)}"
            )
        return targets, saved

    def matrices(
        self,
        config: VeraConfig,
        targets: Mapping[str, nn.Module],
        given: tuple[Tensor, Tensor] | None = None,
    ) -> SharedMatrices:
        """Those for a new adapter, drawn or given: a pair that the model has, or another."""
        first = base_of(next(iter(targets.values())))
        dtype, device = base_dtype(first) or torch.float32, base_device(first)
        drawn = functools.partial(draw, config, largest_sizes(targets)) if given is None else None
        if given is None:
            A, B = draw(config, largest_sizes(targets), dtype, device)
        else:
            A, B = (narrowed(matrix, dtype).to(device) for matrix in given)
        for pair in self.pairs():
            if pair.is_equal(A, B):
                return pair
        return SharedMatrices(A, B, config.save_projection, drawn)

    def pairs(self) -> list[SharedMatrices]:
        """All that the adapters share."""
        return [pair for pair in self.shared.values() if isinstance(pair, SharedMatrices)]

    def install(self, name: str, new: NewAdapter, is_trainable: bool) -> None:
        """Put a new adapter in; all that may fail is done before the model is touched."""
        copies = {
            path: trained_copy(path, module, new.tensors.trained.get(path))
            for path, module in new.saved.items()
        }
        if not self.state.adapters:
            self.model.requires_grad_(False)
        self.share(new.matrices, new.config)
        self.state.adapters[name] = Adapter(new.config, new.matrices)
        for path, layer in self.adapt(new.targets).items():
            layer.start(name, new.tensors.vectors[path])
        for path, module in new.saved.items():
            current = self.model.get_submodule(path)
            if not isinstance(current, TrainedModule):
                current = TrainedModule(module, self.state)
                current.train(module.training)
                self.replace(path, current)
                self._be_called(path)
            current.copies[name] = copies[path]
        for path, _, bias in bias_parameters(self.model, new.config, new.targets):
            if path in new.tensors.biases:
                with torch.no_grad():
                    bias.copy_(new.tensors.biases[path])
        for parameter in self.parameters(name):
            parameter.requires_grad_(is_trainable)
        if self.state.active is None:
            self.state.active = name

    def adapt(self, targets: Mapping[str, nn.Module]) -> dict[str, VeraLayer]:
        """Put a layer that takes adapters in the place of each that is none yet."""
        readers, layers = input_readers(targets), {}
        for path, target in targets.items():
            layer = target
            if not isinstance(layer, VeraLayer):
                layer = VeraLayer(target, self.state)
                layer.train(target.training)
                self.replace(path, layer)
                self._be_called(path)
            layer.readers = max(layer.readers, readers[path])
            layers[path] = layer
        return layers

    def _be_called(self, path: str) -> None:
        """Keep PyTorch's encoder, in evaluation, from reading weights past adapters.

        It stays so when they are gone: that costs time alone. The numbers that the encoder gives
        for positions that are masked out are then those of training, no zeros.
        """
        parent = self.model
        for child in path.split("."):
            if isinstance(parent, nn.TransformerEncoderLayer):
                # what its fused kernel has no activation for
                parent.activation_relu_or_gelu = 0
            elif isinstance(parent, nn.TransformerEncoder):
                # nested tensors are for the fused kernel of its layers
                parent.use_nested_tensor = False
            parent = parent.get_submodule(child)

    def share(self, matrices: SharedMatrices, config: VeraConfig) -> None:
        """Register a pair of matrices, if it is not yet.

        Its name in ``state_dict()`` says what it is, such as ``r8_position_0_768x3072``: rank,
        init, seed, inputs and outputs, whatever was added or deleted before it. Only where a file
        brought others of the same name a number follows, ``_2``.
        """
        if any(matrices is pair for pair in self.pairs()):
            return
        sizes = f"{matrices.A.shape[1]}x{matrices.B.shape[0]}"
        name = f"r{config.r}_{config.init}_{config.projection_prng_key}_{sizes}"
        numbers = (f"_{i}" for i in itertools.count(2))
        ends = itertools.chain([""], numbers)
        self.shared[next(name + end for end in ends if name + end not in self.shared)] = matrices

    def remove(self, name: str) -> None:
        """Take an adapter out, and the matrices that no other has, and no pool.

        Biases that it trained belong to the model: they stay as they are, frozen.
        """
        for parameter in self.parameters(name):
            parameter.requires_grad_(False)
        for layer in self.layers().values():
            layer.remove(name)
        for path, module in self.trained().items():
            module.remove(name)
            if not module.copies:
                self.replace(path, module.original_module)
        del self.state.adapters[name]
        if self.state.active == name:
            self.state.active = None
        used = {id(adapter.matrices) for adapter in self.state.adapters.values()}
        for key, pair in list(self.shared.items()):
            if id(pair) not in used and not (isinstance(pair, SharedMatrices) and pair.pools):
                del self.shared[key]

    def rename(self, name: str, new_name: str) -> None:
        """Its parameters stay the same objects."""
        for layer in self.layers().values():
            layer.rename(name, new_name)
        for module in self.trained().values():
            module.rename(name, new_name)
        self.state.adapters = {
            new_name if key == name else key: value for key, value in self.state.adapters.items()
        }
        if self.state.active == name:
            self.state.active = new_name

    def parameters(self, name: str) -> list[nn.Parameter]:
        """All that an adapter trains."""
        config = self.state.adapters[name].config
        targets = self.targets(name)
        found = [v for layer in targets.values() for v in layer.vectors(name).values()]
        for module in self.trained().values():
            if name in module.copies:
                found += module.copies[name].parameters()
        return [*found, *(bias for *_, bias in bias_parameters(self.model, config, targets))]

    def tensors(self, name: str, *, vectors: bool) -> dict[str, Tensor]:
        """Of an adapter, by PEFT's names: biases and modules trained whole, perhaps vectors too."""
        config, targets = self.state.adapters[name].config, self.targets(name)
        tensors: dict[str, Tensor] = {
            f"{PREFIX}{path}.{key}": value
            for path, module in self.trained().items()
            if name in module.copies
            for key, value in module.copies[name].state_dict().items()
        }
        for _, key, bias in bias_parameters(self.model, config, targets):
            tensors.setdefault(key, bias)
        if vectors:
            for path, layer in targets.items():
                for key, vector in layer.vectors(name).items():
                    tensors[f"{PREFIX}{path}.{VECTORS[key]}"] = vector
        return tensors

    def replace(self, path: str, module: nn.Module) -> None:
        """Put another module in a place of the model."""
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)
