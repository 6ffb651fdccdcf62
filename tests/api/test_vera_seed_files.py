"""Checkpoints that are a seed and two vectors a layer, the way to PEFT's form, and the way back."""

import json
import struct
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vera_models import (
    PEFT_WARNINGS,
    assert_unchanged,
    logits,
    randomize_vectors,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
)

import fmkernels
from fmkernels.api import VeraConfig, VeraModel, get_vera_model

pytestmark = [pytest.mark.filterwarnings(warning) for warning in PEFT_WARNINGS]

A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODELS = {"roberta": tiny_roberta, "gpt2": tiny_gpt2, "llama": tiny_llama}


def position(**settings):
    settings = {"r": 6, "target_modules": "all-linear", "save_projection": False, **settings}
    return VeraConfig(init="position", projection_prng_key=5, **settings)


def pair(model):
    (found,) = model._adapters.pairs()
    return found.A, found.B


def seed_file_fits(folder, targets, rank):
    """The bytes of a file: all vectors in float32, and a head with a line for each."""
    path = folder / WEIGHTS
    outputs = sum(layer.out_features for layer in targets.values())
    vectors = 4 * (rank * len(targets) + outputs)
    with open(path, "rb") as file:
        (head,) = struct.unpack("<Q", file.read(8))
    assert path.stat().st_size == vectors + 8 + head
    assert head < 300 + 2 * len(targets) * 150
    return vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_seed_and_two_vectors_a_layer(tmp_path, name, dtype):
    model = randomize_vectors(get_vera_model(MODELS[name](dtype=dtype), position()))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    layers = model._adapters.layers()
    assert len(tensors) == 2 * len(layers)
    assert {key.rpartition(".")[2] for key in tensors} == {"vera_lambda_b", "vera_lambda_d"}
    if dtype != torch.float64:
        seed_file_fits(tmp_path, layers, 6)
    again = VeraModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path)
    assert again.adapters["default"] == model.adapters["default"]
    assert all(torch.equal(*same) for same in zip(pair(again), pair(model), strict=True))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(model), logits(MODELS[name](dtype=dtype)))
    assert not any(".shared" in f".{key}" for key in again.state_dict())  # nor in this


def test_the_matrices_are_the_corner_of_any_larger_ones():
    A, B = pair(get_vera_model(tiny_roberta(), position()))
    larger = fmkernels.vera_matrices(9, 40, 50, init="position", seed=5)
    assert torch.equal(A, larger[0][:6, : A.shape[1]])
    assert torch.equal(B, larger[1][: B.shape[0], :6])


