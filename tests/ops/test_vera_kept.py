"""VeRA: how many products there are, what is kept for backward, and which form is taken."""

from collections import Counter

import pytest
import torch
from vera_layers import SIZES_OF, layer

import fmkernels
from fmkernels.ops.vera_linear.formulation import formulation


def products(function):
    """The sizes (rows, inner, columns) of the matrix products of a call, and how many there are."""
    with torch.profiler.profile(record_shapes=True) as profiled:
        function()
    sizes = Counter()
    for event in profiled.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            sizes[a[0], a[1], b[1]] += 1
    return sizes


def test_query_key_and_value_share_one_u_and_one_gradient_of_x():
    tokens, width, rank = 30, 8, 3
    x = torch.randn(tokens, width, requires_grad=True)
    A, B = torch.randn(rank, width), torch.randn(width, rank)

    def step():
        u = fmkernels.vera_shrink(x, A)
        total = 0
        for _ in range(3):
            d, b = torch.randn(rank, requires_grad=True), torch.randn(width, requires_grad=True)
            total = total + fmkernels.vera_expand(torch.zeros(tokens, width), u, d, b, B)
        total.sum().backward()

    assert products(step) == {
        (tokens, width, rank): 1 + 3,  # U; and of each dU
        (tokens, rank, width): 3 + 1,  # Y of each; and dX
        (width, tokens, rank): 3,  # M of each
    }


def kept(function):
    """The tensors that a call keeps for backward."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("several", [None, 4])
def test_u_and_the_vectors_are_kept_and_nothing_else_of_many_rows(dtype, several):
    problem = layer(90, 32, 24, 4, several).to(dtype, torch.float32)
    ids = None if several is None else torch.randint(-1, 4, (90,))
    saved = kept(lambda: fmkernels.vera_linear(*problem, adapter_ids=ids))
    large = [x for x in saved if x.shape[:1] == (90,) and x.ndim == 2]
    assert [tuple(x.shape) for x in large] == [(90, 4)]
    assert large[0].dtype == dtype
    shared = {x.data_ptr() for x in problem if x is not None}
    rest = [x for x in saved if x.shape[:1] != (90,)]
    assert all(x.data_ptr() in shared for x in rest)


def test_a_dense_form_keeps_x_and_the_update():
    problem = layer(90, 16, 12, 64).to(torch.float32)
    for merge in (False, True):
        saved = kept(lambda merge=merge: fmkernels.vera_linear(*problem, merge=merge))
        own = {x.data_ptr() for x in problem if x is not None}
        assert problem.x.data_ptr() in {x.data_ptr() for x in saved}
        assert [tuple(x.shape) for x in saved if x.data_ptr() not in own] == [(12, 16)]


def test_memory_does_not_grow_with_the_number_of_adapters():
    """But for their own rows: what autograd keeps is the same, whatever N."""
    sizes = []
    for count in (2, 500):
        problem = layer(64, 32, 24, 4, count).to(torch.float32)
        ids = torch.randint(-1, count, (64,))
        own = {x.data_ptr() for x in problem if x is not None}
        saved = kept(lambda p=problem, i=ids: fmkernels.vera_linear(*p, adapter_ids=i))
        sizes.append(sum(x.nbytes for x in saved if x.data_ptr() not in own))
    assert sizes[0] == sizes[1]


def test_a_folded_update_leaves_the_products_of_the_base_layer():
    tokens, into, out, rank = 64, 24, 20, 3
    problem = layer(tokens, into, out, rank).to(torch.float32)

    def step(**settings):
        fmkernels.vera_linear(*problem, **settings).sum().backward()

    own = {(tokens, into, rank): 1, (out, tokens, rank): 1}  # U and M
    base = {(tokens, into, out): 1, (tokens, out, into): 1}  # Y and dX
    assert products(step) == own | base | {(out, rank, into): 2}  # and W0 + ΔW twice
    folded = own | base | {(tokens, rank, out): 1, (out, rank, into): 1}  # the update of Y
    assert products(lambda: step(merge=False)) == folded


def test_which_form_is_taken():
    def form(*sizes, builds=True, merge=False, **sharing):
        return formulation(*sizes, builds=builds, merge=merge, **sharing)

    roberta, vit, llama = (2048, 768, 768, 1024), (2048, 1024, 1024, 256), (512, 4096, 4096, 256)
    assert form(*roberta) == form(*roberta, parts=2) == "apart"
    assert form(*roberta, merge=True) == "merged"
    assert form(*roberta, merge=True, keeps_x=False) == "refolded"
    assert form(*vit) == form(*vit, parts=2) == "folded"
    assert form(*vit, merge=True) == "refolded"
    assert form(*llama) == form(*llama, merge=True) == "products"
    assert form(*roberta, builds=False, merge=True) == "products"
    assert form(1, 768, 768, 1024, merge=True) == "products"
    few = (700, 1024, 1024, 256)  # what is folded serves one layer, a product of dU several
    assert form(*few) == "folded"
    assert form(*few, readers=3) == "products"
    for name, sizes in SIZES_OF.items():
        assert form(*sizes, merge=name != "apart") == name
    for tokens in (1, 16, 300, 5000):
        for rank in (1, 64, 700, 3000):
            costs = {
                "products": tokens * rank * (2 * 640 + 3 * 320),
                "folded": tokens * rank * (640 + 2 * 320) + 640 * 320 * rank,
                "apart": 2 * tokens * 640 * 320 + 2 * 640 * 320 * rank,
            }
            assert form(tokens, 640, 320, rank) == min(costs, key=costs.get)
