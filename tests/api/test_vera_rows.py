"""An adapter for every row: as separate models, in outputs and in the gradients of all adapters."""

import copy

import pytest
import torch
import vera_reference as reference
from torch import nn
from vera_reference import BASE, CONFIGS, DTYPES, NAMES, Net, adapted, check_same

from fmkernels.api import AdapterPool, VeraConfig, get_vera_model
from fmkernels.api.vera_layer import VeraLayer

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SHAPES = {"2-D": (12,), "3-D": (5, 12), "4-D": (2, 3, 12)}


def results(model, names, x, grad, backward=None):
    """What a call with names gives: the output, x's gradient, and all adapters'."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x, adapter_names=names)
    (backward or (lambda: y.backward(grad)))()
    return {"y": y.detach(), "x": x.grad, **reference.gradients_of(model)}


def problem(model, names, dtype, shape=(5, 12), out=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (
        torch.randn(len(names), *sizes, generator=generator, dtype=torch.float64).to(dtype)
        for sizes in (shape, (*shape[:-1], out))
    )
    return x, grad


def check(model, names, dtype, shape=(5, 12), drop=None, where=""):
    x, grad = problem(model, names, dtype, shape)
    found = results(model, names, x, grad)
    given = model, names, x, grad
    plain = reference.rows_by_separate_models(*given, dtype, drop)
    exact = reference.rows_by_separate_models(*given, torch.float64, drop)
    check_same(found, plain, exact, dtype, where)
    for key, gradient in found.items():
        if key not in exact and gradient is not None:
            assert not gradient.any(), f"a gradient of {key}, which no row names"
    return found


@every_dtype
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_rows_are_those_of_separate_models(dtype, conv):
    model = adapted(Net(conv).to(dtype))
    for where, shape in SHAPES.items():
        check(model, NAMES, dtype, shape, where=where)


@every_dtype
def test_some_of_the_adapters_and_single_rows(dtype):
    model = adapted(Net().to(dtype))
    for names in (
        ["few"],
        ["mixed"],
        ["all", "all"],
        ["all", "dvora"],
        ["few", BASE],
        ["twin", "mixed", "all"],
    ):
        check(model, names, dtype, where=str(names))


@every_dtype
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_all_rows_of_the_base_are_the_base_model_bit_for_bit(dtype, conv):
    net = Net(conv).to(dtype)
    x = torch.randn(4, 5, 12, dtype=dtype)
    expected = net(x)
    model = adapted(net)
    assert torch.equal(model(x, adapter_names=[BASE] * 4), expected)
    assert not torch.equal(model(x), expected)
    y = model(x, adapter_names=["all", BASE, "twin", BASE])
    assert torch.equal(y[[1, 3]], model(x, adapter_names=[BASE] * 4)[[1, 3]])


@every_dtype
def test_names_do_what_the_active_adapter_does(dtype):
    model = adapted(Net().to(dtype))
    x, grad = problem(model, ["all"] * 6, dtype)
    for name in CONFIGS:
        model.set_adapter(name)
        check_active = results(model, None, x, grad)
        exact = reference.rows_by_separate_models(model, [name] * 6, x, grad, torch.float64)
        plain = reference.rows_by_separate_models(model, [name] * 6, x, grad, dtype)
        check_same(check_active, plain, exact, dtype, name)


def masked(x, p):
    """Dropout whose mask is a function of the row: separate models drop the same."""
    return torch.where((x.detach().double() * 512).floor() % 4 < 4 * p, 0, x / (1 - p))


@every_dtype
def test_dropout_in_training_is_each_adapter_s_own(dtype, monkeypatch):
    """Of layers whose input has the same numbers in every dtype; in float64, of all."""
    monkeypatch.setattr("fmkernels.api.vera_layer.vera_dropout", masked)
    for targets in (["q", "k", "v"], ["q", "k", "v", "up", "down"])[: 1 + (dtype == torch.float64)]:
        configs = {
            "p50": VeraConfig(r=4, target_modules=targets, vera_dropout=0.5),
            "p25": VeraConfig(r=4, target_modules=targets, vera_dropout=0.25),
            "none": VeraConfig(r=4, target_modules=targets),
        }
        names = ["p50", "p25", BASE, "none", "p50", "none"]
        model = adapted(Net().to(dtype), configs)
        y = check(model.train(), names, dtype, drop=masked)["y"]
        calm = check(model.eval(), names, dtype)["y"]
        is_same = [torch.equal(*rows) for rows in zip(y, calm, strict=True)]
        assert is_same == [False, False, True, True, False, True]


def test_real_dropout_drops_of_the_adapter_alone():
    configs = {"gone": VeraConfig(r=4, target_modules=["q"], vera_dropout=1.0)}
    model = adapted(Net(), configs).train()
    x = torch.randn(3, 5, 12)
    assert torch.equal(
        model(x, adapter_names=["gone", BASE, "gone"]), model(x, adapter_names=[BASE] * 3)
    )
    assert torch.equal(model(x), model(x, adapter_names=[BASE] * 3))


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@every_dtype
def test_base_layers_that_must_be_called(dtype, conv):
    """With hooks: each is called once, and what it gives is adapted."""
    net = Net(conv).to(dtype)
    calls = []
    for layer in (net.q, net.k, net.v, net.up, net.down):
        layer.register_forward_hook(lambda *_: calls.append(1))
    model = adapted(net)
    x, grad = problem(model, NAMES, dtype)
    results(model, NAMES, x, grad)
    calls.clear()
    found = results(model, NAMES, x, grad)
    assert len(calls) == 5
    given = model, NAMES, x, grad
    plain = reference.rows_by_separate_models(*given, dtype)
    check_same(found, plain, reference.rows_by_separate_models(*given, torch.float64), dtype)


def test_under_autocast():
    """As the separate models under autocast, which multiply in bfloat16."""
    model = adapted(Net())
    x, grad = problem(model, NAMES, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model, NAMES, x, grad.bfloat16())
    given = model, NAMES, x, grad.bfloat16()
    exact = reference.rows_by_separate_models(*given, torch.float64)
    plain = reference.rows_by_separate_models(*given, torch.bfloat16)
    assert found["y"].dtype == torch.bfloat16
    assert found["x"].dtype == torch.float32
    check_same(found, plain, exact, torch.bfloat16)


# activation checkpoints


CHECKPOINTS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "other"])


@CHECKPOINTS
@every_dtype
def test_checkpoints_compute_again_with_the_names_of_the_call(reentrant, dtype):
    check(adapted(Net(reentrant=reentrant).to(dtype)), NAMES, dtype)


def twins(reentrant, configs=CONFIGS):
    """One with activation checkpoints, one without, and their names for rows."""
    net = Net().double()
    plain = adapted(net, configs)
    model = copy.deepcopy(plain)
    model.model.reentrant = reentrant
    return model, plain


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None or not found[key].any(), key
        else:
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13, msg=str(key))


def choice(model):
    state = model._adapters.state
    return state.active, state.rows


@CHECKPOINTS
@pytest.mark.parametrize("order", [1, -1])
def test_two_calls_before_one_backward(reentrant, order):
    both = twins(reentrant)
    names = [NAMES, NAMES[::-1], None]
    x, grad = problem(both[0], NAMES, torch.float64)
    found = []
    for model in both:
        leaf = x.clone().requires_grad_()
        model.set_adapter("dvora")
        outputs = [model(leaf, adapter_names=n) for n in names]
        model.set_adapter("all")
        (outputs[order] * 2 + outputs[0] - outputs[2]).backward(grad)
        assert choice(model) == ("all", None)
        found.append({"x": leaf.grad, **reference.gradients_of(model)})
    assert_equal(*found)


@CHECKPOINTS
def test_another_adapter_between_forward_and_backward(reentrant):
    for change in (
        lambda m: m.set_adapter("few"),
        lambda m: m.set_adapter(None),
        lambda m: m(torch.zeros(1, 12).double().requires_grad_(), adapter_names=["few"]),
        lambda m: m.delete_adapter("few"),
        lambda m: m.add_adapter("new", VeraConfig(r=3, target_modules=["q"])),
    ):
        for names in (["all", "dvora", BASE] * 3, None):
            found = []
            for model in twins(reentrant):
                x, grad = problem(model, NAMES, torch.float64)
                leaf = x.clone().requires_grad_()
                model.set_adapter("mixed")
                y = model(leaf, adapter_names=names)
                change(model)
                after = choice(model)
                model.zero_grad()
                y.backward(grad)
                assert choice(model) == after
                found.append({"x": leaf.grad, **reference.gradients_of(model)})
            assert_equal(*found)


@CHECKPOINTS
@pytest.mark.parametrize("names", [NAMES, None], ids=["rows", "active"])
def test_renamed_between_forward_and_backward(reentrant, names):
    found = []
    for model in twins(reentrant):
        x, grad = problem(model, NAMES, torch.float64)
        model.set_adapter("dvora")
        leaf = x.requires_grad_()
        y = model(leaf, adapter_names=names)
        model.rename_adapter("dvora", "other")
        y.backward(grad)
        model.rename_adapter("other", "dvora")
        found.append({"x": leaf.grad, **reference.gradients_of(model)})
    found = [dict(sorted(f.items(), key=str)) for f in found]
    assert_equal(*found)


@CHECKPOINTS
@pytest.mark.parametrize("names", [NAMES, None], ids=["rows", "active"])
@pytest.mark.parametrize("change", ["delete", "merge"])
def test_what_cannot_be_computed_again_is_refused(reentrant, names, change):
    """Without checkpoints nothing is, and it goes on."""
    for model in twins(reentrant):
        model.set_adapter("dvora")
        x, grad = problem(model, NAMES, torch.float64)
        x.requires_grad_()
        y = model(x, adapter_names=names)
        model.delete_adapter("dvora") if change == "delete" else model.merge("all")
        after = choice(model)
        if model.model.reentrant is None:
            y.backward(grad)
            assert x.grad.isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"VeraModel: expected (adapter|base weights)"):
                y.backward(grad)
        assert choice(model) == after


@CHECKPOINTS
def test_a_backward_pass_that_fails_leaves_the_choice_of_adapters(reentrant):
    model, _ = twins(reentrant)
    model.set_adapter("few")
    x, grad = problem(model, NAMES, torch.float64)
    x = x.requires_grad_()
    expected = model(x)
    for place in ("q", "down"):
        layer = model.get_submodule(f"model.{place}")
        y = model(x.clone().requires_grad_(), adapter_names=NAMES)

        def fail(*_):
            raise RuntimeError("out of memory")

        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            y.backward(grad)
        assert choice(model) == ("few", None)
        hook.remove()
        assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError):
        model(x[:, :, :3], adapter_names=NAMES)
    assert choice(model) == ("few", None)
    found = results(model, NAMES, x, grad)
    exact = reference.rows_by_separate_models(model, NAMES, x, grad, torch.float64)
    check_same(found, exact, exact, torch.float64)


@CHECKPOINTS
def test_several_outputs_of_one_call(reentrant):
    """A loss and what it was made of are both outputs: both notice the backward pass."""

    class Loss(Net):
        def forward(self, x):
            y = super().forward(x)
            return {"loss": y.square().sum(), "logits": y, "sizes": (3, y.mean())}

    model = adapted(Loss(reentrant=reentrant).double())
    model.set_adapter("few")
    x, _ = problem(model, NAMES, torch.float64)
    output = model(x.requires_grad_(), adapter_names=NAMES)
    output["loss"].backward()
    assert choice(model) == ("few", None)
    grad = 2 * output["logits"].detach()
    exact = reference.rows_by_separate_models(_of_net(model), NAMES, x, grad, torch.float64)
    found = {"y": output["logits"].detach(), **reference.gradients_of(model)}
    check_same(found, exact, {k: v for k, v in exact.items() if k != "x"}, torch.float64)


def _of_net(model):
    plain = copy.deepcopy(model)
    plain.model.__class__ = Net
    plain.model.reentrant = None
    return plain


@CHECKPOINTS
def test_an_output_that_is_a_dataclass(reentrant):
    import dataclasses

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Net2(Net):
        def forward(self, x):
            return Output(super().forward(x))

    model = adapted(Net2(reentrant=reentrant).double())
    x, grad = problem(model, NAMES, torch.float64)
    model(x.requires_grad_(), adapter_names=NAMES).logits.backward(grad)
    exact = reference.rows_by_separate_models(_of_net(model), NAMES, x, grad, torch.float64)
    wanted = {k: v for k, v in exact.items() if not isinstance(k, str)}
    check_same(reference.gradients_of(model), exact, wanted, torch.float64)


def test_graphs_that_are_kept_and_passes_within_passes():
    """retain_graph, gradients of gradients, and a backward pass inside of another one's node."""
    model, plain = twins(False)
    x, grad = problem(model, NAMES, torch.float64)
    found = []
    for m in (model, plain):
        leaf = x.clone().requires_grad_()
        y = m(leaf, adapter_names=NAMES)
        m.set_adapter("few")
        y.backward(grad, retain_graph=m is plain)
        if m is plain:
            y.backward(grad)
        else:
            m(leaf, adapter_names=NAMES).backward(grad)
        found.append({"x": leaf.grad, **reference.gradients_of(m)})
    assert_equal(*found)

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, leaf, net):
            ctx.leaf, ctx.net = leaf.detach(), net
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaf = ctx.leaf.clone().requires_grad_()
                y = ctx.net(leaf, adapter_names=NAMES[::-1]).sum()
            return grad + torch.autograd.grad(y, leaf)[0], None, None

    found = []
    for m in (model, plain):
        m.zero_grad()
        leaf = x.clone().requires_grad_()
        y = m(Inner.apply(leaf, x, m) * 1, adapter_names=NAMES)
        y = y + m(Inner.apply(leaf, x, m) * 1, adapter_names=NAMES[1:] + NAMES[:1])
        m.set_adapter("few")
        y.backward(grad)
        assert choice(m) == ("few", None)
        found.append({"x": leaf.grad, **reference.gradients_of(m)})
    assert_equal(*found)


