"""VeRA's files: what we write PEFT loads, what PEFT writes we load, and no save is left half done."""

import copy
import json
import os
import pickle
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from vera_models import (
    PEFT_WARNINGS,
    assert_unchanged,
    logits,
    randomize_vectors,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_vit,
)

from fmkernels.api import VeraConfig, VeraModel, get_vera_model

pytestmark = [pytest.mark.filterwarnings(warning) for warning in PEFT_WARNINGS]

A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODELS = {
    "roberta": tiny_roberta,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "llama-classifier": lambda **options: tiny_llama(classifier=True, **options),
    "vit": tiny_vit,
}
CASES = [
    ("roberta", {"target_modules": ["query", "value"]}),
    ("roberta", {"target_modules": ["query", "value"], "bias": "all"}),
    ("roberta", {"target_modules": ["query", "dense"], "bias": "vera_only"}),
    ("roberta", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    ("roberta", {"target_modules": ["query"], "modules_to_save": ["LayerNorm", "classifier"]}),
    ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "vera_only"}),
    ("roberta", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("roberta", {"target_modules": "all-linear", "d_initial": 0.3, "vera_dropout": 0.2}),
    ("roberta", {"target_modules": r".*\.layer\.1\..*(query|dense)"}),
    ("roberta", {"target_modules": ["key"], "layers_to_transform": [1]}),
    (
        "roberta",
        {"target_modules": ["key"], "layers_to_transform": 0, "layers_pattern": "layer"},
    ),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": "all-linear", "bias": "all"}),
    ("gpt2", {"target_modules": ["c_fc", "c_proj"], "bias": "vera_only"}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
    ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "projection_prng_key": 11}),
    ("llama-classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    ("vit", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "all"}),
]
DTYPES = (torch.float32, torch.bfloat16)
ALL = [(*case, True) for case in CASES] + [(*case, False) for case in CASES[::4]]
"""With A and B in the file, and without."""


def essential(folder):
    """The tensors of a file, but for the repetitions that PEFT writes of modules trained whole."""
    tensors = load_file(folder / WEIGHTS)
    repeated = (".modules_to_save.", ".original_module.")
    return {k: v for k, v in tensors.items() if not any(part in k for part in repeated)}


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def assert_close(found, expected, exact, dtype):
    """Float32: the two differ in the order of their sums. bfloat16: ours errs no more than twice
    what PEFT does, which multiplies its adapters in float32."""
    scale = exact.abs().max()
    if dtype == torch.float32:
        assert (found - expected).abs().max() <= 2e-6 * scale
    else:
        errors = [(x - exact).pow(2).mean().sqrt() / scale for x in (found, expected)]
        assert errors[0] <= 2 * errors[1]
        assert errors[1] > 0


def in_float64(name, folder, dtype):
    """What the adapter in a file means, without roundings."""
    base = MODELS[name](dtype=dtype).double()
    return logits(peft.PeftModel.from_pretrained(base, folder))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "settings", "saved"), ALL, ids=str)
def test_what_we_write_peft_loads(tmp_path, name, settings, saved, dtype):
    config = VeraConfig(r=6, save_projection=saved, **settings)
    ours = randomize_vectors(get_vera_model(MODELS[name](dtype=dtype), config))
    ours.eval().save_pretrained(tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == [CONFIG, WEIGHTS]
    assert (A_KEY in load_file(tmp_path / "ours" / WEIGHTS)) == saved

    theirs = peft.PeftModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path / "ours")
    pair = ours._adapters.pairs()[0]
    for own, other in ((pair.A, "vera_A"), (pair.B, "vera_B")):
        held = getattr(theirs.base_model, other)["default"]
        assert torch.equal(own.float(), held.float())
    if saved:
        exact = in_float64(name, tmp_path / "ours", dtype)
        assert_close(logits(ours), logits(theirs), exact, dtype)
    assert not torch.equal(logits(ours), logits(MODELS[name](dtype=dtype)))  # the adapter matters

    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(essential(tmp_path / "ours"), essential(tmp_path / "theirs"))
    # trained, as it was: layers with a trained bias are computed otherwise
    again = VeraModel.from_pretrained(
        MODELS[name](dtype=dtype), tmp_path / "theirs", is_trainable=True
    )
    assert torch.equal(logits(again), logits(ours))
    assert set(again._adapters.layers()) == set(ours._adapters.layers())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "settings", "saved"), ALL, ids=str)
