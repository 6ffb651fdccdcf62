"""A and B, once for all layers of a model; and U = X Aᵀ, once for all that read the same X."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fmkernels._autocast import multiplied_in
from fmkernels.ops.vera_shrink import vera_shrink


class SharedMatrices(nn.Module):
    """A (r, m) and B (n, r) as buffers, and copies of them in other dtypes and on other devices.

    Args:
        A: (r, m).
        B: (n, r).
        persistent: whether they belong to ``state_dict()``.
        draw: called with a device and a dtype, makes them again: when what was on the meta device
            gets memory, they need not be in a state that is loaded.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, A: Tensor, B: Tensor, persistent: bool, draw: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self._draw = draw
        self.register_buffer("A", A, persistent=persistent)
        self.register_buffer("B", B, persistent=persistent)
        self._copies = _Copies()
        self.pools = _Pools()
        """Those whose adapters take them, though none of the model may."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._copies = _Copies()  # of matrices that are about to be moved or cast
        was_meta = self.A.is_meta
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if was_meta and not self.A.is_meta and self._draw is not None:
            A, B = self._draw(device=self.A.device, dtype=self.A.dtype)
            self.A.copy_(A)
            self.B.copy_(B)
        return self

    def for_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B on the device and in the dtype in which x is multiplied."""
        return self.on(x.device, multiplied_in(x))

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A and B on a device; the same tensors for the same device and dtype."""
        A, B = self.A, self.B
        if A.device == device and (dtype is None or A.dtype == dtype):
            return A, B
        dtype = A.dtype if dtype is None else dtype
        if is_compiling():
            return A.to(device, dtype), B.to(device, dtype)
        return self._copies.of(A, B, device, dtype)

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
        self._of: Any = None

    def of(
        self, A: Tensor, B: Tensor, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        state = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in (A, B)]
        if state != self._state or self._of[0]() is not A or self._of[1]() is not B:
            self._made, self._state, self._of = {}, state, (weakref.ref(A), weakref.ref(B))
        if (device, dtype) not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[device, dtype] = A.to(device, dtype), B.to(device, dtype)
        return self._made[device, dtype]

    def __reduce__(self) -> Any:
        return _Copies, ()


class _Pools(weakref.WeakSet[Any]):
    """Never saved or copied: a pool is of one model."""

    def __reduce__(self) -> Any:
        return _Pools, ()


class SharedInput:
    """The U that was computed last, for the next layer that reads the same X.

    A layer that asks a second time begins a new pass: then U is computed again, because the graph
    of the first may have been freed, as it is after backward. What one activation checkpoint keeps
    is not shared with another, which would compute other tensors the second time. A U that is not
    tracked has no graph, and a reader that needs one is not handed it.
    """

    def __init__(self) -> None:
        self._last: _Last | None = None

    def forget(self, _: Any = None) -> None:
        """Whoever comes next computes again."""
        self._last = None

    def shrink(self, layer: nn.Module, x: Tensor, A: Tensor, tracked: bool = True) -> Tensor:
        """(…, m), (r, ≥ m) -> U (…, r); if it is not tracked, no gradient goes through it."""
        if is_compiling() or x.is_inference():  # nobody counts changes of an inference tensor
            return vera_shrink(x, A)
        mode = (
            x._version,
            torch.is_grad_enabled(),
            _keeper(),
        )
        tracked = tracked and x.requires_grad and torch.is_grad_enabled()
        last = self._last  # read once: other threads may write it
        is_same = last is not None and last.x() is x and last.A is A and last.mode == mode
        serves = last is not None and (last.u.requires_grad or not tracked)
        if last is not None and is_same and serves and id(layer) not in last.readers:
            last.readers.add(id(layer))
            return last.u if tracked else last.u.detach()
        u = vera_shrink(x if tracked else x.detach(), A)
        if u.requires_grad:
            u.register_hook(self.forget)
        self._last = _Last(weakref.ref(x, self.forget), A, mode, u, {id(layer)})
        return u

    def __reduce__(self) -> Any:
        return SharedInput, ()


class _Last(NamedTuple):
    x: weakref.ref[Tensor]
    A: Tensor
    mode: Any
    u: Tensor
    readers: set[int]


def _keeper() -> int | None:
    """Who keeps what backward needs in place of autograd: an activation checkpoint, say.

    Of a U that has a graph, the function that hands it out is alive, and its number not another's;
    of another U nothing is kept.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else id(hooks[1])