def test_a_checkpoint_of_a_realistic_size(tmp_path):
    """RoBERTa-large's, r = 256 on query and value: 61,440 numbers, but for a head of a few KB."""
    from transformers import RobertaConfig, RobertaModel

    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = RobertaConfig(vocab_size=8, intermediate_size=8, **shape)
    with torch.device("meta"):
        base = RobertaModel(config)
    base = base.to_empty(device="cpu")
    model = get_vera_model(base, position(r=256, target_modules=["query", "value"]))
    model.save_pretrained(tmp_path)
    vectors = seed_file_fits(tmp_path, model._adapters.layers(), 256)
    assert vectors == 4 * 61_440
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert total < 1.06 * vectors
    model.save_pretrained(tmp_path, save_projection=True)
    assert (tmp_path / WEIGHTS).stat().st_size > vectors + 2 * 4 * 256 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_to_the_form_of_peft_and_back(tmp_path, name, dtype):
    settings = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = randomize_vectors(get_vera_model(MODELS[name](dtype=dtype), position(**settings)))
    model.save_pretrained(tmp_path / "seed")

    small = VeraModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path / "seed")
    small.save_pretrained(tmp_path / "peft", save_projection=True)
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["peft_type"] == "VERA"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated")
        theirs = peft.PeftModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path / "peft")
    A, B = pair(model)
    assert torch.equal(theirs.base_model.vera_A["default"], A.float())
    assert torch.equal(theirs.base_model.vera_B["default"], B.float())
    exact = logits(
        peft.PeftModel.from_pretrained(MODELS[name](dtype=dtype).double(), tmp_path / "peft")
    )
    errors = [
        (found - exact).pow(2).mean().sqrt().item() for found in (logits(model), logits(theirs))
    ]
    assert errors[0] <= 2 * errors[1]
    assert errors[1] < 0.05 * exact.pow(2).mean().sqrt()

    large = VeraModel.from_pretrained(MODELS[name](dtype=dtype), tmp_path / "peft")
    assert large.adapters["default"].init == "position"
    assert torch.equal(logits(large), logits(model))
    large.save_pretrained(tmp_path / "back", save_projection=False)
    first, second = tmp_path / "seed", tmp_path / "back"
    assert (first / CONFIG).read_bytes() == (second / CONFIG).read_bytes()
    assert (first / WEIGHTS).stat().st_size == (second / WEIGHTS).stat().st_size
    heads, tensors = [], []
    for folder in (first, second):
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            heads.append(file.metadata())
        tensors.append(load_file(folder / WEIGHTS))
    assert heads[0] == heads[1]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_what_peft_has_written_again_keeps_its_matrices(tmp_path):
    """PEFT's files cannot say how they were drawn: the matrices stay in them."""
    model = randomize_vectors(get_vera_model(tiny_roberta(), position()))
    model.save_pretrained(tmp_path / "ours", save_projection=True)
    theirs = peft.PeftModel.from_pretrained(tiny_roberta(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path / "theirs", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    words = "save_projection: expected True, because the matrices of 'default' are not those"
    with pytest.raises(ValueError, match=words):
        again.save_pretrained(tmp_path / "small", save_projection=False)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("init", ["kaiming_uniform", "kaiming_normal", "position"])
@pytest.mark.parametrize("dora", [False, True], ids=["vera", "dvora"])
def test_any_seed_gives_the_same_again(tmp_path, init, dora):
    config = VeraConfig(
        r=5, target_modules=["query"], init=init, projection_prng_key=2**40 + 3,
        save_projection=False, use_dora=dora,
    )  # fmt: skip
    model = randomize_vectors(get_vera_model(tiny_roberta(), config))
    model.save_pretrained(tmp_path)
    assert not {A_KEY, B_KEY} & set(load_file(tmp_path / WEIGHTS))
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.adapters["default"] == config


def test_saved_and_not_saved_for_one_call_or_by_the_configuration(tmp_path):
    model = get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"]))
    model.save_pretrained(tmp_path / "a", save_projection=False)
    assert A_KEY not in load_file(tmp_path / "a" / WEIGHTS)
    assert model.adapters["default"].save_projection
    model.save_pretrained(tmp_path / "b")
    assert A_KEY in load_file(tmp_path / "b" / WEIGHTS)
    assert not json.loads((tmp_path / "a" / CONFIG).read_text())["save_projection"]


def test_two_files_of_one_seed_share_one_pair(tmp_path):
    model = randomize_vectors(get_vera_model(tiny_roberta(), position()))
    model.save_pretrained(tmp_path / "seed")
    model.save_pretrained(tmp_path / "peft", save_projection=True)
    both = VeraModel.from_pretrained(tiny_roberta(), tmp_path / "seed", "a")
    both.load_adapter(tmp_path / "peft", "b")
    assert len(both._adapters.pairs()) == 1
    for name in ("a", "b"):
        both.set_adapter(name)
        assert torch.equal(logits(both), logits(model))


def test_a_seed_that_is_not_that_of_the_vectors_is_refused(tmp_path):
    """As after a save that a power failure broke off between the two files."""
    get_vera_model(tiny_roberta(), position()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "projection_prng_key": 6}))
    base = tiny_roberta()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"path: expected the seed 5 of .* in .*, got 6"):
        VeraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_way_of_drawing_that_is_not_known_is_refused(tmp_path):
    get_vera_model(tiny_roberta(), VeraConfig(r=4, target_modules=["query"])).save_pretrained(
        tmp_path
    )
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        head = file.metadata()
    assert head["fmkernels.init"] == "kaiming_uniform"
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, metadata={**head, "fmkernels.init": "xavier"})
    with pytest.raises(ValueError, match=r"VeraModel\.load_adapter: path: .*safetensors: .*xavier"):
        VeraModel.from_pretrained(tiny_roberta(), tmp_path)
