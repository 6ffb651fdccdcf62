"""A model with VeRA and DVoRA adapters: training, files, and an adapter for every row."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from .vera_adapters import AdapterSet, NewAdapter
from .vera_backward import remember
from .vera_base import base_device
from .vera_config import VeraConfig
from .vera_file import INIT, read_adapter, write_adapter
from .vera_keys import A_KEY, B_KEY, AdapterTensors, sorted_tensors
from .vera_layer import VeraLayer
from .vera_lora import lora_adapter
from .vera_merge import MergedAdapter, check_whole
from .vera_signature import class_for
from .vera_start import is_drawn, named, new_vectors, own_config
from .vera_state import BASE, NamedRows, check_names
from .vera_targets import largest_sizes, with_head, with_present_names

OP = "VeraModel"

OF_PEFT = {
    "active_adapters": "one is active: active_adapter",
    "add_weighted_adapter": "give the rows of a batch their adapters by adapter_names",
    "disable_adapter_layers": "with model.disable_adapter(): or set_adapter(None)",
    "disable_adapters": "with model.disable_adapter(): or set_adapter(None)",
    "enable_adapter_layers": "set_adapter(name)",
    "enable_adapters": "set_adapter(name)",
    "get_adapter_state_dict": "save_pretrained(folder) writes it",
    "get_base_model": "the model itself is model.model",
    "get_nb_trainable_parameters": "print_trainable_parameters(), or sum over parameters()",
    "merge_adapter": "here it is merge()",
    "peft_config": "adapters maps names to configurations",
    "push_to_hub": "save_pretrained(folder), and upload the folder",
    "unload": "delete_adapter, or merge_and_unload",
    "unmerge_adapter": "here it is unmerge()",
}
"""What PEFT's models have under other names; the model's own of these names would mislead."""


def get_vera_model(
    model: nn.Module, config: VeraConfig, adapter_name: str = "default"
) -> VeraModel:
    """Freeze a model and put a VeRA adapter into its linear layers, in place.

    Args:
        model: any module with linear layers.
        config: :class:`VeraConfig`, or PEFT's.
        adapter_name: what the adapter is called.

    Returns:
        A :class:`VeraModel`, which is called as the model is.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the configuration does not fit the model, which is then as it was.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import VeraConfig, get_vera_model
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model = get_vera_model(mlp, VeraConfig(r=8, target_modules="all-linear"))
        >>> model(torch.randn(5, 12)).shape
        torch.Size([5, 4])
        >>> model.print_trainable_parameters()
        trainable parameters: 52 of 600 (8.667 %)
    """
    adapted = VeraModel(model)
    adapted.add_adapter(adapter_name, config)
    return adapted


class VeraModel(nn.Module):
    """A model whose linear layers have VeRA adapters: one for all rows of a batch, or one for each.

    It is called as the model is, and has its attributes. ``adapter_names`` gives every row of the
    batch an adapter of its own, ``"__base__"`` being none, in training too:

        model(inputs, adapter_names=["a", "b", "__base__", "a"])

    Args:
        model: any module; without an adapter it is left as it is. See :func:`get_vera_model` and
            :meth:`from_pretrained`.

    Numerics:
        Adapters multiply in the dtype of their layer's input (or autocast's) with vectors in
        float32, whose gradients are summed in float32; PEFT casts all to float32 over half types.

    Example:
        >>> import tempfile, torch
        >>> from fmkernels.api import VeraConfig, VeraModel, get_vera_model
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model = get_vera_model(mlp, VeraConfig(r=8, target_modules=["0"]))
        >>> model.add_adapter("second", VeraConfig(r=4, target_modules=["0", "2"]))
        >>> y = model(torch.randn(3, 12), adapter_names=["second", "__base__", "default"])
        >>> folder = tempfile.mkdtemp()
        >>> model.save_pretrained(folder, "second")  # PEFT reads it
        >>> model.delete_adapter("second")
        >>> model.load_adapter(folder, "again")
        >>> model.set_adapter("again")
    """

    _hf_peft_config_loaded = True
    """What transformers' Trainer asks before it trains over quantised layers."""

    def __new__(cls, model: nn.Module) -> VeraModel:
        """Of a class whose ``forward`` has the model's signature: Trainer reads labels from it."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"{OP}: model: expected a torch.nn.Module, got {type(model).__name__}")
        return object.__new__(class_for(VeraModel, type(model)))

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _check_bare(model)
        self.model = model
        self.shared = nn.ModuleDict()
        self._adapters = AdapterSet(model, self.shared)
        self._merged: MergedAdapter | None = None

    # calling

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the model gives, with the active adapter, or with one for every row."""
        state = self._adapters.state
        rows = None
        if adapter_names is not None:
            rows = self._rows(OP, adapter_names, (args, kwargs))
        if is_compiling():
            before, state.rows = state.rows, state.rows if rows is None else rows
            try:
                return self.model(*args, **kwargs)
            finally:
                state.rows = before
        with state.using(rows) as choice:
            output = self.model(*args, **kwargs)
            if torch.is_grad_enabled():
                remember(output, state, *choice)
        return output

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's own ``generate``, with an adapter for every sequence if names are given."""
        rows = None
        if adapter_names is not None:
            rows = self._rows(f"{OP}.generate", adapter_names, (args, kwargs))
        with self._adapters.state.using(rows):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def _rows(self, op: str, names: Sequence[str], inputs: Any) -> NamedRows:
        check_names(op, names, inputs)
        self._check_unmerged(op)
        if self._adapters.state.is_disabled:
            raise ValueError(
                f"{op}: adapter_names: expected None within disable_adapter(), got {names!r}"
            )
        known = [BASE, *self.adapters]
        rows = [i for i, name in enumerate(names) if name not in known]
        if rows:
            raise ValueError(
                f"{op}: adapter_names: expected some of {known}, got {names[rows[0]]!r} in row "
                f"{rows[0]}"
            )
        device = next((pair.A.device for pair in self._adapters.pairs()), torch.device("cpu"))
        return NamedRows(names, self._adapters.state, device)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the model is the base model, but for biases that an adapter trains."""
        self._check_unmerged(f"{OP}.disable_adapter")
        state = self._adapters.state
        before, state.is_disabled = state.is_disabled, True
        try:
            yield
        finally:
            state.is_disabled = before

    # adapters

    @property
    def adapters(self) -> Mapping[str, VeraConfig]:
        """name -> configuration."""
        return {name: adapter.config for name, adapter in self._adapters.state.adapters.items()}

    @property
    def active_adapter(self) -> str | None:
        """The adapter of all rows where no ``adapter_names`` are given; None is the base model."""
        return self._adapters.state.active

    def set_adapter(self, adapter_name: str | None) -> None:
        """Let calls without ``adapter_names`` take this adapter; None for none."""
        op = f"{OP}.set_adapter"
        self._check_unmerged(op)
        if adapter_name is not None:
            self._adapters.check_known(op, "adapter_name", adapter_name)
        self._adapters.state.active = adapter_name

    def add_adapter(self, adapter_name: str, config: VeraConfig) -> None:
        """Add a new adapter, trainable; the first becomes the active one.

        Raises:
            TypeError: ``config`` is no VeRA configuration.
            ValueError: the name is taken, or the configuration does not fit the model; nothing is
                changed.
        """
        op = f"{OP}.add_adapter"
        config = with_head(self.model, named(own_config(op, config), self.model))
        self._check_unmerged(op)
        targets, saved = self._adapters.places(op, adapter_name, config)
        matrices = self._adapters.matrices(config, targets)
        vectors = {path: new_vectors(config, target, matrices) for path, target in targets.items()}
        tensors = AdapterTensors(vectors, {}, {})
        self._install(adapter_name, NewAdapter(config, matrices, targets, saved, tensors), True)

    def load_adapter(
        self, path: str | PathLike[str], adapter_name: str, *, is_trainable: bool = False
    ) -> None:
        """Add an adapter from a folder that :meth:`save_pretrained`, or PEFT's, wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: safetensors is not installed.
            ValueError: a file is damaged, or does not fit the model; nothing is changed.
        """
        op = f"{OP}.load_adapter"
        self._check_unmerged(op)
        config, held = read_adapter(op, path)
        config = with_present_names(self.model, config)
        targets, saved = self._adapters.places(op, adapter_name, config)
        largest = largest_sizes(targets)
        tensors = sorted_tensors(op, str(path), self.model, config, targets, saved, largest, held)
        matrices = self._adapters.matrices(config, targets, tensors.matrices)
        new = NewAdapter(config, matrices, targets, saved, tensors)
        self._install(adapter_name, new, is_trainable)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | PathLike[str],
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
    ) -> VeraModel:
        """Put an adapter from a folder, which PEFT may have written, into a model.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: safetensors is not installed.
            ValueError: a file is damaged, or does not fit the model, which is then as it was.
        """
        adapted = cls(model)
        adapted.load_adapter(path, adapter_name, is_trainable=is_trainable)
        return adapted

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away; if it was active, the model is the base model.

        Biases that it trained belong to the model: they stay as they are, frozen.
        """
        op = f"{OP}.delete_adapter"
        self._check_unmerged(op)
        self._adapters.check_known(op, "adapter_name", adapter_name)
        self._adapters.remove(adapter_name)

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Call an adapter by another name; its parameters stay the same objects."""
        op = f"{OP}.rename_adapter"
        self._check_unmerged(op)
        self._adapters.check_known(op, "adapter_name", adapter_name)
        self._adapters.check_name(op, "new_name", new_name)
        self._adapters.rename(adapter_name, new_name)

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """All that an adapter trains, for an optimizer."""
        self._named(f"{OP}.adapter_parameters", adapter_name)
        return self._adapters.parameters(adapter_name)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        parameters = list(self.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        share = 100 * trained / max(total, 1)
        print(f"trainable parameters: {trained:,} of {total:,} ({share:.3f} %)")

    # files

    def save_pretrained(
        self,
        path: str | PathLike[str],
        adapter_name: str | None = None,
        *,
        save_projection: bool | None = None,
    ) -> None:
        """Write an adapter into a folder, in PEFT's format.

        Of a model that is sharded (FSDP2) on all ranks: each gathers it, and writes the same.

        PEFT reads what is of type VERA. It refuses DVoRA, which it cannot compute (write that with
        :meth:`to_lora`), and matrices that are not saved and that it would draw otherwise.

        Args:
            path: the folder; it is made if it is not there.
            adapter_name: which; by default the active one.
            save_projection: whether A and B are written; by default what the configuration says.
                Without them a checkpoint is a seed and two vectors for each layer.

        Raises:
            ImportError: safetensors is not installed.
            OSError: they cannot be written; a file that was there is then as it was.
            ValueError: there is no such adapter, or its matrices are not those of its seed.
        """
        op = f"{OP}.save_pretrained"
        name = self._named(op, adapter_name)
        config, matrices = self._adapters.state.adapters[name]
        if save_projection is not None:
            config = dataclasses.replace(config, save_projection=save_projection)
        tensors = self._adapters.tensors(name, vectors=True)
        if config.save_projection:
            dtype = torch.promote_types(matrices.A.dtype, torch.float32)
            tensors |= {A_KEY: matrices.A.to(dtype), B_KEY: matrices.B.to(dtype)}
        elif not is_drawn(config, largest_sizes(self._adapters.targets(name)), matrices):
            raise ValueError(
                f"{op}: save_projection: expected True, because the matrices of {name!r} are not "
                f"those of seed {config.projection_prng_key}; got False"
            )
        write_adapter(op, path, config.to_dict(), tensors, {INIT: config.init})

    def to_lora(self, path: str | PathLike[str], adapter_name: str | None = None) -> None:
        """Write the same adapter as LoRA (DVoRA as DoRA), which PEFT and others load: exact.

        With lora_A = diag(d) A and lora_B = diag(b) B, of rank r.

        Raises:
            ImportError: safetensors is not installed.
            OSError: it cannot be written.
            ValueError: there is no such adapter.
        """
        op = f"{OP}.to_lora"
        name = self._named(op, adapter_name)
        config = self._adapters.state.adapters[name].config
        fields, factors = lora_adapter(config, name, self.model, self._adapters.targets(name))
        others = self._adapters.tensors(name, vectors=False)
        write_adapter(op, path, fields, {**others, **factors})

    # merging

    def merge(self, adapter_name: str | None = None) -> None:
        """Add an adapter to the base weights, so that it costs nothing; the originals are kept.

        Over half-precision weights what is smaller than their spacing is rounded away.

        Raises:
            ValueError: there is no such adapter, another is merged, a base weight is quantised or
                sharded, or a merged weight would not be finite; nothing is changed.
        """
        op = f"{OP}.merge"
        self._check_unmerged(op)
        if self._adapters.state.is_disabled:
            raise ValueError(f"{op}: expected adapters in use, got a call within disable_adapter()")
        check_whole(op, self)
        name = self._named(op, adapter_name)
        state = self._adapters.state
        self._merged = MergedAdapter.of(op, name, state.active, self._adapters.targets(name))
        state.active = name

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit, and the adapters that were unloaded.

        Raises:
            ValueError: nothing is merged, or others were put into the unloaded model's layers.
        """
        op = f"{OP}.unmerge"
        merged = self._merged
        if merged is None:
            raise ValueError(f"{op}: expected a merged adapter, got none")
        for path, (_, left) in merged.unloaded.items():
            if self.model.get_submodule(path) is not left:
                raise ValueError(
                    f"{op}: expected the model that merge_and_unload left, got "
                    f"{type(self.model.get_submodule(path)).__name__} in {path}"
                )
        for path, (module, left) in merged.unloaded.items():
            module.train(left.training)
            module.to(base_device(left))
            self._adapters.replace(path, module)
        merged.undo()
        self._adapters.state.active = merged.active
        self._merged = None

    def merge_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """The model itself, without adapters, with one of them merged into its weights."""
        if self._merged is None:
            self.merge(adapter_name)
        merged = self._merged
        assert merged is not None
        if adapter_name not in (None, merged.name):
            raise ValueError(
                f"{OP}.merge_and_unload: adapter_name: expected {merged.name!r}, which is merged, "
                f"got {adapter_name!r}"
            )
        places: dict[str, tuple[nn.Module, nn.Module]] = {
            path: (layer, layer.base_layer) for path, layer in self._adapters.layers().items()
        }
        for path, module in self._adapters.trained().items():
            places[path] = module, module.of(merged.name)
        for path, (_, left) in places.items():
            self._adapters.replace(path, left)
        merged.unloaded |= places
        return self.model

    # within

    def __getattr__(self, name: str) -> Any:
        """Those of the model, for what transformers' tools look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
        if name in OF_PEFT:
            raise AttributeError(f"{OP} has no attribute {name!r}; {OF_PEFT[name]}")
        return getattr(self.model, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Parameters that are tied have the name of the first alone, as in safetensors' files.

        Raises:
            ValueError: an adapter is merged; loaded into another model it would be there twice.
        """
        self._check_unmerged(f"{OP}.state_dict")
        found = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name in self._tied():
            found.pop(f"{prefix}{name}", None)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._check_unmerged(f"{OP}.load_state_dict")
        for name, first in self._tied().items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _tied(self) -> dict[str, str]:
        """Another name of a parameter -> the first."""
        first: dict[nn.Parameter, str] = {}
        named = self.named_parameters(remove_duplicate=False)
        return {name: first[p] for name, p in named if first.setdefault(p, name) != name}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self.model),), nn.Module.__getstate__(self)

    def _install(self, name: str, new: NewAdapter, is_trainable: bool) -> None:
        self._adapters.install(name, new, is_trainable)
        # they are constants: DDP need not send them in every step
        ignored = [f"shared.{key}.{matrix}" for key in self.shared for matrix in ("A", "B")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ignored)

    def _named(self, op: str, adapter_name: str | None) -> str:
        name = self.active_adapter if adapter_name is None else adapter_name
        if name is None:
            raise ValueError(
                f"{op}: adapter_name: expected the name of an adapter, because none is active, "
                f"got None; there are {list(self.adapters)}"
            )
        self._adapters.check_known(op, "adapter_name", name)
        if self._merged is not None and self._merged.unloaded:
            raise ValueError(f"{op}: expected adapters that are loaded; unmerge() first")
        return name

    def _check_unmerged(self, op: str) -> None:
        if self._merged is not None:
            raise ValueError(
                f"{op}: expected adapters that are not merged, got {self._merged.name!r} in the "
                "base weights; unmerge() first"
            )


def _check_bare(model: nn.Module) -> None:
    """Refuse a model whose layers are not its own."""
    if isinstance(model, VeraModel) or any(isinstance(m, VeraLayer) for m in model.modules()):
        raise ValueError(
            f"{OP}: model: expected a model without VeRA adapters or a pool of them, got one that "
            "has some; add_adapter of its VeraModel (a pool's is pool.model) adds another"
        )
    if any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise ValueError(
            f"{OP}: model: expected a model without PEFT's adapters, got {type(model).__name__}; "
            "accelerate_peft speeds it up as it is, and VeraModel.from_pretrained loads its files "
            "over the bare model"
        )
    # what torch.compile gives; its class is not to be had without importing the compiler
    if "_orig_mod" in model._modules:
        raise ValueError(
            f"{OP}: model: expected a model that is not compiled, got one that is; adapt it first, "
            "then compile what you get"
        )


def _empty(model: type[nn.Module]) -> VeraModel:
    """What is pickled or copied is filled into."""
    return object.__new__(class_for(VeraModel, model))