def test_what_peft_writes_we_load(tmp_path, name, settings, saved, dtype):
    config = peft.VeraConfig(r=6, save_projection=saved, **settings)
    theirs = peft.get_peft_model(MODELS[name](dtype=dtype), config)
    randomize_vectors(theirs).eval().save_pretrained(tmp_path / "theirs")

    ours = VeraModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path / "theirs")
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    pair = ours._adapters.pairs()[0]
    assert pair.A.dtype == dtype
    for own, other in ((pair.A, "vera_A"), (pair.B, "vera_B")):
        held = getattr(theirs.base_model, other)["default"]
        assert torch.equal(own.float(), held.float())
    if saved:
        exact = in_float64(name, tmp_path / "theirs", dtype)
        assert_close(logits(ours), logits(theirs), exact, dtype)
    assert not torch.equal(logits(ours), logits(MODELS[name](dtype=dtype)))

    ours.save_pretrained(tmp_path / "ours")
    assert_same_tensors(essential(tmp_path / "theirs"), essential(tmp_path / "ours"))
    again = peft.PeftModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path / "ours")
    assert torch.equal(logits(again), logits(theirs))
    trainable = VeraModel.from_pretrained(
        MODELS[name](dtype=dtype), tmp_path / "theirs", is_trainable=True
    )
    assert all(p.requires_grad for p in trainable.adapter_parameters("default"))
    assert_same_tensors(trainable.state_dict(), ours.state_dict())


def test_what_we_write_peft_loads_without_a_warning(tmp_path):
    """With A and B; pytest makes an error of each here."""
    config = VeraConfig(r=6, target_modules=["query"], task_type="SEQ_CLS")
    randomize_vectors(get_vera_model(tiny_roberta(), config)).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(tiny_roberta(), tmp_path)
    gpt2 = get_vera_model(
        tiny_gpt2(), VeraConfig(r=6, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    gpt2.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)


def test_the_file_that_was_loaded_may_change(tmp_path):
    """Written again in the place of the old one, as others' programs do, not under another name."""
    config = VeraConfig(r=6, target_modules=["query"], modules_to_save=["classifier"])
    model = randomize_vectors(get_vera_model(tiny_roberta(), config))
    model.save_pretrained(tmp_path)
    loaded = VeraModel.from_pretrained(tiny_roberta(), tmp_path)
    state = {name: value.clone() for name, value in loaded.state_dict().items()}
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / WEIGHTS)))
    assert_same_tensors(loaded.state_dict(), state)
    assert torch.equal(logits(loaded), logits(model))


