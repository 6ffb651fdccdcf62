"""A class for each class of models, with the signature of its ``forward``: tools read it."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

Owner = TypeVar("Owner", bound=nn.Module)


@functools.cache
def class_for(owner: type[Owner], model: type[nn.Module]) -> type[Owner]:
    """``owner`` with a ``forward`` of the signature of ``model``'s, and ``adapter_names``."""
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
    return type(owner.__name__, (owner,), {"forward": forward, "__module__": owner.__module__})
