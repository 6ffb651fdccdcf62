"""The ops under an existing VeRA model of PEFT, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from .arrays import optional

OP = "accelerate_peft"


class Acceleration:
    """What :func:`accelerate_peft` has changed, and the way back.

    As a context manager it leaves the model as its call found it: where that was accelerated
    already, it still is.

    Attributes:
        layers: names of the layers that the call changed.

    Example:
        >>> import peft, torch
        >>> from fmkernels.api import vera_peft
        >>> config = peft.VeraConfig(r=4, target_modules=["0"])
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
        >>> with vera_peft.accelerate_peft(model) as acceleration:
        ...     acceleration.layers, type(model.base_model.model[0]).__name__
        (('base_model.model.0',), 'AcceleratedLinear')
        >>> type(model.base_model.model[0]).__name__
        'Linear'
    """

    def __init__(self, model: nn.Module, changed: dict[str, nn.Module]) -> None:
        self._model, self._changed = model, changed

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that the call changed."""
        return tuple(self._changed)

    def undo(self) -> None:
        """Give all VeRA layers of the model PEFT's forward again, whichever call changed them."""
        _give_back([*self._changed.values(), *self._model.modules()])

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        _give_back(list(self._changed.values()))

    def __repr__(self) -> str:
        return f"Acceleration({len(self._changed)} layers)"


def accelerate_peft(peft_model: nn.Module) -> Acceleration:
    """Let the VeRA layers of a PEFT model compute with fmkernels; nothing else of it changes.

        Y = X W0ᵀ + bias + Σ b ⊙ (((X Aᵀ) ⊙ d) Bᵀ)        over the active adapters

    The layers get a subclass of their class, ``peft.tuners.vera.layer.Linear``, with another
    forward. Parameters, buffers and modules stay the same objects under the same names, so that an
    optimizer that was made before goes on, ``save_pretrained`` writes the same files, and adapters
    are added, chosen, disabled, merged and deleted as before. It works before or after
    ``torch.compile``, under autocast, with gradient checkpointing, and with ``copy.deepcopy`` and
    ``pickle``, whose copies are accelerated too.

    To call it again is allowed and changes only layers that came since.

    A base layer that is more than a product, a quantised one say, or one with hooks, computes as
    before, and the adapter is added by :func:`fmkernels.vera_expand`. Merged and disabled adapters,
    and inputs that are no plain tensors, are left to PEFT, and so are layers of a class that
    inherits from PEFT's.

    Args:
        peft_model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gives for a
            ``VeraConfig``; or any module that has such layers. It is changed in place.

    Returns:
        A handle: ``undo()`` gives the layers PEFT's forward again. It is a context manager, too.

    Raises:
        ImportError: peft is not installed.
        TypeError: it is no module.
        ValueError: it has no VeRA layer, or one whose forward was replaced. Then nothing is
            changed. In forward, as the ops: a matrix that requires a gradient.

    Numerics:
        Over float32 and float64 the result is PEFT's but for the order of sums; for large ranks
        or many rows W0 + ΔW is formed (see :func:`fmkernels.vera_linear`), in half types for the
        gradient of the input alone. Over bfloat16 and float16, where PEFT casts the input to
        float32 for the adapter, and under autocast: products are in the dtype of the input, or
        autocast's, with sums in float32, so results differ from PEFT's by that dtype's rounding;
        the vectors and their gradients stay float32. For this the matrices, which
        PEFT keeps in float32, are cast once and the copies kept beside the model until the matrices
        are moved, cast, loaded or otherwise written to, except through ``.data``, which PyTorch
        does not count as writing. Dropout drops the same share, by another random stream than
        PEFT's. Gradients cannot be differentiated again.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import peft, torch
        >>> from fmkernels.api.vera_peft import accelerate_peft
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 5))
        >>> config = peft.VeraConfig(r=4, target_modules=["0", "1"])
        >>> model = peft.get_peft_model(base, config)
        >>> x = torch.randn(3, 8)
        >>> expected = model(x)
        >>> handle = accelerate_peft(model)
        >>> torch.allclose(model(x), expected, atol=1e-5)
        True
        >>> handle.undo()
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(
            f"{OP}: peft_model: expected a PEFT model with VeRA layers, "
            f"got {type(peft_model).__name__}"
        )
    ours = _layers()
    found = {name: module for name, module in peft_model.named_modules() if _is_vera(ours, module)}
    if not found:
        raise ValueError(
            f"{OP}: peft_model: expected a model with VeRA layers, as "
            f"peft.get_peft_model(model, peft.VeraConfig(...)) makes them, got {_kind(peft_model)}"
        )
    changed = {name: layer for name, layer in found.items() if type(layer) is ours.Linear}
    for name, layer in changed.items():
        if "forward" in vars(layer):
            raise ValueError(
                f"{OP}: peft_model: expected layers with PEFT's forward, got one with another in "
                f"its place, {name!r}; accelerate's hooks do that where weights are offloaded"
            )
    for layer in changed.values():
        layer.__class__ = ours.AcceleratedLinear
    return Acceleration(peft_model, changed)


def _layers() -> Any:
    """The module with the layer, which imports peft."""
    return optional(f"{__package__}.vera_peft_layer", OP, "peft")


def _is_vera(ours: Any, module: nn.Module) -> bool:
    return type(module) in (ours.Linear, ours.AcceleratedLinear)


def _give_back(modules: list[Any]) -> None:
    """PEFT's forward for those that have ours."""
    ours = _layers()
    for module in modules:
        if type(module) is ours.AcceleratedLinear:
            module.forget()
            module.__class__ = ours.Linear


def _kind(model: nn.Module) -> str:
    """What a model is that has no VeRA layers: of PEFT with other adapters, or none of PEFT."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return type(model).__name__
    kinds = {str(getattr(c, "peft_type", c)).rpartition(".")[2] for c in configs.values()}
    return f"{type(model).__name__} with {', '.join(sorted(kinds))}"
