"""The Triton kernels of knn, compiled ahead of time."""

import torch
from triton_aot import compiled

from fmkernels.ops.knn import gpu_launch, triton
from fmkernels.ops.knn.gpu_config import MAX_QUERIES, PITCH, Segment, product, product_grid

POINTERS = {
    triton.knn_prepare_kernel: "p_rows p_copy p_squares p_lost p_exponent",
    triton.knn_candidates_kernel: (
        "p_queries p_rows p_factor p_addend p_half p_weight p_threshold p_count p_buckets p_words"
    ),
    triton.knn_listing_kernel: "p_count p_buckets p_words p_list p_length p_overflow",
    triton.knn_score_kernel: "p_queries p_rows p_list p_length p_scores",
    triton.knn_merge_kernel: (
        "p_scores p_rows p_new_scores p_new_rows p_length p_merged_scores p_merged_rows"
    ),
}
BY_NAME = {kernel.fn.__name__: kernel for kernel in POINTERS}

SEGMENT = Segment(16, 3, 64, 16, 48)


def arguments_of(
    name, capability, *, dim=384, metric="cosine", dtype=torch.float32, low=torch.float16,
    queries=MAX_QUERIES, k=30, capacity=512, copied=True,
):  # fmt: skip
    """What the launcher of a kernel is called with, on CPU tensors.

    queries: for how many the product's tile is made; there are 16.
    copied: the product's rows are a copy, and not rows of the bank.
    """
    q, bank = torch.zeros(16, dim, dtype=dtype), torch.zeros(64, dim, dtype=dtype)
    counts = torch.zeros(16, dtype=torch.int32)
    listed = torch.zeros(16, capacity, dtype=torch.int64)
    best = torch.zeros(16, k, dtype=torch.float64), torch.zeros(16, k, dtype=torch.int64)
    new = torch.zeros(16, capacity, dtype=torch.float64)
    words = torch.zeros(16, capacity, dtype=torch.int32)
    slots = gpu_launch.Slots(counts, words, words)
    pitch = -(-dim // PITCH) * PITCH
    tile = product(queries, low, f"{capability / 10:.1f}")
    rows = torch.zeros(64, pitch if copied else dim, dtype=low)
    segment = Segment(0, 1, 1, 0, 48) if copied else SEGMENT
    terms = (torch.zeros(48),) * 3
    return {
        "knn_prepare_kernel": (bank, SEGMENT, low if copied else None),
        "knn_candidates_kernel": (
            torch.zeros(16, pitch, dtype=low), rows, segment, terms, torch.zeros(16),
            torch.zeros(16), slots, tile, product_grid(16, 48, 1, tile),
        ),
        "knn_listing_kernel": (slots, SEGMENT, listed, counts, counts),
        "knn_score_kernel": (q, bank, listed, counts, new, 100, metric, 1),
        "knn_merge_kernel": (best, (new, listed), counts, best),
    }[name]  # fmt: skip


def compile_for(name, capability, metric="cosine", **case):
    """A kernel at the launch that is shipped."""
    arguments = arguments_of(name, capability, metric=metric, **case)
    named = {"squared": metric == "l2"} if name == "knn_candidates_kernel" else {}
    launcher = getattr(gpu_launch, name.removeprefix("knn_").removesuffix("_kernel"))
    return compiled(BY_NAME[name], capability, lambda: launcher(*arguments, **named))