class TiedHead(nn.Module):
    """One weight under two names, and a vector beside a part of it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight
        self.register_buffer("row", torch.arange(8.0))
        self.register_buffer("part", self.row[:4])

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) * self.row)[..., :4] + self.part


@pytest.mark.parametrize("write", ["save_pretrained", "to_lora"])
def test_tied_weights_in_what_is_trained_whole(tmp_path, write):
    net = nn.Sequential(nn.Linear(8, 8), TiedHead())
    config = VeraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    model = randomize_vectors(get_vera_model(copy.deepcopy(net), config))
    own = model.model.get_submodule("1").of("default")
    assert own.up.weight is own.down.weight
    getattr(model, write)(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in ("up", "down"):
        assert torch.equal(tensors[f"base_model.model.1.{name}.weight"], own.up.weight)
    assert torch.equal(tensors["base_model.model.1.part"], torch.arange(4.0))
    if write == "save_pretrained":
        again = VeraModel.from_pretrained(net, tmp_path)
        own = again.model.get_submodule("1").of("default")
        assert own.up.weight is own.down.weight
        x = torch.randn(3, 8)
        assert torch.equal(again(x), model(x))


def test_counts_in_what_is_trained_whole_stay_whole_numbers(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    config = VeraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    model = get_vera_model(net(), config)
    model(torch.randn(5, 6))
    model.save_pretrained(tmp_path)
    again = VeraModel.from_pretrained(net(), tmp_path)
    counts = [m.model.get_submodule("1").of("default").num_batches_tracked for m in (model, again)]
    assert counts[0] == counts[1] == 1


def test_names_that_the_model_lacks_are_passed_over_in_files(tmp_path):
    """PEFT adapts what is there, and so do we when we load; a new adapter names what is there."""
    config = peft.VeraConfig(r=4, target_modules=["query", "q_proj"], modules_to_save=["score"])
    theirs = randomize_vectors(peft.get_peft_model(tiny_roberta(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = VeraModel.from_pretrained(tiny_roberta(), tmp_path)
    assert ours.adapters["default"].target_modules == ["query"]
    assert ours.adapters["default"].modules_to_save is None
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"got \['q_proj'\]"):
        get_vera_model(tiny_roberta(), config)


def test_the_active_adapter_or_a_named_one_is_saved(tmp_path):
    model = get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"]), "first")
    model.add_adapter("second", VeraConfig(r=6, target_modules=["query", "value"]))
    randomize_vectors(model)
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(str(tmp_path / "second"), "second")
    for name, rank in (("first", 4), ("second", 6)):
        model.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(tiny_roberta(), tmp_path / name)
        assert theirs.peft_config["default"].r == rank
        torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    model.set_adapter(None)
    with pytest.raises(ValueError, match="adapter_name: expected the name of an adapter"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_bias_of_the_outermost_module_and_a_saved_buffer(tmp_path):
    """A model that is a linear layer itself, with a batch norm whose count has no dimensions."""

    class Outer(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return super().forward(self.norm(self.inner(x)))

    torch.manual_seed(0)
    base = Outer().eval()
    state = {k: v.clone() for k, v in base.state_dict().items()}

    def fresh():
        model = Outer().eval()
        model.load_state_dict(state)
        return model

    settings = {"r": 2, "target_modules": ["inner"], "bias": "all", "modules_to_save": ["norm"]}
    theirs = peft.get_peft_model(fresh(), peft.VeraConfig(**settings))
    randomize_vectors(theirs).eval().save_pretrained(tmp_path / "theirs")
    ours = VeraModel.from_pretrained(fresh(), tmp_path / "theirs")
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    assert "base_model.model.bias" in load_file(tmp_path / "ours" / WEIGHTS)
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours").eval()
    assert torch.equal(again(x), theirs(x))


def test_vectors_saved_in_a_half_type_are_trained_in_float32(tmp_path):
    config = VeraConfig(r=4, target_modules=["query"])
    model = randomize_vectors(get_vera_model(tiny_roberta(), config))
    model.save_pretrained(tmp_path)
    tensors = {name: t.bfloat16() for name, t in essential(tmp_path).items()}
    tensors |= {key: t.float() for key, t in essential(tmp_path).items() if key in (A_KEY, B_KEY)}
    save_file(tensors, tmp_path / WEIGHTS)
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path, is_trainable=True)
    assert {p.dtype for p in again.adapter_parameters("default")} == {torch.float32}
    assert torch.equal(logits(again), logits(model))  # their values are numbers of bfloat16


def test_matrices_may_be_larger_than_the_layers_need(tmp_path):
    """As of a file for more layers."""
    config = VeraConfig(r=4, target_modules=["query"])
    model = randomize_vectors(get_vera_model(tiny_roberta(), config))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[A_KEY] = torch.cat([tensors[A_KEY], torch.randn(4, 3)], dim=1)
    tensors[B_KEY] = torch.cat([tensors[B_KEY], torch.randn(5, 4)])
    save_file(tensors, tmp_path / WEIGHTS)
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_over_a_base_in_float64(tmp_path):
    config = VeraConfig(r=6, target_modules=["query", "value"])
    ours = randomize_vectors(get_vera_model(tiny_roberta(dtype=torch.float64), config))
    ours.save_pretrained(tmp_path)
    again = VeraModel.from_pretrained(tiny_roberta(dtype=torch.float64), tmp_path)
    assert torch.equal(logits(again), logits(ours))
    theirs = peft.PeftModel.from_pretrained(tiny_roberta(dtype=torch.float64), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)  # in float32


# what PEFT must not load


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"use_dora": True}, "DVORA"),
        ({"use_dora": True, "save_projection": False, "init": "position"}, "DVORA"),
        ({"init": "position", "save_projection": False}, "VERA_SEED"),
        ({"init": "kaiming_normal", "save_projection": False}, "VERA_SEED"),
    ],
    ids=str,
)
def test_what_peft_would_compute_otherwise_it_refuses(tmp_path, settings, kind):
    config = VeraConfig(r=4, target_modules=["query", "value"], **settings)
    model = randomize_vectors(get_vera_model(tiny_roberta(), config))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == kind
    with pytest.raises((KeyError, ValueError), match=kind):
        peft.PeftModel.from_pretrained(tiny_roberta(), tmp_path)
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path)
    assert again.adapters["default"] == model.adapters["default"]
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(model), logits(tiny_roberta()))


@pytest.mark.parametrize("init", ["position", "kaiming_normal"])
def test_matrices_that_peft_draws_otherwise_it_takes_from_the_file(tmp_path, init):
    config = VeraConfig(r=4, target_modules=["query", "value"], init=init)
    model = randomize_vectors(get_vera_model(tiny_roberta(), config))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_roberta(), tmp_path)
    pair = model._adapters.pairs()[0]
    assert torch.equal(theirs.base_model.vera_A["default"], pair.A)
    assert torch.equal(theirs.base_model.vera_B["default"], pair.B)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    drawn = peft.get_peft_model(tiny_roberta(), peft.VeraConfig(r=4, target_modules=["query"]))
    assert not torch.equal(drawn.base_model.vera_A["default"], pair.A)


# files that do not fit


@pytest.fixture
def folder(tmp_path):
    settings = {"target_modules": ["query", "value"], "bias": "vera_only"}
    config = VeraConfig(r=4, modules_to_save=["classifier"], **settings)
    randomize_vectors(get_vera_model(tiny_roberta(), config)).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, words, error=ValueError, base=None):
    """The message of the refusal, by a model without adapters and by one that has some."""
    base = tiny_roberta() if base is None else base
    base.roberta.requires_grad_(False)
    before = snapshot(base)
    with pytest.raises(error, match=words) as caught:
        VeraModel.from_pretrained(base, folder)
    assert_unchanged(base, before)
    model = get_vera_model(tiny_roberta(), VeraConfig(r=3, target_modules=["key"]))
    before = snapshot(model)
    with pytest.raises(error):
        model.load_adapter(folder, "second")
    assert_unchanged(model, before)
    assert list(model.adapters) == ["default"]
    assert str(caught.value).startswith("VeraModel.load_adapter: ")
    return str(caught.value)


KEY = "base_model.model.roberta.encoder.layer.0.attention.self.query"
TAMPERED = [
    ({f"{KEY}.vera_lambda_b": None}, "missing", [f"{KEY}.vera_lambda_b"]),
    ({f"{KEY}.vera_lambda_d": None, A_KEY: None}, "missing", [f"{KEY}.vera_lambda_d", A_KEY]),
    ({A_KEY: None, B_KEY: None}, "missing", [A_KEY, B_KEY]),
    ({f"{KEY}.base_layer.bias": None}, "missing", [f"{KEY}.base_layer.bias"]),
    (
        {"base_model.model.classifier.dense.weight": None},
        "missing",
        ["base_model.model.classifier.dense.weight"],
    ),
    ({"other": torch.zeros(1)}, "unknown", ["other"]),
    ({f"{KEY}.lora_A.weight": torch.zeros(1, 1)}, "unknown", [f"{KEY}.lora_A.weight"]),
    ({f"{KEY}.vera_magnitude": torch.zeros(16)}, "unknown", [f"{KEY}.vera_magnitude"]),
    (
        {f"{KEY}.vera_lambda_b": torch.zeros(17)},
        "of another shape",
        [f"{KEY}.vera_lambda_b (17,), not (16,)"],
    ),
    (
        {f"{KEY}.vera_lambda_d": torch.zeros(4, 1)},
        "of another shape",
        [f"{KEY}.vera_lambda_d (4, 1), not (4,)"],
    ),
    ({A_KEY: torch.zeros(4, 15)}, "of another shape", [f"{A_KEY} (4, 15), not (4, >= 16)"]),
    ({A_KEY: torch.zeros(5, 16)}, "of another shape", [f"{A_KEY} (5, 16), not (4, >= 16)"]),
    ({B_KEY: torch.zeros(15, 4)}, "of another shape", [f"{B_KEY} (15, 4), not (>= 16, 4)"]),
    ({B_KEY: torch.zeros(64)}, "of another shape", [f"{B_KEY} (64,), not (>= 16, 4)"]),
    (
        {"base_model.model.classifier.out_proj.weight": torch.zeros(2, 16)},
        "of another shape",
        ["base_model.model.classifier.out_proj.weight (2, 16), not (3, 16)"],
    ),
    (
        {f"{KEY}.vera_lambda_b": torch.zeros(16, dtype=torch.int32)},
        "of no floating dtype",
        [f"{KEY}.vera_lambda_b torch.int32"],
    ),
    (
        {"base_model.model.classifier.out_proj.weight": torch.zeros(3, 16, dtype=torch.int8)},
        "of no floating dtype",
        ["base_model.model.classifier.out_proj.weight torch.int8"],
    ),
    (
        {A_KEY: torch.zeros(4, 16, dtype=torch.int64)},
        "of no floating dtype",
        [f"{A_KEY} torch.int64"],
    ),
]


@pytest.mark.parametrize(("changes", "word", "listed"), TAMPERED, ids=lambda value: None)
def test_tensors_that_do_not_fit_are_named(folder, changes, word, listed):
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)
    message = refused(folder, "tensors that do not fit")
    assert f"({word}: {', '.join(listed)})" in message
    assert "nothing was loaded" in message


def test_all_that_does_not_fit_is_named_at_once(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{KEY}.vera_lambda_d"], tensors[A_KEY]
    tensors |= {"x": torch.zeros(1), "y": torch.zeros(1), B_KEY: torch.zeros(16, 5)}
    save_file(tensors, folder / WEIGHTS)
    message = refused(folder, "tensors that do not fit")
    for part in (
        f"missing: {KEY}.vera_lambda_d, {A_KEY};",
        "unknown: x, y;",
        f"of another shape: {B_KEY} (16, 5), not (>= 16, 4))",
    ):
        assert part in message


def test_all_of_a_long_list_are_named(folder):
    tensors = load_file(folder / WEIGHTS) | {f"k{i:03}": torch.zeros(1) for i in range(300)}
    save_file(tensors, folder / WEIGHTS)
    message = refused(folder, "tensors that do not fit")
    assert all(f"k{i:03}" in message for i in range(300))


def test_another_base_model_is_refused(folder):
    """By names, by widths, and by the number of layers, smaller and larger."""
    assert "target_modules" in refused_by(tiny_llama(), folder)
    wider = tiny_roberta()
    for layer in wider.roberta.encoder.layer:
        layer.attention.self.query = nn.Linear(16, 20)
    assert "vera_lambda_b (16,), not (20,)" in refused_by(wider, folder)
    assert "missing" in refused_by(tiny_roberta(layers=3), folder)
    assert "unknown" in refused_by(tiny_roberta(layers=1), folder)


def refused_by(base, folder):
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"VeraModel\.load_adapter: ") as caught:
        VeraModel.from_pretrained(base, folder)
    assert_unchanged(base, before)
    return str(caught.value)


class Recorder:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_in_words_and_never_opened(folder):
    mark = folder / "was executed"
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Recorder(mark)))
    message = refused(folder, "adapter_model.bin is a pickle", FileNotFoundError)
    assert "safe_serialization=True" in message
    assert not mark.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())  # it would have been
    assert mark.exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused(folder):
    mark = folder / "was executed"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Recorder(mark)))
    refused(folder, "is damaged, cut short or no safetensors file")
    torch.save({"a": torch.zeros(1)}, folder / WEIGHTS)
    refused(folder, "is damaged, cut short or no safetensors file")
    assert not mark.exists()


def test_missing_files_and_folders(folder, tmp_path):
    refused(tmp_path / "absent", "expected a folder with adapter_config.json", FileNotFoundError)
    refused(folder / CONFIG, "expected a folder with adapter_config.json", FileNotFoundError)
    (folder / WEIGHTS).unlink()
    refused(folder, "expected adapter_model.safetensors in", FileNotFoundError)
    with pytest.raises(TypeError, match=r"VeraModel\.load_adapter: path: expected"):
        VeraModel.from_pretrained(tiny_roberta(), None)


def test_a_lora_is_refused(tmp_path):
    lora = peft.get_peft_model(tiny_roberta(), peft.LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path)
    refused(tmp_path, "peft_type: expected VERA, DVORA or VERA_SEED, got 'LORA'")


# saving


def test_saving_where_a_file_lies_is_refused(tmp_path):
    model = get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"]))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder, or a new one's name, got a file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(TypeError, match=r"VeraModel\.save_pretrained: path: expected"):
        model.save_pretrained(3)


def test_saving_overwrites_and_leaves_other_files(tmp_path):
    model = get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"]))
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    randomize_vectors(model).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS]
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    modes = {os.stat(tmp_path / name).st_mode & 0o777 for name in os.listdir(tmp_path)}
    assert len(modes) == 1  # as of other files, although safetensors lets only the owner read


def failing(monkeypatch, place, error):
    """One step of a save fails, some of its work done."""
    if place == "save_file":

        def save(tensors, path, metadata=None):
            Path(path).write_bytes(b"half a file")
            raise error

        monkeypatch.setattr(safetensors.torch, "save_file", save)
    elif place == "write_text":

        def write(self, text, **settings):
            self.write_bytes(text[:20].encode())
            raise error

        monkeypatch.setattr(Path, "write_text", write)
    else:
        name, _, number = place.partition(" ")
        real, calls = getattr(os, name), []

        def step(*arguments, **settings):
            calls.append(arguments)
            if len(calls) == int(number):
                raise error
            return real(*arguments, **settings)

        monkeypatch.setattr(os, name, step)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize(
    "place", ["save_file", "write_text", "fsync 1", "fsync 2", "replace 1", "replace 2"]
)
def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, place, links, error):
    old = get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"]))
    randomize_vectors(old).save_pretrained(tmp_path / "old")
    before = {name: (tmp_path / "old" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    new = get_vera_model(tiny_roberta(1), VeraConfig(r=7, target_modules=["value"]))
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("none")))
    for folder in ("old", "new"):
        with monkeypatch.context() as patch:
            failing(patch, place, error)
            with pytest.raises(type(error)):
                new.save_pretrained(tmp_path / folder)
    after = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    assert after == before
    assert list((tmp_path / "new").iterdir()) == []
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path / "old")
    assert torch.equal(logits(again), logits(old))
    new.save_pretrained(tmp_path / "old")  # and the next goes through
    assert VeraModel.from_pretrained(tiny_roberta(1), tmp_path / "old").adapters["default"].r == 7


def test_without_safetensors_it_is_said_what_to_install(tmp_path, monkeypatch):
    model = get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ImportError, match="pip install safetensors"):
        model.load_adapter(tmp_path, "second")


def test_conv1d_and_linear_in_one_adapter(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(7, 5), nn.Tanh(), nn.Linear(7, 4))

    settings = {"r": 3, "target_modules": ["0", "2"], "bias": "all"}
    ours = randomize_vectors(get_vera_model(net(), VeraConfig(**settings)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    x = torch.randn(6, 5)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = VeraModel.from_pretrained(net(), tmp_path / "theirs", is_trainable=True)
    assert torch.equal(again(x), ours(x))
