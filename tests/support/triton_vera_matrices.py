"""The Triton kernel of vera_matrices, compiled ahead of time."""

import torch
from triton_aot import compiled

from fmkernels.ops.vera_matrices import reference, triton

KERNEL = triton.vera_matrices_kernel
NAME = KERNEL.fn.__name__
POINTERS = ("p_seed", "p_matrix")


def compile_for(capability, *, rows=256, columns=4096, dtype=torch.float32):
    """The kernel at the launch that is shipped, for a matrix of this size."""
    seed = torch.zeros((), dtype=torch.int64)
    arguments = (seed, reference.A_STREAM, rows, columns, dtype)
    return compiled(KERNEL, capability, lambda: triton.matrix(*arguments))
