"""A and B, once for all layers of a model; and U = X Aᵀ, once for all that read the same X."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fmkernels._autocast import autocasts
from fmkernels.ops.vera_shrink import vera_shrink


class SharedMatrices(nn.Module):
    """A (r, m) and B (n, r) as buffers, and copies of them in other dtypes and on other devices.

    Args:
        A: (r, m).
        B: (n, r).
        persistent: whether they belong to ``state_dict()``.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=persistent)
        self.register_buffer("B", B, persistent=persistent)
        self._copies = _Copies()

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def for_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B on the device and in the dtype in which x is multiplied."""
        casts = x.dtype != torch.float64 and autocasts(x)
        return self.on(x.device, torch.get_autocast_dtype(x.device.type) if casts else x.dtype)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A and B on a device; the same tensors for the same device and dtype."""
        dtype = self.A.dtype if dtype is None else dtype
        if self.A.dtype == dtype and self.A.device == device:
            return self.A, self.B
        if is_compiling():
            return self.A.to(device, dtype), self.B.to(device, dtype)
        return self._copies.of(self.A, self.B, device, dtype)

    def is_equal(self, A: Tensor, B: Tensor) -> bool:
        """Whether these are the same matrices, bit for bit; of meta tensors their shapes count."""
        return all(
            own.shape == other.shape
            and own.dtype == other.dtype
            and own.device == other.device
            and (own.is_meta or torch.equal(own, other))
            for own, other in ((self.A, A), (self.B, B))
        )


class _Copies:
    """Made when they are asked for, and again when a matrix has changed; never saved or copied."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}
        self._state: Any = None

    def of(
        self, A: Tensor, B: Tensor, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        state = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in (A, B)]
        if state != self._state:
            self._made, self._state = {}, state
        if (device, dtype) not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[device, dtype] = A.to(device, dtype), B.to(device, dtype)
        return self._made[device, dtype]

    def __reduce__(self) -> Any:
        return _Copies, ()


class SharedInput:
    """The U that was computed last, for the next layer that reads the same X.

    A layer that asks a second time begins a new pass: then U is computed again, because the graph
    of the first may have been freed.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self, _: Any = None) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._u: Tensor | None = None
        self._A: Tensor | None = None
        self._mode: Any = None
        self._readers: set[int] = set()

    def shrink(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """(…, m), (r, ≥ m) -> U (…, r)."""
        if is_compiling():
            return vera_shrink(x, A)
        mode = (
            None if x.is_inference() else x._version,
            torch.is_grad_enabled(),
            autocasts(x) and torch.get_autocast_dtype(x.device.type),
        )
        is_same = self._x is not None and self._x() is x and self._A is A and self._mode == mode
        if not is_same or id(layer) in self._readers:
            self._x, self._A, self._mode = weakref.ref(x, self._forget), A, mode
            self._u, self._readers = vera_shrink(x, A), set()
        self._readers.add(id(layer))
        assert self._u is not None
        return self._u

    def __reduce__(self) -> Any:
        return SharedInput, ()
