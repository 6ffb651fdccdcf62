"""VeRA models that are copied, pickled, saved, cast, moved, emptied, and placed by accelerate."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from vera_models import inputs_for, randomize_vectors, tiny_llama, tiny_roberta

from fmkernels.api import VeraConfig, get_vera_model

accelerate = pytest.importorskip("accelerate")
SUPPORT = Path(__file__).parent.parent / "support"


def adapted(base=None, **changes):
    """Two adapters, the first DVoRA."""
    targets = ["q_proj", "k_proj", "v_proj"]
    first = {"use_dora": True, "target_modules": targets, **changes}
    model = get_vera_model(base or tiny_llama(), VeraConfig(r=4, **first))
    model.add_adapter("second", VeraConfig(r=4, **{**first, "use_dora": False}))
    return randomize_vectors(model)


def pair_of(model):
    """The only A and B."""
    (pair,) = model.shared.values()
    return pair


@torch.no_grad()
def answers(model, adapter_names=("second", "default", "__base__")):
    return model(**inputs_for(model), adapter_names=list(adapter_names)).logits


def test_deepcopy():
    model = adapted()
    expected = answers(model)
    copied = copy.deepcopy(model)
    assert torch.equal(answers(copied), expected)
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not own & {id(p) for p in [*copied.parameters(), *copied.buffers()]}
    with torch.no_grad():
        for parameter in copied.adapter_parameters("second"):
            parameter.mul_(2)
    copied.set_adapter("second")
    copied.delete_adapter("default")
    assert torch.equal(answers(model), expected)
    assert model.active_adapter == "default"
    assert len(copied.shared) == len(model.shared) == 1
    changed = answers(copied, ["second", "second", "__base__"])
    assert not torch.equal(changed[0], expected[0])
    assert torch.equal(changed[2], expected[2])
    before = answers(model, ["second", "second", "__base__"])
    pair_of(copied).A.zero_()  # those that its layers take
    assert not torch.equal(answers(copied, ["second", "second", "__base__"])[0], changed[0])
    assert torch.equal(answers(model, ["second", "second", "__base__"]), before)


def test_copies_of_a_model_that_compiles_itself():
    """What is compiled cannot be pickled, and is left out, as of any module."""
    model = adapted()
    expected = answers(model)
    model.compile(backend="eager")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(answers(torch.load(buffer, weights_only=False)), expected)
    assert torch.equal(answers(copy.deepcopy(model)), expected)


def test_pickled_modules_in_this_process_and_a_fresh_one(tmp_path):
    model = adapted()
    expected = answers(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(answers(loaded), expected)
    assert type(loaded) is type(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save((inputs_for(model), expected), tmp_path / "expected.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "inputs, expected = torch.load(sys.argv[2])\n"
        "found = model(**inputs, adapter_names=['second', 'default', '__base__']).logits\n"
        "torch.testing.assert_close(found, expected, rtol=0, atol=0)\n"
        "model.set_adapter('second')\n"
        "print(list(model.adapters), model.active_adapter)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    run = subprocess.run(
        [*command, tmp_path / "model.pt", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["['default',", "'second']", "second"]


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict(save_projection, assign):
    model = adapted(save_projection=save_projection)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert any(key.startswith("shared.") for key in state) == save_projection
    other = adapted(save_projection=save_projection)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
        if save_projection:
            pair_of(other).A.zero_()
    assert not torch.equal(answers(other), answers(model))
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(answers(other), answers(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if "lambda_d" not in k})


def matrix_keys(model):
    return [key for key in model.state_dict() if key.startswith("shared.")]


@pytest.mark.parametrize("init", ["kaiming_uniform", "position"])
def test_names_of_matrices_are_those_of_a_fresh_model_whatever_was_there_before(init):
    seed = {"r": 5, "init": init, "projection_prng_key": 3}
    config = VeraConfig(target_modules=["q_proj", "up_proj", "down_proj"], **seed)
    other = VeraConfig(**{**seed, "r": 4}, target_modules=["q_proj"])
    fresh = get_vera_model(tiny_llama(), config, "own")
    model = get_vera_model(tiny_llama(), other, "gone")
    model.add_adapter("own", config)
    model.add_adapter("smaller", VeraConfig(target_modules=["up_proj"], **seed))
    model.delete_adapter("gone")
    model.add_adapter("later", other)
    assert len(model.shared) == 3
    model.delete_adapter("smaller")
    model.delete_adapter("later")
    name = f"shared.r5_{init}_3_24x24"
    assert matrix_keys(model) == matrix_keys(fresh) == [f"{name}.A", f"{name}.B"]
    randomize_vectors(model)
    assert str(fresh.load_state_dict(model.state_dict())) == "<All keys matched successfully>"


def test_other_matrices_of_the_same_name_are_numbered(tmp_path):
    """As of a file whose matrices are not those of its seed."""
    config = VeraConfig(r=4, target_modules=["q_proj"])
    model = get_vera_model(tiny_llama(), config)
    pair_of(model).A.mul_(2)
    model.save_pretrained(tmp_path)
    model = get_vera_model(tiny_llama(), config)
    model.load_adapter(tmp_path, "second")
    model.load_adapter(tmp_path, "third")
    name = "r4_kaiming_uniform_0_16x16"
    assert list(model.shared) == [name, f"{name}_2"]
    assert torch.equal(model.shared[f"{name}_2"].A, 2 * model.shared[name].A)


@pytest.mark.parametrize("unload", [False, True])
def test_state_dict_of_a_merged_model_is_refused(unload):
    """Loaded into another model, the adapter would be in the weights, and beside them again."""
    model = adapted()
    state = copy.deepcopy(model.state_dict())
    model.merge_and_unload("second") if unload else model.merge("second")
    merged = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"^VeraModel\.state_dict: expected adapters that are not m"
    ):
        nn.Sequential(model).state_dict()
    with pytest.raises(ValueError, match=r"^VeraModel\.load_state_dict: expected .*unmerge\(\)"):
        model.load_state_dict(state)
    assert all(torch.equal(p, merged[name]) for name, p in model.named_parameters())
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.unmerge()
        found = each.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.items())


def test_casts_of_the_whole_model():
    """In float64, of what is rounded to half precision once: the same as an adapter over it."""
    wide, half = adapted(), adapted()
    answers(half.bfloat16())  # copies of the matrices, and constants of the norms
    half.half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {b.dtype for b in half.shared.buffers()} == {torch.float16}
    assert answers(half).dtype == torch.float16
    half.double()
    rounded = wide.bfloat16().half().double()
    torch.testing.assert_close(answers(half), answers(rounded))
    again = copy.deepcopy(rounded)
    torch.testing.assert_close(answers(half), answers(again))


def test_matrices_in_the_place_of_others_are_not_those_of_before():
    """Memory that is freed is often given again, and a new tensor has not been changed either."""
    layer = nn.Sequential(nn.Linear(12, 12))
    model = randomize_vectors(get_vera_model(layer, VeraConfig(r=4, target_modules=["0"])))
    x, memory = torch.randn(3, 12, dtype=torch.float64), torch.empty(4, 12)
    for _ in range(2):
        memory.normal_()
        pair_of(model).A = torch.empty(0).set_(memory.untyped_storage(), 0, memory.shape)
        assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("dora", [False, True])
def test_meta_and_to_empty(dora):
    """Meta tensors have shapes alone; what is emptied works again when a state is loaded."""
    model = adapted(use_dora=dora)
    expected, state = answers(model), copy.deepcopy(model.state_dict())
    model.to("meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    batch = {key: value.to("meta") for key, value in inputs_for(tiny_llama()).items()}
    assert model(**batch).logits.shape == expected.shape
    model.to_empty(device="cpu")
    buffers = {
        name: value for name, value in tiny_llama().named_buffers() if "rotary" in name
    }  # not in the state, transformers' own
    for name, value in buffers.items():
        model.model.get_buffer(name).copy_(value)
    model.load_state_dict(state)
    assert torch.equal(answers(model), expected)


@pytest.mark.parametrize("save_projection", [True, False])
def test_an_adapter_over_a_model_on_meta(save_projection):
    """The seed makes the matrices when they get memory, for they need not be in a state."""
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))
    config = VeraConfig(r=4, target_modules=["0", "2"], save_projection=save_projection)
    empty = get_vera_model(base, config)
    assert empty(torch.empty(3, 12, device="meta")).shape == (3, 4)
    real = get_vera_model(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)), config)
    randomize_vectors(real)
    empty.to_empty(device="cpu")
    empty.load_state_dict(real.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(empty(x), real(x))
    assert not torch.equal(empty(x), empty.model[2].base_layer(torch.tanh(real.model[0](x))))


@pytest.mark.parametrize("base", [tiny_llama, tiny_roberta])
@pytest.mark.parametrize("dora", [False, True])
def test_base_layers_that_are_offloaded(base, dora):
    """Their forward is accelerate's, and their weights are on meta between calls."""
    targets = ["q_proj", "v_proj"] if base is tiny_llama else ["query", "value"]
    config = VeraConfig(r=4, target_modules=targets, use_dora=dora)
    expected = randomize_vectors(get_vera_model(base(dtype=torch.float64), config))
    offloaded = accelerate.cpu_offload(
        base(dtype=torch.float64), execution_device=torch.device("cpu")
    )
    model = randomize_vectors(get_vera_model(offloaded, config))
    layer = next(m for m in model.modules() if type(m).__name__ == "VeraLayer")
    assert layer.base_layer.weight.is_meta
    assert not any(p.is_meta for p in model.adapter_parameters("default"))
    batch = inputs_for(expected)
    for adapter_names in (None, ["default", "__base__", "default"]):
        results = []
        for each in (model, expected):
            each.zero_grad()
            output = each(**batch, adapter_names=adapter_names)
            output.logits.square().sum().backward()
            vectors = each.adapter_parameters("default")
            results.append([output.logits.detach(), *(p.grad for p in vectors)])
        torch.testing.assert_close(*results)
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.is_meta})
    with pytest.raises(ValueError, match="merge: expected"):
        model.merge()
    torch.testing.assert_close(
        dict(before), {k: p for k, p in model.named_parameters() if k in before}
    )


def test_layers_that_are_dispatched_whole():
    """An adapted model, offloaded: accelerate has to load a layer with its vectors."""
    model, expected = adapted(), answers(adapted())
    accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=["VeraLayer"]
    )
    layer = next(m for m in model.modules() if type(m).__name__ == "VeraLayer")
    assert layer.base_layer.weight.is_meta
    torch.testing.assert_close(answers(model), expected)


def test_a_layer_whose_forward_is_replaced_or_hooked():
    """What is done to a base layer is done, and not passed by."""
    base = nn.Sequential(nn.Linear(12, 8))
    linear = base[0]
    model = randomize_vectors(get_vera_model(base, VeraConfig(r=4, target_modules=["0"])))
    x = torch.randn(3, 12)
    y = model(x)
    accelerate.hooks.add_hook_to_module(linear, accelerate.hooks.ModelHook())
    torch.testing.assert_close(model(x), y)
    accelerate.hooks.remove_hook_from_module(linear)
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)
    doubled = y + nn.Linear.forward(linear, x)
    torch.testing.assert_close(model(x), doubled)
    del linear.forward
    handle = linear.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(model(x), doubled)
    handle.remove()
    assert torch.equal(model(x), y)
