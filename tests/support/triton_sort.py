"""The Triton kernels of the sort, compiled ahead of time."""

import math
from unittest import mock

import torch
from triton_aot import compiled

from fmkernels.ops.soft_sort import triton as soft_sort
from fmkernels.ops.soft_sort.config import heuristic
from fmkernels.ops.soft_sort_cross_entropy import triton as cross_entropy

POINTERS = {
    soft_sort.soft_sort_fwd_kernel: "p_scores p_values p_permutation",
    soft_sort.soft_sort_bwd_kernel: "p_grad_values p_grad_permutation p_scores p_grad_scores",
    cross_entropy.soft_sort_cross_entropy_kernel: "p_student p_teacher p_weight p_losses p_grad_student",
}
BY_NAME = {kernel.fn.__name__: kernel for kernel in POINTERS}


def compile_for(
    name,
    capability,
    n,
    distribution="cauchy",
    dtype=torch.float32,
    queries=16,
    aligned=True,
    config=None,
):
    """A kernel of the sort for rows of n, at the launch that is shipped or another.

    aligned: whether the tensors that are handed in begin at a multiple of 16 bytes.
    """
    config = config or heuristic(n, f"{capability / 10:.1f}")

    def tensor(*shape):
        size, first = math.prod(shape), 0 if aligned else 1
        return torch.zeros(first + size, dtype=dtype)[first:].view(shape)

    x = tensor(queries, n)
    settings = (100.0, "bitonic", distribution)

    def launch():
        with mock.patch.object(soft_sort, "heuristic", return_value=config):
            if name == "soft_sort_fwd_kernel":
                soft_sort.soft_sort(x, *settings)
            elif name == "soft_sort_bwd_kernel":
                soft_sort.soft_sort_backward(x, tensor(queries, n, n), x, *settings)
            else:
                cross_entropy.soft_sort_cross_entropy(x, x, None, 100.0, *settings)

    return compiled(BY_NAME[name], capability, launch)