@pytest.mark.parametrize("inner", [True, False], ids=["reentrant", "other"])
@CHECKPOINTS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_checkpoints_in_checkpoints_and_around_the_model(reentrant, inner):
    from torch.utils.checkpoint import checkpoint

    class Nested(Net):
        def forward(self, x):
            return self.head(checkpoint(self.both, x, use_reentrant=reentrant))

        def both(self, x):
            x = checkpoint(self.attend, x, use_reentrant=inner)
            return checkpoint(self.feed, x, use_reentrant=inner)

    model = adapted(Nested().double())
    x, grad = problem(model, NAMES, torch.float64)
    exact = reference.rows_by_separate_models(_of_net(model), NAMES, x, grad, torch.float64)

    def check_backward(y, leaf):
        y.backward(grad)
        assert choice(model) == (None, None)
        found = {"y": y.detach(), "x": leaf.grad, **reference.gradients_of(model)}
        check_same(found, exact, exact, torch.float64)

    leaf = x.clone().requires_grad_()
    y = model(leaf, adapter_names=NAMES)
    model.set_adapter(None)
    check_backward(y, leaf)

    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda x: model(x, adapter_names=NAMES), leaf, use_reentrant=reentrant)
    check_backward(y, leaf)


# U, once for all that read the same input


@pytest.fixture
def shrinks(monkeypatch):
    """The inputs of every vera_shrink within a model."""
    import fmkernels
    from fmkernels.api import vera_shared

    calls, own = [], vera_shared.vera_shrink

    def counted(x, A):
        calls.append(x)
        return own(x, A)

    monkeypatch.setattr(vera_shared, "vera_shrink", counted)
    monkeypatch.setattr(fmkernels, "vera_shrink", counted)
    return calls


