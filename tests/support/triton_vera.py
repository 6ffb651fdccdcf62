"""The Triton kernels of VeRA and DVoRA, compiled ahead of time."""

from unittest import mock

import torch
from triton_aot import compiled

from fmkernels.ops.dvora_linear import gpu as dvora_gpu
from fmkernels.ops.dvora_linear import triton as dvora
from fmkernels.ops.dvora_linear.gpu_config import rows_plan
from fmkernels.ops.vera_dropout import gpu as dropout_gpu
from fmkernels.ops.vera_dropout import triton as dropout
from fmkernels.ops.vera_expand import gpu_launch
from fmkernels.ops.vera_expand import triton as expand
from fmkernels.ops.vera_expand.blocks import blocks_of
from fmkernels.ops.vera_expand.gpu_config import (
    block_tile,
    contraction,
    grad_u_tile,
    rows_of_a_block,
)
from fmkernels.ops.vera_linear import gpu as fused_gpu
from fmkernels.ops.vera_linear import triton as fused
from fmkernels.ops.vera_shrink import gpu as shrink_gpu
from fmkernels.ops.vera_shrink import triton as shrink
from fmkernels.ops.vera_shrink.gpu_config import shrink_plan, tile_of

OF_BLOCKS = "p_order p_group p_start p_first"
POINTERS = {
    shrink.vera_shrink_kernel: "p_x p_A p_parts",
    shrink.vera_sum_kernel: "p_parts p_first p_sums",
    expand.vera_expand_kernel: "p_base p_u p_d p_b p_B p_ids p_y",
    expand.vera_grad_u_kernel: f"p_grad p_u p_d p_b p_B {OF_BLOCKS} p_grad_u p_parts",
    expand.vera_grad_b_kernel: f"p_grad p_u p_d p_B {OF_BLOCKS} p_parts",
    expand.vera_contract_kernel: "p_grad p_u p_d p_b p_B p_parts_d p_parts_b",
    fused.vera_fused_kernel: "p_x p_weight p_bias p_u p_d p_b p_B p_ids p_y",
    dropout.vera_dropout_kernel: "p_x p_y",
    dvora.dvora_scale_kernel: "p_before p_magnitude p_norms p_bias p_y",
    dvora.dvora_scale_backward_kernel: "p_grad p_before p_magnitude p_norms p_result p_parts",
}
BY_NAME = {kernel.fn.__name__: kernel for kernel in POINTERS}


def tile_for(name, tokens, width, rank, dtype, adapters):
    """That of the expansion, or of one of its gradients."""
    columns, inner = (rank, width) if "grad_u" in name else (width, rank)
    if "grad_b" in name or ("grad_u" in name and adapters):
        each = rows_of_a_block(tokens, max(1, adapters), dtype)
        return block_tile(each, columns, inner, dtype)
    if "grad_u" in name:
        return grad_u_tile(tokens, width, rank, dtype)
    return tile_of(tokens, columns, inner, dtype, gathered=adapters > 0)


def rows_of_a_tile(name, *, tokens=512, width=768, rank=256, dtype=torch.bfloat16, adapters=0, **_):
    """What a launch that ``compile_for`` makes multiplies at a time."""
    if "contract" in name:
        return contraction(tokens, width, rank, dtype).tile.rows
    return tile_for(name, tokens, width, rank, dtype, adapters).rows


def compile_for(
    name, capability, *, tokens=512, width=768, features=768, rank=256, dtype=torch.bfloat16,
    adapters=0, strided=False,
):  # fmt: skip
    """A kernel at the launch that is shipped; adapters: of rows that have their own, 0 for one."""

    def rows(*shape):
        return (
            torch.zeros(shape, dtype=dtype).mT.contiguous().mT
            if strided
            else (torch.zeros(shape, dtype=dtype))
        )

    x, base, u = rows(tokens, features), rows(tokens, width), rows(tokens, rank)
    A, B = rows(rank, features), rows(width, rank)
    d, b = torch.zeros(max(1, adapters), rank), torch.zeros(max(1, adapters), width)
    ids = torch.zeros(tokens, dtype=torch.int64) if adapters else None
    each = rows_of_a_block(tokens, max(1, adapters), dtype)
    blocks = blocks_of(torch.zeros(tokens, dtype=torch.int64), max(1, adapters), each)
    norms, weight = torch.zeros(width), rows(width, features)
    tile = tile_for(name, tokens, width, rank, dtype, adapters)
    launches = {
        "vera_shrink_kernel": lambda: shrink_gpu.shrink(
            x[:64], A, shrink_plan(min(tokens, 64), features, rank, dtype)
        ),
        "vera_sum_kernel": lambda: shrink_gpu.sums(
            torch.zeros(40, width), dtype, blocks.first[1:] if adapters else None
        ),
        "vera_expand_kernel": lambda: gpu_launch.expand(base, u, d, b, B, ids, tile),
        "vera_grad_u_kernel": lambda: gpu_launch.grad_u(
            base, u, d, b, B, blocks if adapters else None, tile, of_u=True
        ),
        "vera_grad_b_kernel": lambda: gpu_launch.grad_b(base, u, d, B, blocks, tile),
        "vera_contract_kernel": lambda: gpu_launch.contract(
            base, u, d, b, B, contraction(tokens, width, rank, dtype)
        ),
        "vera_fused_kernel": lambda: fused_gpu.vera_fused(
            x, weight, norms.to(dtype), u, d, b, B, ids
        ),
        "vera_dropout_kernel": lambda: dropout_gpu.vera_dropout(x, torch.tensor(1), 0.1),
        "dvora_scale_kernel": lambda: dvora_gpu.dvora_scale(base, norms, norms, norms),
        "dvora_scale_backward_kernel": lambda: dvora_gpu.scale_backward(
            base, base, norms, norms, rows_plan(tokens, width)
        ),
    }  # fmt: skip
    number = f"{capability // 10}.{capability % 10}"
    with mock.patch.object(fused_gpu, "capability", return_value=number):
        return compiled(BY_NAME[name], capability, launches[name])
