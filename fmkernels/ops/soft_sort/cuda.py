"""soft_sort on NVIDIA GPUs with the CUDA library: what surrounds a launch.

The kernels compute in float32 on dense rows; csrc/include/fmkernels/soft_sort_block.h has the
design.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fmkernels._cuda as _cuda
from fmkernels._tuned import capability
from fmkernels.ops.soft_sort.config import BlockPlan, block_plan
from fmkernels.ops.soft_sort.kept import kept
from fmkernels.ops.soft_sort.reference import DISTRIBUTIONS


class Network(NamedTuple):
    """A sorting network on a device."""

    table: Tensor
    """The packed plan, int32; see csrc/include/fmkernels/packed_plan.h."""
    comparators: int
    tape: int
    """The most comparators that one row of X meets."""


def sizes(network: str, n: int) -> tuple[int, int]:
    """The comparators of a network, and the most that one row of X meets."""
    _, comparators, _, _, _, tape = struct.unpack_from("6i", packed(network, n))
    return comparators, tape


@functools.lru_cache(maxsize=64)
def packed(network: str, n: int) -> bytes:
    """The network as the kernels read it."""
    table: bytes = _cuda.plan(network, n)
    return table


@kept
def on_device(network: str, n: int, device: torch.device) -> Network:
    """The network on a device."""
    table = torch.frombuffer(bytearray(packed(network, n)), dtype=torch.int32)
    return Network(table.to(device), *sizes(network, n))


@functools.lru_cache(maxsize=256)
def plan(
    queries: int, n: int, network: str, device: torch.device, with_teacher: bool, with_grad: bool
) -> BlockPlan | None:
    """The launch on this device, or None if the shared memory of a block is too small."""
    limits = _cuda.shared_limits(device.index)
    return plan_within(limits, queries, n, network, with_teacher, with_grad, capability(device))


def plan_within(
    limits: tuple[int, int],
    queries: int,
    n: int,
    network: str,
    with_teacher: bool,
    with_grad: bool,
    capability: str | None = None,
) -> BlockPlan | None:
    """The launch where a block and a multiprocessor have so many bytes of shared memory."""
    comparators, tape = sizes(network, n)

    def shared_bytes(rows: int) -> int:
        needed: int = _cuda.shared_bytes(n, comparators, tape, rows, with_teacher, with_grad)
        return needed

    tuned_for = capability if with_grad else None  # what is tuned is the loss with its gradient
    return block_plan(queries, n, *limits, shared_bytes, tuned_for, with_teacher=with_teacher)


def launch_arguments(
    scores: Tensor,
    steepness: float,
    network: str,
    distribution: str,
    art_lambda: float,
    *,
    with_teacher: bool = False,
    with_grad: bool = False,
) -> tuple[Any, ...]:
    """What every launch begins with; ``scores`` is dense, float32 and outlives the launch."""
    n = scores.shape[-1]
    queries = scores.numel() // n
    launch = plan(queries, n, network, scores.device, with_teacher, with_grad)
    if launch is None:
        raise RuntimeError(f"soft_sort: rows of {n} values do not fit in {scores.device}'s blocks")
    wiring = on_device(network, n, scores.device)
    stream = torch.cuda.current_stream(scores.device).cuda_stream
    return (
        (n, wiring.comparators, wiring.tape, launch.rows, launch.threads, launch.grid, stream),
        wiring.table.data_ptr(),
        (queries, DISTRIBUTIONS.index(distribution), steepness, art_lambda, scores.data_ptr()),
    )


def dense(tensor: Tensor) -> Tensor:
    """The same numbers, dense and in float32."""
    return tensor.to(torch.float32).contiguous()


def soft_sort(
    scores: Tensor,
    steepness: float = 100.0,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """(…, n) -> sorted values (…, n) and permutation (…, n, n)."""
    x = dense(scores)
    values, permutation = torch.empty_like(x), x.new_empty((*x.shape, x.shape[-1]))
    if x.numel() > 0:
        arguments = launch_arguments(x, steepness, network, distribution, art_lambda)
        _cuda.soft_sort(*arguments, values.data_ptr(), permutation.data_ptr())
    return values.to(scores.dtype), permutation.to(scores.dtype)


def soft_sort_backward(
    grad_values: Tensor | None,
    grad_permutation: Tensor | None,
    scores: Tensor,
    steepness: float = 100.0,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> Tensor:
    """Gradient of the scores; the network is run again rather than kept."""
    x = dense(scores)
    grads = [grad if grad is None else dense(grad) for grad in (grad_values, grad_permutation)]
    grad_scores = torch.empty_like(x)
    if x.numel() > 0:
        settings = (steepness, network, distribution, art_lambda)
        arguments = launch_arguments(x, *settings, with_grad=True)
        addresses = (0 if grad is None else grad.data_ptr() for grad in grads)
        _cuda.soft_sort_backward(*arguments, *addresses, grad_scores.data_ptr())
    return grad_scores.to(scores.dtype)
