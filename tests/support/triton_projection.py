"""The Triton kernels of project_gradients, compiled ahead of time."""

import torch
from triton_aot import compiled

from fmkernels.ops.project_gradients import gpu_launch, triton
from fmkernels.ops.project_gradients.gpu_config import signs_plan, sketch_plan

POINTERS = {
    triton.project_gradients_prepare_kernel: "p_values p_offsets p_scaled p_exponent",
    triton.project_gradients_sketch_kernel: "p_delta p_a p_parts",
    triton.project_gradients_signs_kernel: "p_x p_delta p_words p_parts",
    triton.project_gradients_finish_kernel: (
        "p_parts p_right p_offsets p_delta_exponent p_exponent p_sums p_result"
    ),
}
BY_NAME = {kernel.fn.__name__: kernel for kernel in POINTERS}


def arguments_of(
    launcher, *, width=768, dim=768, pairs=64, bias=True, dtype=torch.float32, packed=False,
    weighted=True, offsets=False, factored=False, repeats=1, parts=25,
):  # fmt: skip
    """What a launcher is called with, on CPU tensors, for a layer from ``width`` to ``width``."""
    each = 1 if pairs == 1 or offsets else 2
    boundaries = torch.zeros(pairs + 1, dtype=torch.int64) if offsets else None
    samples = gpu_launch.Samples(boundaries, each, pairs // each)
    delta, a = torch.zeros(2, pairs, width + 1)
    if launcher == "prepare":
        return torch.zeros(pairs, width, dtype=dtype), samples, bias
    if launcher == "sketch":
        plan = sketch_plan(pairs, width, width, bias, dim)
        return delta, a, torch.zeros(1, pairs, dim), bias, 42, 0, repeats, plan
    if launcher == "signs":
        words = torch.zeros(-(-dim // 16), 1, 16, dtype=torch.int32) if packed else None
        matrix = gpu_launch.Matrix(42, 2**24, packed=words)
        coefficients = delta[:, :-1] if weighted else None
        plan = signs_plan(width, width)
        return a[:, :-1], coefficients, width, matrix, torch.zeros(1, pairs, dim), 0, plan
    exponents = torch.zeros(samples.batch, dtype=torch.int32)
    sums = torch.zeros(samples.batch, dim, dtype=torch.float64)
    left = torch.zeros(1 if factored else parts, pairs, dim)
    right = left if factored else None
    return left, right, samples, (exponents, exponents), sums, sums.float(), 3, 0.25


def compile_for(name, capability, **case):
    """A kernel at the launch that is shipped."""
    short = name.removeprefix("project_gradients_").removesuffix("_kernel")
    arguments = arguments_of(short, **case)
    return compiled(BY_NAME[name], capability, lambda: getattr(gpu_launch, short)(*arguments))