TARGETS = ["q", "k", "v", "up", "down"]
ONE_PAIR = {
    "a": VeraConfig(r=2, target_modules=TARGETS),
    "b": VeraConfig(r=2, target_modules=TARGETS),
    "d": VeraConfig(r=2, target_modules=TARGETS, use_dora=True),
}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_one_product_for_query_key_and_value(shrinks, reentrant):
    """The attention's, up's, and down's unless one op does all of that: and once more if computed
    again."""
    model = adapted(Net(reentrant=reentrant), ONE_PAIR)
    x = torch.randn(3, 30, 12, requires_grad=True)
    for names in (None, ["a", "b", BASE], ["d", "d", "d"]):
        shrinks.clear()
        y = model(x, adapter_names=names)
        count = 2 if names is None else 3
        # without gradients, as the reentrant kind begins, a folded weight needs no U
        first = 0 if reentrant and names is None else count
        assert len(shrinks) == first, names
        y.sum().backward()
        assert len(shrinks) == (count if reentrant is None else first + count), names


def test_shared_u_in_every_order_of_passes():
    """The same leaf again, after a partial backward pass, without a gradient first, changed."""
    model = adapted(Net(), ONE_PAIR).double()
    exact = reference.separate(model, "a")
    x = torch.randn(3, 30, 12, dtype=torch.float64, requires_grad=True)

    def compare(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def grads(net, layers):
        return [
            torch.autograd.grad(getattr(net, layer)(x).square().sum(), x)[0] for layer in layers
        ]

    compare(grads(model, "qkv"), grads(exact, "qkv"))
    both = [[net.q(x).sum(), net.k(x).sum()] for net in (model, exact)]
    compare(*(torch.autograd.grad(pair[0], x, retain_graph=True)[0] for pair in both))
    compare(*(torch.autograd.grad(pair[1], x, retain_graph=True)[0] for pair in both))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            compare(model.q(x), exact.q(x))
            compare(model.k(x), exact.k(x))
        compare(grads(model, "kqv"), grads(exact, "kqv"))
    found, expected = [], []
    for net, out in ((model, found), (exact, expected)):
        y = net(x) + 2 * net(x)
        out.append(torch.autograd.grad(y.square().sum(), x)[0])
    compare(found, expected)
    with torch.no_grad():
        q = model.q(x)
        x.add_(1)
        compare(model.k(x), exact.k(x))
        assert not torch.equal(q, exact.q(x))
    with torch.inference_mode():
        h = torch.randn(3, 30, 12, dtype=torch.float64)
        model.q(h)
        h.add_(1)
        compare(model.k(h), exact.k(h))


def test_calls_with_adapters_for_different_layers_of_one_input():
    """The second call's key is not of the first call's U, whose graph is freed before."""
    configs = {
        "q": VeraConfig(r=2, target_modules=["q"]),
        "k": VeraConfig(r=2, target_modules=["k"]),
    }
    model = adapted(Net(), configs)
    x = torch.randn(3, 30, 12, requires_grad=True)
    for names in (False, True):
        outputs = []
        for name in configs:
            model.set_adapter(name)
            outputs.append(model(x, adapter_names=[name] * 3 if names else None))
        for y in outputs:
            y.sum().backward()


# names and batches


def test_names_for_more_or_fewer_rows_are_refused():
    model = adapted(Net())
    x = torch.randn(4, 5, 12)
    for count in (1, 2, 3, 5, 8):
        with pytest.raises(
            ValueError,
            match=f"adapter_names: expected a name for every row, 4 of them, got {count}",
        ):
            model(x, adapter_names=["all"] * count)
    for wrong in ("all", [], [1], [None] * 4):
        with pytest.raises(TypeError, match="adapter_names: expected a name for every row"):
            model(x, adapter_names=wrong)
    with pytest.raises(
        ValueError, match=r"adapter_names: expected some of .* got 'nobody' in row 1"
    ):
        model(x, adapter_names=["all", "nobody", BASE, "all"])
    with pytest.raises(ValueError, match="adapter_names: expected a batch of 12 rows"):
        model(torch.randn(12), adapter_names=["all"] * 12)


def test_a_bad_adapter_spoils_its_own_rows_alone():
    for bad in ("all", "dvora"):
        model = adapted(Net().double())
        x, grad = problem(model, NAMES, torch.float64)
        others = [i for i, name in enumerate(NAMES) if name != bad]
        before = results(model, NAMES, x, grad)
        for layer in model.modules():
            if isinstance(layer, VeraLayer) and bad in layer.lambda_b:
                with torch.no_grad():
                    vector = layer.lambda_b if bad == "all" else layer.magnitude
                    vector[bad][::3] = torch.nan
        found = results(model, NAMES, x, grad)
        for key in ("y", "x"):
            assert torch.equal(found[key][others], before[key][others]), (bad, key)
            assert found[key][NAMES.index(bad)].isnan().any()
        for key, gradient in before.items():
            if key[0] != bad and not isinstance(key, str) and gradient is not None:
                torch.testing.assert_close(
                    found[key], gradient, rtol=1e-12, atol=1e-13, msg=f"{bad} {key}"
                )


class Positions(nn.Module):
    """A table that all rows look the same places up in, a norm, and several outputs."""

    def __init__(self):
        super().__init__()
        self.places, self.table = nn.Embedding(5, 12), nn.Embedding(9, 12)
        self.pair = Pair()
        self.net = nn.Linear(12, 12)

    def forward(self, tokens):
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]).unsqueeze(0))
        x = self.net(x)
        mean, states = self.pair(x, mask=(tokens > 3).unsqueeze(-1), scale=2.0)
        return states["x"] * mean


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def forward(self, x, mask=None, scale=None):
        x = torch.where(mask, self.norm(x), x) * scale
        return x.mean(dim=1, keepdim=True), {"x": x, "scale": scale, "none": None}


