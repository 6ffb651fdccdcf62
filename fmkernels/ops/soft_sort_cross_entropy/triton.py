"""soft_sort_cross_entropy on NVIDIA GPUs with Triton; ops/soft_sort/triton.py has the design."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops.soft_sort.triton import (
    clear_grad_keep,
    common_arguments,
    options,
    plan_for,
    sort_rows,
    sort_rows_backward,
    sort_values,
    sort_values_backward,
)
from fmkernels.ops.soft_sort.triton_math import log
from fmkernels.ops.soft_sort_cross_entropy.gpu import loss_alone, loss_and_gradient

FLOOR = tl.constexpr(2.0**-100)


@triton.jit
def soft_sort_cross_entropy_kernel(
    p_student, p_teacher, p_weight, p_losses, p_grad_student, p_network, p_workspace, queries, n,
    n_layers, slot, steepness, teacher_steepness, art_lambda, DISTRIBUTION: tl.constexpr,
    WITH_GRAD: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Every query's weighted loss, and (if asked) its gradient in the student's scores."""
    i_program = tl.program_id(0).to(tl.int64)
    row_size = tl.full((), 0, tl.int64) + n
    p_student_weights = p_workspace + i_program * slot
    p_teacher_weights = p_student_weights + 5 * n_layers * N
    p_tape = p_teacher_weights + 2 * n_layers * N
    o_wire = tl.arange(0, N)
    m_wire = o_wire < n
    for i_query in range(i_program, queries, tl.num_programs(0)):
        o_query = i_query * row_size
        b_teacher = tl.load(p_teacher + o_query + o_wire, mask=m_wire, other=0.0).to(tl.float32)
        b_student = tl.load(p_student + o_query + o_wire, mask=m_wire, other=0.0).to(tl.float32)
        tl.debug_barrier()  # the slot is still read for the query before
        sort_values(
            b_teacher, p_network, n_layers, o_wire, p_teacher_weights, teacher_steepness,
            art_lambda, DISTRIBUTION, False, N,
        )  # fmt: skip
        sort_values(
            b_student, p_network, n_layers, o_wire, p_student_weights, steepness, art_lambda,
            DISTRIBUTION, WITH_GRAD, N,
        )  # fmt: skip
        if WITH_GRAD:
            clear_grad_keep(n_layers, o_wire, p_student_weights, N)
        tl.debug_barrier()
        loss = 0.0
        mean = 1.0 / (tl.full((), 0, tl.float32) + n)
        for i_row in range(0, n, R):
            o_row = i_row + tl.arange(0, R)
            start = (o_row[:, None] == o_wire[None, :]).to(tl.float32)
            q = sort_rows(  # carries the mean over the inputs
                start * mean, p_network, n_layers, o_wire, p_teacher_weights, p_tape, False, R, N
            )
            p = sort_rows(
                start, p_network, n_layers, o_wire, p_student_weights, p_tape, WITH_GRAD, R, N
            )
            m_tile = (o_row < n)[:, None] & m_wire[None, :]
            terms = q * log(tl.where(p < FLOOR, FLOOR, p))
            loss -= tl.sum(tl.sum(tl.where(m_tile, terms, 0.0), axis=1), axis=0)
            if WITH_GRAD:
                inside = m_tile & (p > FLOOR)
                grad = tl.where(inside, -q / tl.where(inside, p, 1.0), 0.0)
                tl.debug_barrier()
                sort_rows_backward(
                    grad, p_network, n_layers, o_wire, p_student_weights, p_tape, R, N
                )
                tl.debug_barrier()
        weight = tl.load(p_weight + i_query)
        counts = weight != 0  # a weight of zero removes even a NaN
        tl.store(p_losses + i_query, tl.where(counts, weight * loss, 0.0))
        if WITH_GRAD:
            b_grad = tl.zeros((N,), tl.float32)
            b_grad = sort_values_backward(b_grad, p_network, n_layers, o_wire, p_student_weights, N)
            b_grad = tl.where(counts, weight * b_grad, 0.0)
            tl.store(p_grad_student + o_query + o_wire, b_grad, mask=m_wire)


def launch(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    losses: Tensor,
    grad: Tensor | None,
    steepness: float,
    teacher_steepness: float,
    network: str,
    distribution: str,
    art_lambda: float,
) -> None:
    """Start the kernel; see ``gpu.py`` for the arguments."""
    plan = plan_for(student, network)
    soft_sort_cross_entropy_kernel[(plan.grid,)](
        student.contiguous(),
        teacher.contiguous(),
        weights,
        losses,
        losses if grad is None else grad,
        *common_arguments(student, network, plan),
        steepness,
        teacher_steepness,
        art_lambda,
        DISTRIBUTION=distribution,
        WITH_GRAD=grad is not None,
        R=plan.config.rows,
        N=plan.wires,
        **options(plan.config),
    )


soft_sort_cross_entropy = functools.partial(loss_and_gradient, launch)
soft_sort_cross_entropy_loss = functools.partial(loss_alone, launch)
