"""The Triton kernels of the sort, compiled ahead of time."""

from triton_aot import compiled

from fmkernels.ops.soft_sort import triton as soft_sort
from fmkernels.ops.soft_sort.config import heuristic, padded
from fmkernels.ops.soft_sort_cross_entropy import triton as cross_entropy

POINTERS = {
    soft_sort.soft_sort_fwd_kernel: "p_scores p_values p_permutation",
    soft_sort.soft_sort_bwd_kernel: "p_grad_values p_grad_permutation p_scores p_grad_scores",
    cross_entropy.soft_sort_cross_entropy_kernel: "p_student p_teacher p_weight p_losses p_grad_student",
}
NARROW = "p_scores p_values p_permutation p_grad_values p_grad_permutation p_grad_scores p_student p_teacher"
"""Those that have the dtype of the input."""
BY_NAME = {kernel.fn.__name__: kernel for kernel in POINTERS}


def compile_for(name, capability, n, distribution="cauchy", dtype="fp32", config=None, ones=()):
    """A kernel of the sort for rows of n, at the launch that is shipped or another."""
    kernel, config = BY_NAME[name], config or heuristic(n, f"{capability / 10:.1f}")
    pointers = {p: f"*{dtype if p in NARROW.split() else 'fp32'}" for p in POINTERS[kernel].split()}
    arguments = (
        pointers
        | {
            "p_network": "*i32",
            "p_workspace": "*fp32",
            **dict.fromkeys(("queries", "n", "n_layers", "slot"), "i32"),
            **dict.fromkeys(("steepness", "teacher_steepness", "art_lambda"), "fp32"),
            **dict.fromkeys(("HAS_VALUES", "HAS_PERMUTATION", "WITH_GRAD"), True),
            "DISTRIBUTION": distribution,
            "R": config.rows,
            "N": padded(n),
        }
        | dict.fromkeys(ones, 1)
    )
    return compiled(kernel, capability, arguments, **soft_sort.options(config))
