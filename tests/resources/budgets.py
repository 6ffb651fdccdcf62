"""What every GPU kernel may take, on each architecture: the one table of the gate.

No kernel may have a stack or local memory: a spilled register costs a trip through the level-1
cache at every use.
"""

import re
from typing import NamedTuple


class Budget(NamedTuple):
    """Most registers of a thread, most shared bytes that are known when a kernel is compiled."""

    registers: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...] = ()
    """Those that its code must have, such as ``"wgmma"``; it may have no others."""


BUDGETS = {
    "soft_sort_fwd_kernel": Budget(112, 4096),
    "soft_sort_bwd_kernel": Budget(128, 4096),
    "soft_sort_cross_entropy_kernel": Budget(128, 4096),
    "knn_prepare_kernel": Budget(64, 4096),
    "knn_candidates_kernel": Budget(255, 200_704),
    "knn_listing_kernel": Budget(64, 1024),
    "knn_score_kernel": Budget(96, 2048),
    "knn_merge_kernel": Budget(128, 1024),
    "vera_matrices_kernel": Budget(48, 4096),
    "vera_shrink_kernel": Budget(128, 98_320),
    "vera_sum_kernel": Budget(48, 2048),
    "vera_expand_kernel": Budget(232, 83_472),
    "vera_grad_u_kernel": Budget(232, 98_320),
    "vera_grad_b_kernel": Budget(184, 82_448),
    "vera_contract_kernel": Budget(255, 98_320),
    "vera_fused_kernel": Budget(240, 147_456),
    "vera_dropout_kernel": Budget(64, 4096),
    "dvora_scale_kernel": Budget(64, 2048),
    "dvora_scale_backward_kernel": Budget(128, 4096),
    "project_gradients_prepare_kernel": Budget(48, 4096),
    "project_gradients_sketch_kernel": Budget(96, 0),
    "project_gradients_signs_kernel": Budget(168, 18_440),
    "project_gradients_finish_kernel": Budget(40, 0),
    "soft_sort_fwd_cuda": Budget(128, 1024),
    "soft_sort_bwd_cuda": Budget(128, 1024),
    "soft_sort_cross_entropy_cuda": Budget(128, 1024),
}


class Shared(NamedTuple):
    """Bytes of shared memory."""

    of_a_block: int
    of_a_multiprocessor: int


SHARED = {
    "sm_80": Shared(166_912, 167_936),
    "sm_90a": Shared(232_448, 233_472),
    "sm_100": Shared(232_448, 233_472),
    "sm_120": Shared(101_376, 102_400),
}
"""What these GPUs have: A100; H100 and H200; B200; RTX 50."""


class Block(NamedTuple):
    """What a block of a CUDA kernel takes when it is launched, and how many run side by side."""

    shared_bytes: int
    per_multiprocessor: int


BLOCKS = {
    "soft_sort_fwd_cuda": {
        "sm_80": Block(17_388, 9),
        "sm_90a": Block(17_388, 12),
        "sm_100": Block(17_388, 12),
        "sm_120": Block(17_388, 5),
    },
    "soft_sort_bwd_cuda": {
        "sm_80": Block(76_104, 2),
        "sm_90a": Block(76_104, 3),
        "sm_100": Block(76_104, 3),
        "sm_120": Block(76_104, 1),
    },
    "soft_sort_cross_entropy_cuda": {
        "sm_80": Block(54_048, 3),
        "sm_90a": Block(92_512, 2),
        "sm_100": Block(92_512, 2),
        "sm_120": Block(92_512, 1),
    },
}
"""For 49 values (bitonic), with a gradient where the kernel can have one; see ``block_plan``."""


def violations(kernel, architecture, used):
    """In words, with numbers: what ``used`` (a ``Resources``) is over its budget."""
    budget = BUDGETS[kernel]
    limits = {"registers": budget.registers, "shared_bytes": budget.shared_bytes}
    limits |= {"stack_bytes": 0, "local_bytes": 0}
    return [
        f"{kernel} on {architecture}: {name}: {getattr(used, name)} used, {limit} allowed"
        for name, limit in limits.items()
        if getattr(used, name) > limit
    ]


def matrix_violations(kernel, architecture, ptx, wanted=None):
    """Matrix instructions that the kernel's PTX has and should not have, or the reverse.

    wanted: if it depends on the launch, and not on the kernel alone.
    """
    found = {*re.findall(r"\b(wgmma|tcgen05\.mma|mma)\.", ptx)}
    wanted = {*BUDGETS[kernel].matrix_instructions} if wanted is None else {*wanted}
    if found == wanted:
        return []
    words = (", ".join(sorted(names)) or "none" for names in (found, wanted))
    return [
        "{} on {}: matrix instructions: {} found, {} wanted".format(kernel, architecture, *words)
    ]
