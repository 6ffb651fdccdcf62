"""Teacher patches of the last batches, from which NeCo draws the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ReferenceQueue(nn.Module):
    """First in, first out, one queue for every global crop.

    The patches are saved in the ``state_dict`` and move with the module, but they are no buffers:
    DistributedDataParallel would overwrite those of every rank with rank 0's. Nothing here waits
    for the device.

    Args:
        size: patches that each queue holds.
        dim: their width.
        crops: G, the number of queues.
    """

    def __init__(self, size: int, dim: int, crops: int) -> None:
        super().__init__()
        self.patches = torch.zeros(crops, size, dim)
        self.written = torch.zeros(crops, dtype=torch.int64)
        """How many were ever pushed to each queue."""

    @property
    def size(self) -> int:
        """How many patches each queue holds."""
        return self.patches.shape[1]

    @torch.no_grad()
    def push(self, crop: int, patches: Tensor, count: int, mask: Tensor | None = None) -> None:
        """Add ``count`` of the patches (M, D), chosen at random where ``mask`` (M,) is true.

        If fewer are, all of those.
        """
        key = torch.rand(len(patches), device=patches.device)
        if mask is not None:
            key = torch.where(mask, key, -1)
        key, chosen = key.topk(min(count, self.size, len(patches)))
        slots = (self.written[crop] + torch.arange(len(chosen), device=key.device)) % self.size
        queue = self.patches[crop]
        kept = torch.where(key[:, None] >= 0, patches[chosen].to(queue.dtype), queue[slots])
        queue.index_copy_(0, slots, kept)
        self.written[crop] += (key >= 0).sum()

    def draw(self, crop: int, count: int) -> tuple[Tensor, Tensor]:
        """Random patches (count, D), repeated if there are fewer; and whether there are any."""
        filled = self.written[crop].clamp(max=self.size)
        slots = torch.randperm(self.size, device=filled.device)[:count] % filled.clamp_min(1)
        return self.patches[crop][slots], filled > 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReferenceQueue:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.patches, self.written = fn(self.patches), fn(self.written)
        return self

    def get_extra_state(self) -> dict[str, Tensor]:
        """What ``state_dict`` saves."""
        return {"patches": self.patches.clone(), "written": self.written.clone()}

    def set_extra_state(self, state: Any) -> None:
        """What ``load_state_dict`` restores.

        Raises:
            ValueError: it was saved by a queue of another shape.
        """
        if not isinstance(state, dict) or not {"patches", "written"} <= state.keys():
            raise ValueError(
                "ReferenceQueue: state_dict: expected the patches and how many were written, got "
                f"{sorted(state) if isinstance(state, dict) else type(state).__name__}"
            )
        shape = tuple(state["patches"].shape)
        if shape != tuple(self.patches.shape):
            raise ValueError(
                f"ReferenceQueue: state_dict: expected patches of shape "
                f"{tuple(self.patches.shape)} (crops, queue_size, dim), got {shape}; to begin with "
                "an empty queue, delete the key that ends in '_extra_state'"
            )
        self.patches.copy_(state["patches"])
        self.written.copy_(state["written"])

    def extra_repr(self) -> str:
        """What ``print(module)`` shows between the parentheses."""
        crops, size, dim = self.patches.shape
        return f"{size}, {dim}, crops={crops}"
