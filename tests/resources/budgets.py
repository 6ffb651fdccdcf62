"""What every GPU kernel may take, on each architecture: the one table of the gate.

No kernel may have a stack or local memory: a spilled register costs a trip through the level-1
cache at every use.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """Most registers of a thread, most shared bytes of a program (those known when it is compiled)."""

    registers: int
    shared_bytes: int


BUDGETS = {
    "soft_sort_fwd_kernel": Budget(112, 4096),
    "soft_sort_bwd_kernel": Budget(128, 4096),
    "soft_sort_cross_entropy_kernel": Budget(128, 4096),
    "soft_sort_fwd_cuda": Budget(128, 1024),
    "soft_sort_bwd_cuda": Budget(128, 1024),
    "soft_sort_cross_entropy_cuda": Budget(128, 1024),
}


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
