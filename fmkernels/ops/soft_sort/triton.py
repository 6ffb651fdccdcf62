"""soft_sort on NVIDIA GPUs with Triton.

One program sorts one query at a time: its wires lie along a tile, R rows of X below each other, and
a comparator is a gather of the partner's wire. The network is a table in memory, so one kernel
serves every wiring and size. Phases of a program:

    values   the wires through all layers; keep, swap and slopes of every layer go to scratch
    rows     R rows of X at a time through all layers; the differences go to scratch ("tape")
    back     the same rows' gradient through the layers, last first, summed over rows
    values   the wires' gradient, last layer first

Scratch is a slot of the workspace that the program uses again for its next query, so it stays in
the level-2 cache; docs/kernels/triton.md counts the traffic. The arithmetic is that of
csrc/include/fmkernels/soft_sort.h.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels._tuned import capability
from fmkernels.ops.soft_sort.config import Config, Plan, heuristic, launch_plan
from fmkernels.ops.soft_sort.kept import kept
from fmkernels.ops.soft_sort.networks import layers
from fmkernels.ops.soft_sort.triton_math import cauchy_tail, divide, erfc, exp, power

IS_LO = tl.constexpr(1 << 16)
"""Bit of the network table that says that the wire is its comparator's ``lo``."""


@triton.jit
def soft_swap_tail(delta, steepness, art_lambda, DISTRIBUTION: tl.constexpr):
    """The smaller weight of a comparator, ∂keep/∂Δ, and Δ·∂keep/∂Δ."""
    v = steepness * delta
    a = tl.abs(v)
    if DISTRIBUTION == "cauchy":
        tail = cauchy_tail(a)
        density = 0.318309886183790672 / (1.0 + a * a)
    elif DISTRIBUTION == "reciprocal":
        tail = divide(1.0, 2.0 + a)
        density = tail * tail
    elif DISTRIBUTION == "optimal":
        far = a > 0.25
        safe = tl.where(far, a, 1.0)
        far_tail = divide(0.0625, safe)
        tail = tl.where(far, far_tail, 0.5 - a)
        density = tl.where(far, far_tail / safe, 1.0)
    elif DISTRIBUTION == "gaussian":
        tail = 0.5 * erfc(a * 0.707106781186547524)
        density = exp(-0.5 * a * a) * 0.398942280401432678
    else:
        scale = 1.0
        if DISTRIBUTION == "logistic_phi":
            distance = tl.abs(delta) + 1e-10
            sharpness = power(distance, 0.0 * distance - art_lambda)
            scale = sharpness * (1.0 - art_lambda * (tl.abs(delta) / distance))
            a = a * sharpness
        e = exp(-a)
        keep = divide(1.0, 1.0 + e)
        tail = e * keep
        density = tail * keep * scale
    return tail, steepness * density, v * density


@triton.jit
def load_network(p_network, i_layer, o_wire, N: tl.constexpr):
    """The partner of every wire in a layer (itself if it has none), and whether it is the lo."""
    code = tl.load(p_network + i_layer * N + o_wire)
    return code & (IS_LO - 1), code >= IS_LO


