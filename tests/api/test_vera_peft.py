"""A PEFT VeRA model before and after accelerate_peft: values, gradients, and all that stays."""

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import peft
import pytest
import torch
from peft.tuners.vera.layer import Linear
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from fmkernels.api import vera_peft_layer
from fmkernels.api.vera_peft import accelerate_peft
from fmkernels.api.vera_peft_layer import _CASTS, AcceleratedLinear
from fmkernels.testing import assert_parity

pytestmark = [
    # what PEFT and transformers warn of among themselves
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.(is_)?gradient_checkpointing.* is deprecated:FutureWarning"
    ),
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class Net(nn.Module):
    """Layers of several sizes, so that A and B are larger than most of them need."""

    def __init__(self, first=None):
        super().__init__()
        self.a = first if first is not None else nn.Linear(12, 20)
        self.b = nn.Linear(20, 9, bias=False)
        self.c = Conv1D(7, 9)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def randomize(model):
    """Vectors that matter, with numbers that bfloat16 has."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vera_lambda" in name:
                value.copy_(torch.randn_like(value).bfloat16())


def make(r=5, dtype=torch.float64, base=None, targets=("a", "b", "c"), adapters=(), **settings):
    """PEFT's model over a small one, with adapters (name, targets) beside the default one."""
    config = peft.VeraConfig(r=r, target_modules=list(targets), **settings)
    model = peft.get_peft_model((Net() if base is None else base).to(dtype), config)
    for name, its_targets in adapters:
        model.add_adapter(name, peft.VeraConfig(r=r, target_modules=list(its_targets), **settings))
    randomize(model)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def rows(dtype=torch.float64, count=30, width=12):
    return torch.randn(2, count, width, dtype=dtype, requires_grad=True)


def outcome(model, x, call=None):
    """The output, then the gradients of x and of all that is trained."""
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = model(x) if call is None else call(x)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads))]  # noqa: B905


def check(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a - b).double().norm() <= tolerance * b.double().norm() + 1e-15


def both(model, x, tolerance=1e-10):
    """Fail unless the model gives the same with and without; leaves it accelerated."""
    expected = outcome(model, x)
    handle = accelerate_peft(model)
    assert all(type(layer) is AcceleratedLinear for layer in layers(model))
    check(outcome(model, x), expected, tolerance)
    return handle


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("r", [1, 5, 64])
@pytest.mark.parametrize("trained", ["none", "vera_only", "all", "weights"])
def test_is_peft_s(dtype, r, trained):
    model = make(r, dtype, bias=trained if trained != "weights" else "none")
    if trained == "weights":
        model.requires_grad_(True)
    both(model, rows(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 1, 12), (3, 2, 2, 12)])
