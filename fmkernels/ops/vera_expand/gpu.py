"""vera_expand on NVIDIA GPUs: in which order the kernels of ``triton.py`` run.

Forward is one launch. Backward is two and two sums: dU; and for one adapter the contraction of M,
for several Σ G ⊙ Z by blocks. Rows of several adapters are sorted first, which is some ten small
launches. The host never waits for the device.

**Memory** beside the results: for one adapter, at most 264 parts of M's sums; for several, a row of
grad_d and of grad_b for every block, T / 128 + N of them at most where T is much larger than N.
"""

from __future__ import annotations

from torch import Tensor

from fmkernels.ops.vera_expand import gpu_launch, reference
from fmkernels.ops.vera_expand.blocks import blocks_of
from fmkernels.ops.vera_expand.gpu_config import (
    block_tile,
    contraction,
    grad_u_tile,
    is_stock,
    rows_of_a_block,
)
from fmkernels.ops.vera_shrink.gpu import sums
from fmkernels.ops.vera_shrink.gpu_config import tile_of

scaled_matrix = reference.scaled_matrix


def vera_expand(
    base: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
) -> Tensor:
    """(T, n), (T, r), (N, r), (N, n), (≥ n, r), (T) -> (T, n) in base's dtype."""
    if is_stock(u.dtype, by_matrix):
        return reference.vera_expand(base, u, lambda_d, lambda_b, B, adapter_ids, by_matrix)
    if not base.numel():
        return base.new_empty(base.shape)
    d, b, own_B, ids = operands(base.shape[1], u, lambda_d, lambda_b, B, adapter_ids)
    gathered = ids is not None
    tile = tile_of(len(base), base.shape[1], u.shape[1], u.dtype, gathered=gathered)
    return gpu_launch.expand(base, u, d, b, own_B, ids, tile)


def vera_expand_backward(
    grad: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
    by_matrix: bool,
    of_u: bool,
    of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, lambda_d and lambda_b; empty tensors for what is not asked for."""
    if is_stock(u.dtype, by_matrix) or not grad.numel():
        return reference.vera_expand_backward(
            grad, u, lambda_d, lambda_b, B, adapter_ids, by_matrix, of_u, of_vectors
        )
    d, b, own_B, ids = operands(grad.shape[1], u, lambda_d, lambda_b, B, adapter_ids)
    if ids is None:
        return _of_one(grad, u, d, b, own_B, of_u, of_vectors)
    return _of_several(grad, u, d, b, own_B, ids, of_u, of_vectors)


def _of_one(
    grad: Tensor, u: Tensor, d: Tensor, b: Tensor, B: Tensor, of_u: bool, of_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, width), rank = grad.shape, u.shape[1]
    grad_u, grad_d, grad_b = u.new_empty(0), d.new_empty(0), b.new_empty(0)
    if of_u:
        tile = grad_u_tile(tokens, width, rank, u.dtype)
        grad_u, _ = gpu_launch.grad_u(grad, u, d, b, B, None, tile, of_u=True)
    if of_vectors:
        plan = contraction(tokens, width, rank, u.dtype)
        parts_d, parts_b = gpu_launch.contract(grad, u, d, b, B, plan)
        grad_d, grad_b = sums(parts_d, d.dtype), sums(parts_b, b.dtype)
    return grad_u, grad_d, grad_b


def _of_several(
    grad: Tensor, u: Tensor, d: Tensor, b: Tensor, B: Tensor, ids: Tensor, of_u: bool,
    of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, width), rank = grad.shape, u.shape[1]
    blocks = blocks_of(ids, len(d), rows_of_a_block(tokens, len(d), u.dtype))
    tile = block_tile(blocks.rows, rank, width, u.dtype)
    grad_u, parts_d = gpu_launch.grad_u(grad, u, d, b, B, blocks, tile, of_u=of_u)
    if not of_vectors:
        return grad_u, d.new_empty(0), b.new_empty(0)
    tile = block_tile(blocks.rows, width, rank, u.dtype)
    parts_b = gpu_launch.grad_b(grad, u, d, B, blocks, tile)
    of_adapters = blocks.first[1:]
    return (
        grad_u,
        sums(parts_d, d.dtype, of_adapters),
        sums(parts_b, b.dtype, of_adapters),
    )


def operands(
    width: int,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Vectors without gaps, B (width, r) in u's dtype, ids without gaps."""
    ids = None if adapter_ids is None else adapter_ids.contiguous()
    return lambda_d.contiguous(), lambda_b.contiguous(), B[:width].to(u.dtype), ids