@triton.jit
def sort_values(
    x, p_network, n_layers, o_wire, p_weights, steepness, art_lambda,
    DISTRIBUTION: tl.constexpr, SLOPES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The values (N,) through all layers; keep, swap (and slope, elastic) to p_weights.

    What rounding takes from the sums is kept in ``rest``, because everything that follows depends
    on small differences of the values.
    """
    rest = tl.zeros_like(x)
    for i_layer in range(n_layers):
        partner, is_lo = load_network(p_network, i_layer, o_wire, N)
        idle = partner == o_wire
        other = tl.gather(x, partner, 0)
        other_rest = tl.gather(rest, partner, 0)
        difference = (other - x) + (other_rest - rest)
        delta = tl.where(is_lo, difference, -difference)  # x_hi − x_lo, the same on both wires
        tail, slope, elastic = soft_swap_tail(delta, steepness, art_lambda, DISTRIBUTION)
        reversed_ = delta < 0
        keep = tl.where(reversed_, tail, 1.0 - tail)
        swap = tl.where(reversed_, 1.0 - tail, tail)
        p_layer = p_weights + i_layer * N + o_wire
        size = n_layers * N
        tl.store(p_layer, tl.where(idle, 1.0, keep))
        tl.store(p_layer + size, tl.where(idle, 0.0, swap))
        if SLOPES:
            tl.store(p_layer + 2 * size, tl.where(idle, 0.0, slope))
            tl.store(p_layer + 3 * size, tl.where(idle, 0.0, elastic))
        shift = tail * tl.abs(delta)
        shift = tl.where(is_lo, shift, -shift)
        base = tl.where(reversed_, other, x)
        base_rest = tl.where(reversed_, other_rest, rest)
        total = base + shift
        rounded_shift = total - base
        lost = (base - (total - rounded_shift)) + (shift - rounded_shift)
        x = tl.where(idle, x, total)
        rest = tl.where(idle, rest, lost + base_rest)
    return x + rest


@triton.jit
def sort_rows(
    state, p_network, n_layers, o_wire, p_weights, p_tape, TAPE: tl.constexpr, R: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Rows of X (R, N) through all layers; the differences of every layer to p_tape."""
    o_tile = tl.arange(0, R)[:, None] * N + o_wire[None, :]
    for i_layer in range(n_layers):
        partner, _ = load_network(p_network, i_layer, o_wire, N)
        p_layer = p_weights + i_layer * N + o_wire
        keep, swap = tl.load(p_layer), tl.load(p_layer + n_layers * N)
        other = tl.gather(state, tl.broadcast_to(partner[None, :], (R, N)), 1)
        if TAPE:
            tl.store(p_tape + i_layer * (R * N) + o_tile, state - other)
        state = keep[None, :] * state + swap[None, :] * other
    return state


@triton.jit
def sort_rows_backward(
    grad, p_network, n_layers, o_wire, p_weights, p_tape, R: tl.constexpr, N: tl.constexpr
):
    """Back with the gradient of the rows (R, N): adds Σ e·d to the gradient of every keep."""
    o_tile = tl.arange(0, R)[:, None] * N + o_wire[None, :]
    size = n_layers * N
    for i_reverse in range(n_layers):
        i_layer = n_layers - 1 - i_reverse
        partner, _ = load_network(p_network, i_layer, o_wire, N)
        p_layer = p_weights + i_layer * N + o_wire
        keep, swap, grad_keep = (
            tl.load(p_layer),
            tl.load(p_layer + size),
            tl.load(p_layer + 4 * size),
        )
        other = tl.gather(grad, tl.broadcast_to(partner[None, :], (R, N)), 1)
        difference = tl.load(p_tape + i_layer * (R * N) + o_tile)
        grad_keep += tl.sum((grad - other) * difference, axis=0)
        # Several warps may hold the same wire, and one that stores be ahead of one that has yet to
        # load. Whether the sum makes them wait depends on the tile and the number of warps.
        tl.debug_barrier()
        tl.store(p_layer + 4 * size, grad_keep)
        grad = keep[None, :] * grad + swap[None, :] * other


@triton.jit
def clear_grad_keep(n_layers, o_wire, p_weights, N: tl.constexpr):
    for i_layer in range(n_layers):
        p_layer = p_weights + i_layer * N + o_wire
        tl.store(p_layer + 4 * n_layers * N, tl.zeros_like(o_wire).to(tl.float32))


@triton.jit
def sort_values_backward(grad, p_network, n_layers, o_wire, p_weights, N: tl.constexpr):
    """Gradient of the scores (N,), from that of the sorted values and of every keep."""
    size = n_layers * N
    for i_reverse in range(n_layers):
        i_layer = n_layers - 1 - i_reverse
        partner, is_lo = load_network(p_network, i_layer, o_wire, N)
        p_layer = p_weights + i_layer * N + o_wire
        keep, swap = tl.load(p_layer), tl.load(p_layer + size)
        slope, elastic = tl.load(p_layer + 2 * size), tl.load(p_layer + 3 * size)
        other = tl.gather(grad, partner, 0)
        lo_minus_hi = tl.where(is_lo, grad - other, other - grad)
        d_delta = tl.load(p_layer + 4 * size) * slope - lo_minus_hi * elastic
        grad = keep * grad + swap * other + tl.where(is_lo, -d_delta, d_delta)
    return grad


@triton.jit
def soft_sort_fwd_kernel(
    p_scores, p_values, p_permutation, p_network, p_workspace, queries, n, n_layers, slot,
    steepness, art_lambda, DISTRIBUTION: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    row_size = tl.full((), 0, tl.int64) + n
    p_weights = p_workspace + i_program * slot
    o_wire = tl.arange(0, N)
    m_wire = o_wire < n
    for i_query in range(i_program, queries, tl.num_programs(0)):
        o_query = i_query * row_size
        b_scores = tl.load(p_scores + o_query + o_wire, mask=m_wire, other=0.0).to(tl.float32)
        tl.debug_barrier()  # the slot is still read for the query before
        b_values = sort_values(
            b_scores, p_network, n_layers, o_wire, p_weights, steepness, art_lambda,
            DISTRIBUTION, False, N,
        )  # fmt: skip
        tl.store(p_values + o_query + o_wire, b_values, mask=m_wire)
        tl.debug_barrier()
        for i_row in range(0, n, R):
            o_row = i_row + tl.arange(0, R)
            state = (o_row[:, None] == o_wire[None, :]).to(tl.float32)
            state = sort_rows(state, p_network, n_layers, o_wire, p_weights, p_weights, False, R, N)
            o_tile = (o_query + o_row)[:, None] * n + o_wire[None, :]
            m_tile = (o_row < n)[:, None] & m_wire[None, :]
            tl.store(p_permutation + o_tile, state, mask=m_tile)


@triton.jit
def soft_sort_bwd_kernel(
    p_grad_values, p_grad_permutation, p_scores, p_grad_scores, p_network, p_workspace, queries,
    n, n_layers, slot, steepness, art_lambda, DISTRIBUTION: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_PERMUTATION: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    row_size = tl.full((), 0, tl.int64) + n
    p_weights = p_workspace + i_program * slot
    p_tape = p_weights + 5 * n_layers * N
    o_wire = tl.arange(0, N)
    m_wire = o_wire < n
    for i_query in range(i_program, queries, tl.num_programs(0)):
        o_query = i_query * row_size
        b_scores = tl.load(p_scores + o_query + o_wire, mask=m_wire, other=0.0).to(tl.float32)
        tl.debug_barrier()  # the slot is still read for the query before
        sort_values(
            b_scores, p_network, n_layers, o_wire, p_weights, steepness, art_lambda,
            DISTRIBUTION, True, N,
        )  # fmt: skip
        clear_grad_keep(n_layers, o_wire, p_weights, N)
        tl.debug_barrier()
        if HAS_PERMUTATION:
            for i_row in range(0, n, R):
                o_row = i_row + tl.arange(0, R)
                state = (o_row[:, None] == o_wire[None, :]).to(tl.float32)
                sort_rows(state, p_network, n_layers, o_wire, p_weights, p_tape, True, R, N)
                o_tile = (o_query + o_row)[:, None] * n + o_wire[None, :]
                m_tile = (o_row < n)[:, None] & m_wire[None, :]
                grad = tl.load(p_grad_permutation + o_tile, mask=m_tile, other=0.0).to(tl.float32)
                tl.debug_barrier()
                sort_rows_backward(grad, p_network, n_layers, o_wire, p_weights, p_tape, R, N)
                tl.debug_barrier()
        b_grad = tl.zeros((N,), tl.float32)
        if HAS_VALUES:
            b_grad = tl.load(p_grad_values + o_query + o_wire, mask=m_wire, other=0.0)
            b_grad = b_grad.to(tl.float32)
        b_grad = sort_values_backward(b_grad, p_network, n_layers, o_wire, p_weights, N)
        tl.store(p_grad_scores + o_query + o_wire, b_grad, mask=m_wire)


@kept
def network_table(network: str, n: int, wires: int, device: torch.device) -> Tensor:
    """(layers, wires) int32: every wire's partner, plus IS_LO; a wire without one has itself."""
    table = torch.arange(wires, dtype=torch.int32).repeat(len(layers(network, n)), 1)
    for row, (lo, hi) in zip(table, layers(network, n), strict=True):
        row[list(lo)] = torch.tensor(hi, dtype=torch.int32) + IS_LO.value
        row[list(hi)] = torch.tensor(lo, dtype=torch.int32)
    return table.to(device)


def plan_for(scores: Tensor, network: str) -> Plan:
    """The launch for these scores on their device."""
    n = scores.shape[-1]
    multiprocessors = 1
    if scores.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(scores.device).multi_processor_count
    config = heuristic(n, capability(scores.device))
    return launch_plan(scores.numel() // n, n, len(layers(network, n)), multiprocessors, config)


def options(config: Config) -> dict[str, Any]:
    """What the compiler is told; the default of ``enable_fp_fusion`` is about to change."""
    return {
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }


def common_arguments(
    scores: Tensor, network: str, plan: Plan
) -> tuple[Tensor, Tensor, int, int, int, int]:
    """Network table, workspace, queries, n, layers, slot: what every kernel takes."""
    n = scores.shape[-1]
    table = network_table(network, n, plan.wires, scores.device)
    workspace = torch.empty(plan.workspace, dtype=torch.float32, device=scores.device)
    return table, workspace, scores.numel() // n, n, len(table), plan.slot


def soft_sort(
    scores: Tensor,
    steepness: float = 100.0,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """(…, n) -> sorted values (…, n) and permutation (…, n, n)."""
    n = scores.shape[-1]
    values = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    permutation = torch.empty((*scores.shape, n), dtype=scores.dtype, device=scores.device)
    if scores.numel() == 0:
        return values, permutation
    plan = plan_for(scores, network)
    soft_sort_fwd_kernel[(plan.grid,)](
        scores.contiguous(),
        values,
        permutation,
        *common_arguments(scores, network, plan),
        steepness,
        art_lambda,
        DISTRIBUTION=distribution,
        R=plan.config.rows,
        N=plan.wires,
        **options(plan.config),
    )
    return values, permutation


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
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if scores.numel() == 0:
        return grad_scores
    plan = plan_for(scores, network)
    soft_sort_bwd_kernel[(plan.grid,)](
        scores if grad_values is None else grad_values.contiguous(),
        scores if grad_permutation is None else grad_permutation.contiguous(),
        scores.contiguous(),
        grad_scores,
        *common_arguments(scores, network, plan),
        steepness,
        art_lambda,
        DISTRIBUTION=distribution,
        HAS_VALUES=grad_values is not None,
        HAS_PERMUTATION=grad_permutation is not None,
        R=plan.config.rows,
        N=plan.wires,
        **options(plan.config),
    )
    return grad_scores