def test_modules_trained_whole_with_any_arguments():
    saved = {"modules_to_save": ["places", "table", "pair"]}
    configs = {
        "one": VeraConfig(r=4, target_modules=["net"], **saved),
        "two": VeraConfig(r=4, target_modules=["net"], modules_to_save=["places"]),
        "three": VeraConfig(r=4, target_modules=["net"], **saved),
    }
    model = adapted(Positions().double(), configs)
    tokens = torch.randint(0, 9, (6, 5))
    names = ["two", "one", BASE, "three", "one", "two"]
    model(tokens, adapter_names=names).square().sum().backward()
    found = reference.gradients_of(model)
    y = model(tokens, adapter_names=names)
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        own = reference.separate(model, name)
        expected = own(tokens[rows])
        torch.testing.assert_close(y[rows], expected, rtol=1e-12, atol=1e-12)
        if name != BASE:
            expected.square().sum().backward()
            for (adapter, path, key), gradient in found.items():
                if adapter == name and key not in reference.KINDS:
                    theirs = own.get_submodule(path).get_parameter(key).grad
                    torch.testing.assert_close(gradient, theirs, rtol=1e-11, atol=1e-12)


def test_modules_trained_whole_that_give_no_row_for_each_row_are_refused():
    class Summed(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum()

    class WithSum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.total = nn.Linear(6, 6), Summed(6, 1)

        def forward(self, x):
            return self.total(self.net(x))

    config = VeraConfig(r=2, target_modules=["net"], modules_to_save=["total"])
    model = adapted(WithSum(), {"a": config})
    x = torch.randn(2, 6)
    model(x, adapter_names=["a", "a"])
    with pytest.raises(ValueError, match="to give a row for each row of the batch, got shape"):
        model(x, adapter_names=["a", BASE])


def test_what_models_look_at_of_modules_trained_whole():
    model = get_vera_model(Net(), VeraConfig(r=2, target_modules=["q"], modules_to_save=["head"]))
    head = model.model.head
    assert head.weight is head.copies["default"].weight
    assert head.in_features == 12
    model.set_adapter(None)
    assert head.weight is head.original_module.weight
    assert not hasattr(head, "nothing")
    copy.deepcopy(head)


class Looked(nn.Module):
    """A head that ``look`` uses as some models do: in part, by a method, or by its weight.

    Args:
        look: of the head and what comes before it; what the model gives.
    """

    def __init__(self, look):
        super().__init__()
        self.net, self.head, self.look = nn.Linear(6, 6), Tower(), look

    def forward(self, x):
        return self.look(self.head, self.net(x))


class Tower(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))
        self.scale = nn.Parameter(torch.randn(6))
        self.power = 2

    def twice(self, x):
        return self(x) * 2


