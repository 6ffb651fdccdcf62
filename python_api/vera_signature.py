"""A class for each class of models, with the signature of its ``forward``: tools read it."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any, TypeVar, cast

from torch import nn

Owner = TypeVar("Owner", bound=nn.Module)
# A class refers to that of its model: it goes, and that with it, when no model of it is left.
_MADE: weakref.WeakValueDictionary[tuple[Any, Any], Any] = weakref.WeakValueDictionary()


def class_for(owner: type[Owner], model: type[nn.Module]) -> type[Owner]:
    """``owner`` with a ``forward`` of the signature of ``model``'s, and ``adapter_names``.

    It has the model's name in its own, and gives it as its name: Trainer takes from them what the
    labels of answers to questions are called, and that those of a language model are shifted.
    """
    made = _MADE.get((owner, model))
    if made is None:
        made = _MADE[owner, model] = _made(owner, model)
    return cast("type[Owner]", made)


def _made(owner: type[nn.Module], model: type[nn.Module]) -> type[nn.Module]:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return owner

    @functools.wraps(model.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return owner.forward(self, *args, **kwargs)

    own = list(signature.parameters.values())
    if "adapter_names" not in signature.parameters:
        names = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
        own.insert(len(own) - any(p.kind is p.VAR_KEYWORD for p in own), names)
    forward.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    own_name = owner.__name__
    members = {
        "forward": forward,
        "_get_name": lambda self: model.__name__,
        "__repr__": lambda self: nn.Module.__repr__(self).replace(model.__name__, own_name, 1),
        "__module__": owner.__module__,
    }
    return type(f"{own_name}Of{model.__name__}", (owner,), members)
