"""Adapters written as LoRA, and DVoRA as DoRA: PEFT loads them and computes the same."""

import copy
import json

import peft
import pytest
import torch
import vera_models
import vera_reference as reference
from safetensors.torch import load_file
from torch import nn
from vera_reference import BASE, CONFIGS, Net, adapted

from fmkernels.api import VeraConfig, VeraModel
from fmkernels.testing import assert_parity

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("error::UserWarning:peft.peft_model"),
]


def loaded(base, folder):
    """PEFT's model; everything in the file has found its place."""
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    again = peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not again.unexpected_keys
    assert not [key for key in again.missing_keys if "lora_" in key]
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_peft_computes_the_same(tmp_path, dtype, conv, name):
    net = Net(conv).to(dtype)
    base = copy.deepcopy(net)
    model = adapted(net)
    x = torch.randn(3, 5, 12, dtype=dtype)
    model.to_lora(tmp_path, name)
    theirs = loaded(base, tmp_path)
    model.set_adapter(name)
    y, found = model(x).detach(), theirs(x).detach()
    if dtype == torch.float64:
        torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-11)
    else:
        exact = reference.separate(model, name, torch.float64)(x.double()).detach()
        assert_parity(found, y, exact)
        assert_parity(y, found, exact)
    with theirs.disable_adapter():
        own = reference.separate(model, BASE)(x)
        assert torch.equal(theirs(x), own)
    assert not torch.allclose(own, y, rtol=1e-2)


@pytest.mark.parametrize("name", ["all", "dvora", "mixed"])
def test_over_bfloat16(tmp_path, name):
    """PEFT multiplies in float32 there: it errs less than the formula in bfloat16, and ours no more."""
    net = Net().bfloat16()
    base = copy.deepcopy(net)
    model = adapted(net)
    x = torch.randn(8, 5, 12, dtype=torch.bfloat16)
    model.to_lora(tmp_path, name)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(v.dtype == torch.float32 for k, v in tensors.items() if "lora" in k)
    model.set_adapter(name)
    exact = reference.separate(model, name, torch.float64)(x.double()).detach()
    plain = reference.separate(model, name, torch.bfloat16)(x).detach()
    assert_parity(loaded(base, tmp_path)(x).detach(), plain, exact)
    assert_parity(model(x).detach(), plain, exact)


def test_the_file_has_the_factors_of_the_update(tmp_path):
    model = adapted(Net().double())
    model.to_lora(tmp_path, "mixed")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert fields["lora_alpha"] == fields["r"] == 16
    assert fields["use_dora"] is True
    A, B = model._adapters.state.adapters["mixed"].matrices.on(torch.device("cpu"))
    for path in ("k", "up"):
        layer = model.model.get_submodule(path)
        d, b = layer.lambda_d["mixed"], layer.lambda_b["mixed"]
        update = torch.diag(b) @ B[: len(b)] @ torch.diag(d) @ A
        key = f"base_model.model.{path}"
        product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(product, update.detach(), rtol=1e-13, atol=1e-14)
        assert torch.equal(tensors[f"{key}.lora_magnitude_vector"], layer.magnitude["mixed"])
    keys = [key for key in tensors if "lora" not in key]
    assert sorted(keys) == ["base_model.model.head.bias", "base_model.model.head.weight"]
    assert len(tensors) == 8


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_trained_biases_come_along(tmp_path, bias):
    net = Net().double()
    base = copy.deepcopy(net)
    targets = ["q", "up"]
    model = adapted(net, {"default": VeraConfig(r=4, target_modules=targets, bias=bias)})
    with torch.no_grad():
        for parameter in model.adapter_parameters("default"):
            parameter.add_(0.3)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    model.to_lora(tmp_path)
    y = model(x)
    torch.testing.assert_close(loaded(base, tmp_path)(x), y, rtol=1e-10, atol=1e-11)
    with model.disable_adapter():
        assert not torch.allclose(model(x), Net().double()(x))


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["VeRA", "DVoRA"])
def test_models_of_transformers(tmp_path, kind, use_dora):
    make = getattr(vera_models, f"tiny_{kind}")
    targets = {
        "roberta": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj", "c_fc"],
        "llama": ["q_proj", "k_proj", "down_proj"], "vit": "all-linear",
    }[kind]  # fmt: skip
    saved = ["classifier"] if kind in ("roberta", "vit") else None
    config = VeraConfig(r=5, target_modules=targets, modules_to_save=saved, use_dora=use_dora)
    base = make(dtype=torch.float64)
    expected_base = vera_models.logits(base)
    model = adapted(make(dtype=torch.float64), {"default": config})
    model.to_lora(tmp_path)
    found = vera_models.logits(loaded(base, tmp_path))
    expected = vera_models.logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(expected, expected_base, rtol=1e-2)


class Twice(nn.Module):
    """Two paths of which one is the end of another."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.aux = nn.ModuleDict({"proj": nn.Embedding(6, 6), "other": nn.Linear(6, 6)})

    def forward(self, x):
        return self.aux["other"](self.proj(x)) + self.aux["proj"](x.argmax(-1))


def test_paths_that_are_ends_of_others(tmp_path):
    """PEFT would take aux.proj for the target proj, and refuse it: it is no linear layer."""
    net = Twice().double()
    base = copy.deepcopy(net)
    model = adapted(net, {"default": VeraConfig(r=4, target_modules="proj|aux.other")})
    model.to_lora(tmp_path)
    x = torch.randn(3, 6, dtype=torch.float64)
    theirs = loaded(base, tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)


def test_merged_or_not_it_is_the_same_file_and_mistakes_are_refused(tmp_path):
    model = adapted(Net().double())
    for name in ("all", "dvora"):
        model.to_lora(tmp_path / "before", name)
        model.merge(name)
        model.to_lora(tmp_path / "merged", name)
        model.unmerge()
        files = [
            load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "merged")
        ]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    with pytest.raises(ValueError, match="to_lora: adapter_name: expected one of"):
        model.to_lora(tmp_path / "new", "nobody")
    model.set_adapter(None)
    with pytest.raises(ValueError, match="to_lora: adapter_name: expected the name of an adapter"):
        model.to_lora(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="peft_type"):
        VeraModel.from_pretrained(Net().double(), tmp_path / "before")