def through_all(head, x):
    for module in head:
        x = module(x)
    return x


LOOKS = {
    "called": lambda head, x: head(x) ** head.power,
    "indexed": lambda head, x: head[1](head[0](x)),
    "by the names": lambda head, x: getattr(getattr(head, "1"), "1")(x),
    "in a slice": lambda head, x: head[1][:](x) * len(head),
    "from the end": lambda head, x: head[-1][1](x),
    "one by one": through_all,
    "by a method": lambda head, x: head.twice(x),
}


def looked(look):
    config = VeraConfig(r=2, target_modules=["net"], modules_to_save=["head"])
    return adapted(Looked(look).double(), {"a": config, "b": config})


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_modules_trained_whole_of_which_a_part_is_called(look):
    model = looked(look)
    names = ["b", "a", BASE, "b"]
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model(x, adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter(None if name == BASE else name)
        torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1]), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(y[i], y[(i + 1) % 4])


READS = {
    "scale": lambda head, x: x * head.scale,
    "weight": lambda head, x: x @ head[0].weight,
}


@pytest.mark.parametrize(("word", "look"), READS.items(), ids=READS)
def test_modules_trained_whole_of_which_a_weight_is_read(word, look):
    """With the rows of one adapter there is one weight; with others it would be wrong for some."""
    model = looked(look)
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"to be called.* got a model that reads {word} of a"):
        model(x, adapter_names=["a", "a", "b", "a"])
    with pytest.raises(ValueError, match=f"to be called.* got a model that reads {word} of a"):
        model(x, adapter_names=["a", "a", BASE, "a"])
    # not of the active one
    model.set_adapter("a")
    y = model(x, adapter_names=["b"] * 4)
    model.set_adapter("b")
    torch.testing.assert_close(y, model(x))
    model.set_adapter(None)
    torch.testing.assert_close(model(x, adapter_names=[BASE] * 4), model(x))


