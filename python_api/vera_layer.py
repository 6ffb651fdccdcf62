"""A linear layer of any kind with VeRA and DVoRA adapters beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

import fmkernels
from fmkernels import DvoraNorms
from fmkernels._autocast import lower_precision
from fmkernels.ops.dvora_linear import DVORA_SCALE
from fmkernels.ops.dvora_linear.norms import built_norms
from fmkernels.ops.vera_dropout import vera_dropout
from fmkernels.ops.vera_linear import form_of
from fmkernels.ops.vera_linear.formulation import DENSE

from .vera_base import (
    base_bias,
    base_device,
    called_bias,
    dense_weight,
    linear_sizes,
    plain_weight,
)
from .vera_state import AdapterState, Group


class VeraLayer(nn.Module):
    """Stands in a model in the place of a linear layer, which it holds.

    Args:
        base_layer: what is adapted.
        state: that of the model.
    """

    def __init__(self, base_layer: nn.Module, state: AdapterState) -> None:
        super().__init__()
        sizes = linear_sizes(base_layer)
        assert sizes is not None
        self.in_features, self.out_features = sizes
        self.base_layer = base_layer
        self.lambda_d = nn.ParameterDict()
        self.lambda_b = nn.ParameterDict()
        self.magnitude = nn.ParameterDict()
        self.state = state
        self.readers = 1
        """How many layers may read the same input, as query, key and value do: then X Aᵀ is
        computed once for all of them."""
        self._norms = _Norms()

    @property
    def weight(self) -> Any:
        """The base layer's; some models look at it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's."""
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, m) -> (…, n)."""
        active, rows = self.state.current()
        if rows is not None:
            groups = rows.groups(self)
            if groups:
                return self._by_rows(x, groups, rows.count, args, kwargs)
        elif active is not None and active in self.lambda_d and self.state.merged is None:
            return self._by_one(x, active, args, kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _by_one(self, x: Tensor, name: str, args: Any, kwargs: Any) -> Tensor:
        config, matrices = self.state.adapters[name]
        A, B = matrices.for_input(x)
        adapter = A, B, self.lambda_d[name], self.lambda_b[name]
        dropout = config.vera_dropout if self.training else 0.0
        if config.use_dora:
            before = self._updated(x, adapter, dropout, args, kwargs, with_bias=False)
            norms = self._norms.of(self, name)
            flat = before.reshape(-1, self.out_features)
            y: Tensor = DVORA_SCALE(flat, self.magnitude[name], norms, self._bias(before))
            return y.reshape(before.shape)
        return self._updated(x, adapter, dropout, args, kwargs, with_bias=True)

    def _updated(
        self, x: Tensor, adapter: tuple[Tensor, ...], dropout: float, args: Any, kwargs: Any,
        with_bias: bool,
    ) -> Tensor:  # fmt: skip
        """X W0ᵀ + update, and the bias."""
        A, B, lambda_d, lambda_b = adapter
        weight = None if args or kwargs else plain_weight(self.base_layer)
        if weight is None:
            base = self._base(x, None, args, kwargs, with_bias=with_bias)
            return fmkernels.vera_expand(base, self._shrink(x, A, dropout), lambda_d, lambda_b, B)
        bias = base_bias(self.base_layer) if with_bias else None
        u = self._shared(x, weight, bias, A, dropout)
        return fmkernels.vera_linear(
            x, weight, bias, *adapter, dropout_p=dropout, training=self.training, u=u
        )

    def _shared(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, dropout: float
    ) -> Tensor | None:
        """X Aᵀ for several layers: not where it is not computed, or dropout makes it another."""
        if self.readers == 1 or dropout or is_compiling():
            return None
        form = form_of(lower_precision(x), weight, bias, A, readers=self.readers)
        if form in DENSE or (form == "refolded" and not torch.is_grad_enabled()):
            return None
        return self.state.shared_input.shrink(self, x, A, tracked=form == "products")

    def _shrink(self, x: Tensor, A: Tensor, dropout: float) -> Tensor:
        if dropout:
            return fmkernels.vera_shrink(vera_dropout(x, dropout), A)
        return self.state.shared_input.shrink(self, x, A)

    def _base(
        self, x: Tensor, weight: Tensor | None, args: Any = (), kwargs: Any = None,
        with_bias: bool = True,
    ) -> Tensor:  # fmt: skip
        if weight is not None:
            bias = base_bias(self.base_layer)
            own = None if bias is None or not with_bias else bias.to(x.dtype)
            return F.linear(x, weight.to(x.dtype), own)
        y: Tensor = self.base_layer(x, *args, **(kwargs or {}))
        bias = None if with_bias else self._bias(y)
        return y if bias is None else (y - bias).to(y.dtype)

    def _bias(self, y: Tensor) -> Tensor | None:
        """(n), or None; where it is not to be read, what the layer makes of zeros."""
        bias = base_bias(self.base_layer)
        is_elsewhere = bias is not None and bias.device != y.device  # accelerate keeps it there
        if is_elsewhere or not hasattr(self.base_layer, "bias"):
            return self._norms.bias(self)
        return bias

    def _magnified(self, before: Tensor, scale: Tensor) -> Tensor:
        bias = self._bias(before)
        after = before * scale
        return (after if bias is None else after + bias).to(before.dtype)

    def _by_rows(
        self, x: Tensor, groups: list[Group], count: int, args: Any, kwargs: Any
    ) -> Tensor:
        weight = None if args or kwargs else plain_weight(self.base_layer)
        dora = any(group.scale is not None for group in groups)
        y = before = self._base(x, weight, args, kwargs, with_bias=not dora)
        bias = self._bias(before) if dora else None
        if bias is not None:
            y = (before + bias).to(before.dtype)
        for group in groups:
            A, B = group.matrices.for_input(x)
            ids = self._of_tokens(group.ids, count, x)
            u = self._shrink(x, A, group.dropout)
            vectors = group.lambda_d, group.lambda_b, B
            if group.scale is None:
                y = fmkernels.vera_expand(y, u, *vectors, adapter_ids=ids)
            else:
                expanded = fmkernels.vera_expand(before, u, *vectors, adapter_ids=ids)
                # of −1 the last: what is not finite in other rows is no adapter's gradient
                scale = F.pad(group.scale, (0, 0, 0, 1), value=1.0)[ids]
                scaled = self._magnified(expanded, scale)
                y = torch.where((ids >= 0).unsqueeze(-1), scaled, y)
        return y

    def _of_tokens(self, ids: Tensor, count: int, x: Tensor) -> Tensor:
        """(batch) -> (…), those of all rows of x; beams of one sequence lie side by side."""
        if x.ndim < 2 or x.shape[0] % count:
            raise ValueError(
                f"VeraModel: adapter_names: expected a batch of {count} rows (or of several for "
                f"each) first in the input of every layer, got shape {tuple(x.shape)}"
            )
        ids = ids.to(x.device).repeat_interleave(x.shape[0] // count)
        return ids.view(-1, *[1] * (x.ndim - 2)).expand(x.shape[:-1])

    def dora_scale(self, name: str) -> Tensor:
        """magnitude / ‖rows of W0 + ΔW‖, (n), the norms without a gradient."""
        magnitude = self.magnitude[name]
        scale: Tensor = magnitude / self._norms.of(self, name).to(magnitude.dtype)
        return scale

    def start(self, name: str, vectors: dict[str, Tensor]) -> None:
        """Give the layer an adapter's vectors: lambda_d, lambda_b, and magnitude if it has one."""
        for key, value in vectors.items():
            device = base_device(self.base_layer)
            getattr(self, key)[name] = nn.Parameter(value.detach().to(device, copy=True))

    def vectors(self, name: str) -> dict[str, nn.Parameter]:
        """Those of an adapter, by their names."""
        keys = ("lambda_d", "lambda_b", "magnitude")
        return {key: getattr(self, key)[name] for key in keys if name in getattr(self, key)}

    def remove(self, name: str) -> dict[str, nn.Parameter]:
        """Take an adapter away; what it was."""
        vectors = self.vectors(name)
        for key in vectors:
            del getattr(self, key)[name]
        self._norms.forget(name)
        return vectors

    def rename(self, name: str, new_name: str) -> None:
        """Call an adapter otherwise."""
        for key, vector in self.remove(name).items():
            getattr(self, key)[new_name] = vector

    def adapted_weight(self, name: str, weight: Tensor) -> Tensor:
        """Of W0 (n, m), in float32 or float64: W0 + ΔW, or for DVoRA its rows of the magnitudes."""
        A, B = self.state.adapters[name].matrices.on(weight.device, weight.dtype)
        d, b = self.lambda_d[name].detach(), self.lambda_b[name].detach()
        adapted = weight + fmkernels.vera_delta_weight(A[:, : self.in_features], B, d, b)
        if name in self.magnitude:
            scale = self.magnitude[name].detach().to(adapted) / adapted.norm(dim=1)
            adapted *= scale.unsqueeze(1)
        return adapted

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._norms = _Norms()  # of weights that are about to be moved or cast: let them go
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._norms = _Norms()  # compiled code does not look whether the weight is another
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, and the names of the adapters."""
        names = ", ".join(self.lambda_d) or "none"
        return f"{self.in_features} -> {self.out_features}, adapters: {names}"


class _Norms:
    """The norms of every adapter, computed when its vectors changed; never saved or copied."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[Any, DvoraNorms]] = {}
        self._bias: Tensor | None = None

    def of(self, layer: VeraLayer, name: str) -> Tensor:
        vectors = layer.lambda_d[name], layer.lambda_b[name]
        A, B = layer.state.adapters[name].matrices.on(vectors[1].device)
        held = self._of.get(name)
        if is_compiling():  # constants can be read there, but not kept
            if held is not None:
                return held[1](*vectors)
            return built_norms(dense_weight(layer.base_layer), A, B, *vectors)
        weight = plain_weight(layer.base_layer)
        # of a weight that is read through a view, such as Conv1D's, its storage says whether
        # another has taken its place; FSDP fills the same again, elsewhere, in each step
        place = (
            _State(layer.base_layer)
            if weight is None
            else (weight.untyped_storage()._cdata, weight.storage_offset())
        )
        key = A, B, place
        if held is None or held[0][0] is not A or held[0][1] is not B or held[0][2] != place:
            held = self._of[name] = key, DvoraNorms(dense_weight(layer.base_layer), A, B)
        return held[1](*vectors)

    def bias(self, layer: VeraLayer) -> Tensor:
        """(n), of a layer whose bias is not there to be read."""
        if self._bias is None:
            self._bias = called_bias(layer.base_layer)
        return self._bias

    def forget(self, name: str) -> None:
        self._of.pop(name, None)

    def __reduce__(self) -> Any:
        return _Norms, ()


class _State:
    """The tensors of a layer that is called, and how often each was changed."""

    def __init__(self, base: nn.Module) -> None:
        tensors = [x for x in (*base.parameters(), *base.buffers()) if not x.is_meta]
        # a view keeps the memory, so that nothing else comes to lie there
        self._tensors = [x.detach() if _is_plain(x) else x for x in tensors]
        self._versions = [0 if x.is_inference() else x._version for x in tensors]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _State) or self._versions != other._versions:
            return False
        return all(
            a.data_ptr() == b.data_ptr() if _is_plain(a) and _is_plain(b) else a is b
            for a, b in zip(self._tensors, other._tensors, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