def test_any_leading_shape(shape):
    both(make(), torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_strided_input():
    both(make(targets=("a", "b")), rows(count=24).mT[..., ::2].detach().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [5, 64])
def test_parity_over_a_half_precision_base(dtype, r):
    model = make(r, dtype, nn.Sequential(nn.Linear(12, 200), nn.Linear(200, 20)), ("0", "1"))
    layer = layers(model)[0]
    assert layer.vera_A["default"].dtype == layer.vera_lambda_d["default"].dtype == torch.float32
    x = rows(dtype, count=100)
    exact = outcome(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    plain = outcome(copy.deepcopy(model).to(dtype), x)
    theirs = outcome(model, x)
    accelerate_peft(model)
    found = outcome(model, x)
    for a, b, same, right in zip(found, theirs, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert_parity(a.to(dtype), same.to(dtype), right)
        assert (a - b).double().norm() <= 8 * torch.finfo(dtype).eps * b.double().norm()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_under_autocast(base, given):
    model, x = make(dtype=base), rows(given)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            try:
                expected, error = model(x), None
            except RuntimeError as caught:
                expected, error = None, str(caught)
            with accelerate_peft(model):
                if error is not None:  # of PyTorch: which would not multiply these
                    with pytest.raises(RuntimeError) as raised:
                        model(x)
                    assert str(raised.value) == error
                    continue
                found = model(x)
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= 2e-2 * expected.norm()


def test_the_gradients_under_autocast():
    model, x = make(16, torch.float32), rows(torch.float32)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = outcome(model, x, call)
    accelerate_peft(model)
    check(outcome(model, x, call), expected, 3e-2)


def test_disabled_adapters():
    model, x = make(), rows()
    with model.disable_adapter():
        expected = model(x)
    accelerate_peft(model)
    assert not torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    check([model(x)], [outcome(model, x)[0]])


def test_merged_adapters():
    model, x = make(), rows()
    expected = outcome(model, x)[0]
    accelerate_peft(model)
    model.merge_adapter()
    assert layers(model)[0].merged
    check([model(x)], [expected])
    model.unmerge_adapter()
    check([model(x)], [expected])
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges
        check([model(x)], [model.get_base_model()(x)])
    assert not layers(model)[0].merged
    check([model(x)], [expected])
    check([model.merge_and_unload()(x)], [expected])


def test_several_active_adapters_and_those_that_a_layer_lacks():
    model = make(adapters=[("second", ("a", "b")), ("third", ("c",))])
    for active in (["default"], ["second"], ["third"], ["default", "second"], ["second", "third"]):
        model.base_model.set_adapter(active)
        both(model, rows()).undo()
    both(model, x := rows()).undo()
    model.set_adapter("second")
    expected = model(x)
    model.base_model.set_adapter(["default", "second", "third"])
    both(model, x)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert len(accelerate_peft(model).layers) == 0
    check([model(x)], [expected])


def test_adapters_come_and_layers_too():
    model = make(targets=("a",))
    first = accelerate_peft(model)
    model.add_adapter("more", peft.VeraConfig(r=5, target_modules=["a"]))
    assert first.layers == ("base_model.model.a",)
    model.set_adapter("more")
    randomize(model)
    both(model, rows())


def test_dropout_drops_only_in_training():
    model = make(vera_dropout=0.5).eval()
    both(model, rows()).undo()
    layer = layers(model.train())[0]
    x = rows()[0, 0].expand(800, 12)
    with torch.no_grad():
        expected = layer.eval()(x)[0] - layer.base_layer(x)[0]
        accelerate_peft(model)
        layer.train()
        torch.manual_seed(3)
        once = layer(x)
        assert not torch.equal(layer(x), once)
        torch.manual_seed(3)
        assert torch.equal(layer(x), once)
        updates = once - layer.base_layer(x)
        apart = (updates.mean(0) - expected).abs() / updates.std(0)
    assert apart.max() < 5 / 800**0.5


def test_everything_dropped():
    model, x = make(vera_dropout=0.999), rows()
    for layer in layers(model):
        layer.vera_dropout["default"].p = 1.0
    both(model, x)


def test_another_module_in_place_of_dropout():
    class Halved(nn.Dropout):
        def forward(self, x):
            return x / 2

    model = make(vera_dropout=0.1)
    layers(model)[0].vera_dropout["default"] = Halved()
    layers(model)[1].vera_dropout["default"] = nn.Tanh()
    model.eval()
    both(model, rows())


class Doubling(nn.Linear):
    def forward(self, x, scale=2.0, *, shift=0.0):
        return super().forward(x) * scale + shift


class Marked(torch.Tensor):
    """As the weights of quantised layers are: a tensor of a type of its own."""


def hooked(linear, calls):
    linear.register_forward_hook(lambda module, args, y: (calls.append(1), y * 2)[1])


def prehooked(linear, calls):
    linear.register_forward_pre_hook(lambda module, args: (calls.append(1), (args[0] * 2,))[1])


def backward_hooked(linear, calls):
    linear.register_full_backward_hook(lambda module, grad, _: (calls.append(1), (grad[0] * 2,))[1])


def backward_prehooked(linear, calls):
    linear.register_full_backward_pre_hook(lambda module, grad: (calls.append(1), (grad[0],))[1])


def own_forward(linear, calls):
    before = linear.forward
    linear.forward = lambda x: (calls.append(1), before(x) * 2)[1]


def marked(linear, calls):
    linear.weight = nn.Parameter(linear.weight.as_subclass(Marked), requires_grad=False)


def parametrized(linear, calls):
    class Scaled(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight * 2

    parametrize.register_parametrization(linear, "weight", Scaled())


UNUSUAL = [
    hooked, prehooked, backward_hooked, backward_prehooked, own_forward, marked, parametrized,
]  # fmt: skip


@pytest.mark.parametrize("change", UNUSUAL)
def test_unusual_base_layers_compute_themselves(change):
    model, calls = make(5, adapters=[("second", ("a", "b"))]), []
    model.base_model.set_adapter(["default", "second"])
    change(layers(model)[0].base_layer, calls)
    calls.clear()
    expected = outcome(model, rows_ := rows())
    before = len(calls)
    accelerate_peft(model)
    check(outcome(model, rows_), expected)
    assert change is marked or len(calls) == 2 * before > 0


def test_a_base_layer_with_a_forward_and_arguments_of_its_own():
    model, x = make(base=Net(Doubling(12, 20))), rows()
    layer = layers(model)[0]
    expected = [layer(x), layer(x, 3.0), layer(x, shift=1.0)]
    both(model, x)
    for found, right in zip([layer(x), layer(x, 3.0), layer(x, shift=1.0)], expected, strict=True):
        check([found], [right])
    with pytest.raises(TypeError, match="unexpected keyword argument 'shift'"):
        layers(model)[1](torch.randn(3, 20, dtype=torch.float64), shift=1.0)


def test_another_adapter_s_layer_below():
    model, x = make(), rows()
    layer = layers(model)[1]
    layer.base_layer = peft.get_peft_model(
        nn.Sequential(layer.base_layer), peft.LoraConfig(r=2, target_modules=["0"])
    ).base_model.model[0]
    layer.base_layer.lora_B["default"].weight.data.normal_()
    both(model, x)


def test_hooks_for_all_modules_see_the_base_layers():
    model, seen = make(), []
    accelerate_peft(model)
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        model(rows())
    finally:
        hook.remove()
    assert seen.count(nn.Linear) == 2
    assert seen.count(Conv1D) == 1


def test_inputs_that_are_no_plain_tensors_are_left_to_peft():
    model, x = make(), rows().detach()
    expected = model(x)
    accelerate_peft(model)
    found = model(x.as_subclass(Marked))
    assert type(found) is Marked
    check([found.as_subclass(torch.Tensor)], [expected])
    check([model(nn.Parameter(x))], [expected])


def test_matrices_on_another_device():
    model = make(dtype=torch.float32)
    for layer in layers(model):
        layer.base_layer.to("meta")
        for vectors in (layer.vera_lambda_d, layer.vera_lambda_b):
            vectors.to("meta")
    accelerate_peft(model)
    assert model.base_model.vera_A["default"].device.type == "cpu"
    assert model(rows(torch.float32).detach().to("meta")).device.type == "meta"


def test_the_same_objects_under_the_same_names(tmp_path):
    model = make(dtype=torch.bfloat16, adapters=[("second", ("a", "b", "c"))])
    model.save_pretrained(tmp_path / "before")
    tensors = [*model.named_parameters(remove_duplicate=False)]
    tensors += model.named_buffers(remove_duplicate=False)
    state, modules = model.state_dict(), dict(model.named_modules())
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    accelerate_peft(model)
    model(rows(torch.bfloat16)).float().sum().backward()
    now = [*model.named_parameters(remove_duplicate=False)]
    now += model.named_buffers(remove_duplicate=False)
    for (name, value), (other, same) in zip(now, tensors, strict=True):
        assert name == other
        assert value is same
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert {name: vars(module) for name, module in model.named_modules()} == attributes
    assert all(isinstance(layer, Linear) for layer in layers(model))
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "second/adapter_model.safetensors"):
        before, after = (load_file(tmp_path / when / name) for when in ("before", "after"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(Net().bfloat16(), tmp_path / "after")
    accelerate_peft(again)
    again.load_state_dict(model.state_dict(), strict=False)


def test_the_optimizer_goes_on():
    ours = make()
    theirs = copy.deepcopy(ours)
    ours_optimizer, their_optimizer = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
        for model in (ours, theirs)
    )
    for step in range(8):
        if step == 3:
            handle = accelerate_peft(ours)
        if step == 6:
            handle.undo()
        x, y = rows().detach(), torch.randn(2, 30, 7, dtype=torch.float64)
        for model, optimizer in ((ours, ours_optimizer), (theirs, their_optimizer)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    check(list(ours.parameters()), list(theirs.parameters()), 1e-9)


def test_undo_restores_everything():
    model, x = make(dtype=torch.bfloat16), rows(torch.bfloat16)
    expected, text = outcome(model, x), repr(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    handle = accelerate_peft(model)
    assert repr(handle) == "Acceleration(3 layers)"
    assert handle.layers == tuple(f"base_model.model.{name}" for name in "abc")
    outcome(model, x)
    handle.undo()
    handle.undo()
    assert all(type(layer) is Linear for layer in layers(model))
    assert repr(model) == text
    assert [vars(module) for module in model.modules()] == attributes
    assert model.base_model.vera_A not in _CASTS
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, x), expected, strict=True))


def test_as_a_context_it_leaves_the_model_as_it_was():
    model = make()
    with contextlib.suppress(KeyError), accelerate_peft(model):
        assert type(layers(model)[0]) is AcceleratedLinear
        raise KeyError
    assert type(layers(model)[0]) is Linear
    first = accelerate_peft(model)
    with accelerate_peft(model) as second:
        assert second.layers == ()
    assert type(layers(model)[0]) is AcceleratedLinear
    second.undo()
    assert type(layers(model)[0]) is Linear
    first.undo()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_copies_are_accelerated_and_apart(dtype):
    model, x = make(dtype=dtype), rows(dtype)
    accelerate_peft(model)
    expected = model(x)
    stored = io.BytesIO()
    torch.save(model, stored)
    size = stored.tell()
    stored.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ]
    for each in copies:
        assert type(layers(each)[0]) is AcceleratedLinear
        assert len({id(layer.vera_A) for layer in layers(each)}) == 1
        assert torch.equal(each(x), expected)
        with torch.no_grad():
            each.base_model.vera_A["default"].zero_()
        check([each(x)], [outcome(each.get_base_model(), x)[0]])
        assert not torch.equal(each(x), expected)
        accelerate_peft(each).undo()
        assert type(layers(each)[0]) is Linear
    assert torch.equal(model(x), expected)
    accelerate_peft(model).undo()
    stored = io.BytesIO()
    torch.save(model, stored)
    assert abs(size - stored.tell()) < 600  # the names of the classes


def test_matrices_are_cast_once_for_all_layers(monkeypatch):
    model, x = make(dtype=torch.bfloat16, adapters=[("second", ("a", "b"))]), rows(torch.bfloat16)
    model.base_model.set_adapter(["default", "second"])
    accelerate_peft(model)
    given = []

    def recorded(low, weight, bias, A, B, *vectors, **settings):
        given.append((A, B))
        return vera_linear(low, weight, bias, A, B, *vectors, **settings)

    vera_linear = vera_peft_layer.vera_linear
    monkeypatch.setattr(vera_peft_layer, "vera_linear", recorded)
    model(x), model(x)
    assert len(given) == 6
    assert len({id(A) for A, _ in given}) == len({id(B) for _, B in given}) == 1
    assert given[0][0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        model(x), model(x)
    assert len({id(A) for A, _ in given}) == 2
    assert given[-1][0].dtype == torch.float16


def test_copies_follow_the_matrices():
    """However they change, the result is that of a model that never had others."""
    model, x = make(dtype=torch.bfloat16), rows(torch.bfloat16)
    accelerate_peft(model)
    other = make(dtype=torch.bfloat16, projection_prng_key=4)

    def agrees():
        fresh = pickle.loads(pickle.dumps(model))
        return torch.equal(model(x.to(layers(model)[0].base_layer.weight.dtype)), fresh(x))

    old = model(x)
    model.load_state_dict(other.state_dict())
    assert not torch.equal(model(x), old)
    assert agrees()
    with torch.no_grad():
        model.base_model.vera_A["default"].mul_(-1)
    assert agrees()
    model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    assert agrees()
    model.base_model.vera_A["default"].data = torch.randn(5, 20)
    assert agrees()
    model.half()  # the matrices too
    assert model.base_model.vera_A not in _CASTS
    x = rows(torch.float16)
    assert agrees()


def test_copies_go_with_the_model():
    model, x = make(dtype=torch.bfloat16), rows(torch.bfloat16)
    accelerate_peft(model)
    model(x)
    buffers = model.base_model.vera_A
    (_, _, cast) = next(iter(_CASTS[buffers].values()))
    held = weakref.ref(cast)
    del buffers, model, cast
    gc.collect()
    assert held() is None


def test_inference_first_and_training_then():
    model, x = make(dtype=torch.bfloat16), rows(torch.bfloat16)
    accelerate_peft(model)
    with torch.inference_mode():
        model(x.detach())
    model(x).float().sum().backward()
    with torch.inference_mode():
        inside = copy.deepcopy(model)
        assert inside.base_model.vera_A["default"].is_inference()
        assert torch.equal(inside(x.detach()), model(x.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functional_calls_and_their_gradients(dtype):
    model, x = make(dtype=dtype), rows(dtype)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    expected = outcome(model, x)
    accelerate_peft(model)

    def total(trained):
        y = torch.func.functional_call(model, trained, (x.detach(),))
        generator = torch.Generator().manual_seed(7)
        return (y * torch.randn(y.shape, dtype=torch.float64, generator=generator).to(dtype)).sum()

    grads = torch.func.grad(total)(trained)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    check(list(grads.values()), expected[2:], tolerance)
    assert all(type(cast) is torch.Tensor for of in _CASTS.values() for *_, cast in of.values())
    check(outcome(model, x), expected, tolerance)


@pytest.fixture
def compiler():
    """Without what other tests compiled of the same code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
def test_the_same_ops_are_compiled():
    model, graphs = make(1, torch.bfloat16), []
    accelerate_peft(model)

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    for _ in range(3):
        compiled(rows(torch.bfloat16))
    (graph,) = graphs
    ops = [str(node.target) for node in graph.graph.nodes]
    assert sum(op.startswith("fmkernels.") for op in ops) == 3
    assert sum(op.startswith("fmkernels.vera_products") for op in ops) == 3


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_in_one_graph(dtype):
    model = make(16, dtype, targets=("a", "b"), vera_dropout=0.3).eval()
    x = rows(dtype)
    compiled = torch.compile(model, fullgraph=True)
    theirs = outcome(model, x, compiled)
    handle = accelerate_peft(compiled)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    expected = outcome(model, x)
    counter = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check(outcome(model, x, compiled), expected, tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > counter
    with torch.autocast("cpu", torch.bfloat16):
        check([compiled(x)], [model(x)], 3e-2)
    model.train()
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    handle.undo()
    check(outcome(model, x, compiled), theirs, tolerance)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_conv1d_of_large_rank():
    model, x = make(16, torch.float32, targets=("c",)), rows(torch.float32)
    accelerate_peft(model)
    check(outcome(model, x, torch.compile(model, fullgraph=True)), outcome(model, x), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(dtype, dropped, reentrant):
    model, x = make(dtype=dtype, vera_dropout=dropped), rows(dtype)
    accelerate_peft(model)
    torch.manual_seed(5)
    expected = [y.clone() for y in backward(model, x, model)]
    torch.manual_seed(5)
    found = backward(
        model,
        x,
        lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant),
    )
    check(found, expected, 1e-12)


def backward(model, x, call):
    """As ``outcome``, by ``backward()``, which the reentrant kind needs."""
    for leaf in (x, *model.parameters()):
        leaf.grad = None
    y = call(x)
    y.double().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


SMALL = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def roberta():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(**SMALL, **sizes, intermediate_size=40, max_position_embeddings=40)
    return RobertaForSequenceClassification(config)


def llama():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**SMALL, **sizes, intermediate_size=40, num_key_value_heads=2)
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=24, n_layer=2, n_head=2, n_positions=40))


MODELS = {
    "roberta": (roberta, ["query", "value"], "SEQ_CLS"),
    "llama": (llama, "all-linear", "CAUSAL_LM"),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM"),
}


def transformer(name, dtype, r, **settings):
    build, targets, task = MODELS[name]
    config = peft.VeraConfig(
        r=r, target_modules=targets, task_type=task, fan_in_fan_out=name == "gpt2", **settings
    )
    model = peft.get_peft_model(build().to(dtype), config).eval()
    randomize(model)
    return model


def logits_and_gradients(model, ids):
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids).logits
    logits.double().logsumexp(-1).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    return [logits.detach(), *grads]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("r", [6, 80])
def test_transformers_models(name, r):
    model = transformer(name, torch.float64, r)
    ids = torch.randint(3, 50, (3, 17))
    expected = logits_and_gradients(model, ids)
    handle = accelerate_peft(model)
    assert len(handle.layers) == {"roberta": 4, "llama": 14, "gpt2": 8}[name]
    check(logits_and_gradients(model, ids), expected)
    model.train()
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for module in model.modules():  # the models' own
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            module.attention_dropout = 0.0
        check(logits_and_gradients(model, ids), expected)


def test_a_half_precision_transformer(tmp_path):
    model = transformer("llama", torch.bfloat16, 6)
    ids = torch.randint(3, 50, (3, 17))
    exact, plain = (
        logits_and_gradients(copy.deepcopy(model).to(dtype), ids)
        for dtype in (torch.float64, torch.bfloat16)
    )
    accelerate_peft(model)
    found = logits_and_gradients(model, ids)
    assert_parity(found[0], plain[0], exact[0])
    found, plain, exact = (
        torch.cat([(grad.double() / right.norm()).flatten() for grad, right in pairs])
        for pairs in (zip(x[1:], exact[1:], strict=True) for x in (found, plain, exact))
    )
    assert (found - exact).norm() <= 1.2 * (plain - exact).norm()
    tokens = model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 17
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
    accelerate_peft(again)
    assert torch.equal(again(ids).logits, expected)


def test_the_model_below_peft_s():
    model = transformer("llama", torch.float64, 4)
    ids = torch.randint(3, 50, (3, 17))
    expected = model(ids).logits
    assert len(accelerate_peft(model.get_base_model()).layers) == 14
    check([model(ids).logits], [expected])


def test_refusals():
    with pytest.raises(TypeError, match=r"accelerate_peft: peft_model: expected .* got int"):
        accelerate_peft(3)
    with pytest.raises(ValueError, match=r"accelerate_peft: peft_model: expected .* got Net$"):
        accelerate_peft(Net())
    lora = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(ValueError, match=r"got PeftModel with LORA$"):
        accelerate_peft(lora)
    model = make()
    unloaded = copy.deepcopy(model).unload()
    with pytest.raises(ValueError, match="got Net"):
        accelerate_peft(unloaded)
    layer = layers(model)[2]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"forward.*'base_model\.model\.c'"):
        accelerate_peft(model)
    assert all(type(each) is Linear for each in layers(model))


def test_layers_of_inheriting_classes_are_left():
    class Mine(Linear):
        pass

    model = make()
    layers(model)[0].__class__ = Mine
    handle = accelerate_peft(model)
    assert [type(layer) for layer in layers(model)] == [Mine, *[AcceleratedLinear] * 2]
    handle.undo()
    assert type(layers(model)[0]) is Mine


def test_a_trained_matrix_is_refused_in_words():
    model = make()
    accelerate_peft(model)
    model.base_model.vera_A["default"].requires_grad_(True)
    with pytest.raises(ValueError, match="A: expected a frozen matrix"):
        model(rows())


def test_peft_is_needed_only_when_called(monkeypatch):
    code = (
        "import sys; from fmkernels.api.vera_peft import accelerate_peft\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.delitem(sys.modules, "fmkernels.api.vera_peft_layer")
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.tuners.vera.layer", None)
    with pytest.raises(ImportError, match=r"accelerate_peft needs peft, .* pip install peft"):
        accelerate_peft(nn.Linear(2, 2))