class Attends(nn.Module):
    """A module trained whole that is given ``others`` beside x."""

    def __init__(self, others):
        super().__init__()
        self.net, self.block, self.others = nn.Linear(8, 8), Block(), others

    def forward(self, x):
        return self.block(self.net(x), *self.others(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, *others):
        x = self.inner(x)
        for other in others:
            other = other if other.ndim != 1 else other.unsqueeze(-1)
            x = x + other.double()
        return x


OTHERS = {
    "mask": lambda x: [torch.full((x.shape[1],) * 2, 3.0).triu(1) @ torch.ones(x.shape[1], 8)],
    "positions": lambda x: [torch.arange(x.shape[1])],
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_positions_are_not_taken_for_rows(others):
    """Where there are as many of either the call is refused; otherwise it is right."""
    config = VeraConfig(r=2, target_modules=["net"], modules_to_save=["block"])
    model = adapted(Attends(others).double(), {"a": config, "b": config})
    for batch, tokens in ((2, 3), (3, 3), (4, 2)):
        x = torch.randn(batch, tokens, 8, dtype=torch.float64)
        names = ["b", *["a"] * (batch - 1)]
        if batch == tokens:
            with pytest.raises(ValueError, match=r"cannot be mistaken .* got shape \(3"):
                model(x, adapter_names=names)
            continue
        y = model(x, adapter_names=names)
        model.set_adapter("b")
        torch.testing.assert_close(y[:1], model(x[:1]))
        model.set_adapter("a")
        torch.testing.assert_close(y[1:], model(x[1:]))


@pytest.mark.parametrize("tokens", [2, 4])
def test_positions_without_a_batch_are_not_taken_for_rows(tokens):
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.places = nn.Linear(8, 8), nn.Embedding(9, 8)

        def forward(self, x):
            return self.net(x + self.places(torch.arange(x.shape[1])))

    config = VeraConfig(r=2, target_modules=["net"], modules_to_save=["places"])
    model = adapted(Placed(), {"a": config, "b": config})
    x = torch.randn(2, tokens, 8)
    with pytest.raises(ValueError, match=rf"and another dimension, got shape \({tokens},\)"):
        model(x, adapter_names=["a", "b"])
    model(x, adapter_names=["a", "a"])


ENCODERS = {
    "targets": {},
    "a target in the second layer": {"target_modules": ["layers.1.linear2"]},
    "the last layer": {"target_modules": ["net"], "modules_to_save": ["linear2"]},
    "a norm": {"modules_to_save": ["norm1"]},
    "attention": {"modules_to_save": ["self_attn"]},
    "a whole layer": {"target_modules": ["layers.1.linear1"], "modules_to_save": ["layers.0"]},
    "all of it": {"target_modules": ["net"], "modules_to_save": ["encoder"]},
}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.net, self.encoder = nn.Linear(16, 16), nn.TransformerEncoder(layer, 2)

    def forward(self, x, mask=None):
        y = self.encoder(self.net(x), src_key_padding_mask=mask)
        return y if mask is None else y.masked_fill(mask.unsqueeze(-1), 0)


def encoder_results(call, x, mask):
    """In evaluation, without gradients and with them; masked, and not."""
    for is_masked in (False, True):
        for is_grad in (False, True):
            with torch.set_grad_enabled(is_grad):
                yield call(x, mask=mask) if is_masked else call(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)
def test_pytorchs_encoder_gives_in_evaluation_what_it_does_in_training(settings):
    """There it reads weights, past adapters, and takes what is masked out of its tensors."""
    torch.manual_seed(0)
    config = VeraConfig(**{"r": 4, "target_modules": ["linear1", "linear2"], **settings})
    model = adapted(Encoder(), {"a": config, "b": config})
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    names = ["b", BASE, "a"]

    def rows(x, **given):
        return model(x, adapter_names=names, **given)

    expected = {}
    for name in ("a", "b", None):
        model.train().set_adapter(name)
        expected[name] = list(encoder_results(model, x, mask))
        model.eval()
        for found, own in zip(encoder_results(model, x, mask), expected[name], strict=True):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected["a"][0], expected["b"][0], atol=1e-2)
    model.set_adapter("a")
    for is_training in (True, False):
        model.train(is_training)
        for i, found in enumerate(encoder_results(rows, x, mask)):
            own = torch.stack([expected[n][i][j] for j, n in enumerate(["b", None, "a"])])
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    model.delete_adapter("a")
    model.set_adapter("b")
    bare = model.merge_and_unload()
    for found, own in zip(encoder_results(bare, x, mask), expected["b"], strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    model.unmerge()
    model.delete_adapter("b")
    for found, own in zip(encoder_results(model, x, mask), expected[None], strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_pytorchs_encoder_in_a_pool():
    torch.manual_seed(0)
    net = Encoder()
    config = VeraConfig(r=4, target_modules=["linear1", "linear2"])
    pool = AdapterPool(net, config, capacity=2)
    for name in ("a", "b"):
        sizes = {"linear1": 32, "linear2": 16}
        pool.put(name, {
            f"encoder.layers.{i}.{key}": {"lambda_d": torch.randn(4), "lambda_b": torch.randn(size)}
            for i in range(2) for key, size in sizes.items()
        })  # fmt: skip
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()

    def rows(x, **given):
        return pool(x, adapter_names=["b", BASE, "a"], **given)

    net.train()
    expected = list(encoder_results(rows, x, mask))
    net.eval()
    for found, own in zip(encoder_results(rows, x, mask), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    plain = pool(x, adapter_names=[BASE] * 3)
    torch.testing.assert_close(plain[1], expected[0][1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[0], expected[0][0], atol=1e-2)


# models of the transformers library


def language_model(kind, configs=None):
    import vera_models

    net = getattr(vera_models, f"tiny_{kind}")(dtype=torch.float64)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "k_proj", "v_proj", "up_proj"]
    saved = ["wpe", "lm_head"] if kind == "gpt2" else ["lm_head"]
    default = {
        "a": VeraConfig(r=4, target_modules=targets),
        "b": VeraConfig(r=6, target_modules=targets, modules_to_save=saved),
        "d": VeraConfig(r=4, target_modules=targets, use_dora=True),
    }
    return adapted(net, configs or default)


ROWS = ["b", "a", BASE, "d", "b"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_language_model_with_its_own_checkpoints(kind, reentrant):
    import vera_models

    model = language_model(kind)
    plain = [reference.separate(model, name) for name in ROWS]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    inputs = vera_models.inputs_for(model, rows=len(ROWS))
    rows = []
    for i, own in enumerate(plain):
        rows.append(own(**{key: value[i : i + 1] for key, value in inputs.items()}).logits)
    expected = torch.cat(rows)
    logits = model(**inputs, adapter_names=ROWS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    model.set_adapter(None)
    logits.square().sum().backward()
    assert choice(model) == (None, None)
    expected.square().sum().backward()
    for (name, path, key), gradient in reference.gradients_of(model).items():
        own = [m.get_submodule(path) for m, row in zip(plain, ROWS, strict=True) if row == name]
        theirs = [
            m.vectors[key] if isinstance(m, reference.Naive) else m.get_parameter(key) for m in own
        ]
        expected = sum(p.grad for p in theirs)
        assert (gradient - expected).abs().max() <= 1e-10 * expected.abs().max(), (name, path, key)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
def test_generating_with_beams(kind, settings):
    """Several rows for each name, side by side; lm_head is trained whole by one adapter."""
    import vera_models

    model = language_model(kind)
    # its positions are looked up once for all rows
    if kind == "gpt2":
        assert "b" in model.model.transformer.wpe.copies
    inputs = vera_models.inputs_for(model, rows=len(ROWS))
    own = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        **settings,
    }
    found = model.generate(**inputs, **own, adapter_names=ROWS)
    each = settings.get("num_return_sequences", 1)
    rows = []
    for i, name in enumerate(ROWS):
        given = {key: value[i : i + 1] for key, value in inputs.items()}
        rows.append(reference.separate(model, name).generate(**given, **own))
    assert torch.equal(found, torch.cat(rows))
    assert found.shape[0] == each * len(ROWS)
    assert len({tuple(row.tolist()) for row in found[:, 7:]}) > 1
    assert choice(model) == ("a", None)


def test_peft_ignores_the_names_without_a_word():
    """What PEFT does for VeRA, and what is done here: the reason for these tests."""
    import peft

    config = peft.VeraConfig(r=4, target_modules=["q"], init_weights=False)
    theirs = peft.get_peft_model(Net(), config)
    theirs.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
    x = torch.randn(3, 5, 12)
    names = ["default", "other", "__base__"]
    expected = theirs(x)
    assert torch.equal(theirs.eval()(x, adapter_names=names), expected)
    rows = []
    for name in ("default", "other"):
        theirs.set_adapter(name)
        rows.append(theirs(x))
    assert not torch.equal(*rows)
    configs = {name: VeraConfig(r=4, target_modules=["q"]) for name in ("default", "other")}
    ours = adapted(Net(), configs)
    assert not torch.allclose(ours(x, adapter_names=names), ours(x), rtol=1e-3)
