"""Where the time of ``fungi-e2e`` goes, by PyTorch's profiler.

``cd benchmarks && python -m fungi.e2e_profile fungi-e2e-dino fmkernels-bfloat16`` prints the share
of each group of operators in a call, and the time of a call. One thread, so that shares are work.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter

import torch
from torch.profiler import profile, record_function

from fungi import e2e
from fungi.e2e_providers import PROVIDERS

GROUPS = {
    "linear layers": ("addmm", "mm", "_linear_pointwise"),
    "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product_flash_attention_for_cpu"),
    "activations": ("gelu",),
    "norms": ("native_layer_norm",),
    "resampling of pictures": ("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
    "patch embedding": ("mkldnn_convolution",),
    "copies and casts": ("copy_", "cat", "_reorder_linear_weight"),
    "sums, scales": ("add", "add_", "sub", "sub_", "mul", "div", "div_", "sum", "mean"),
}
"""Operators by their names, without the namespace."""


def shares(name: str, provider: str) -> tuple[float, Counter[str]]:
    """Milliseconds of a call, and those of each group."""
    step = e2e.WORKLOADS[name].step(provider)
    step()
    with profile() as profiled, record_function("call"):
        step()
    group_of = {operator: group for group, own in GROUPS.items() for operator in own}
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        operator = event.key.rpartition("::")[2]
        found[group_of.get(operator, "everything else")] += event.self_cpu_time_total / 1e3
    return sum(found.values()), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=e2e.WORKLOADS)
    parser.add_argument("provider", choices=PROVIDERS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # fungivision's
    torch.set_num_threads(1)
    total, found = shares(options.workload, options.provider)
    print(f"{options.workload}, {options.provider}: {total:.0f} ms a call")
    for group, taken in found.most_common():
        print(f"{taken / total:6.1%}  {group}")


if __name__ == "__main__":
    main()
