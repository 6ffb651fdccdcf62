"""As many trained parameters as the tables of the papers print, of models that are never filled."""

import time

import peft
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)
from vera_models import PEFT_WARNINGS

from fmkernels.api import VeraConfig, get_vera_model

pytestmark = [pytest.mark.filterwarnings(warning) for warning in PEFT_WARNINGS]

MODELS = {
    "RoBERTa-base": lambda: RobertaModel(RobertaConfig()),
    "RoBERTa-large": lambda: RobertaModel(
        RobertaConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        )
    ),
    "GPT-2 medium": lambda: GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "ViT-B": lambda: ViTModel(ViTConfig()),
    "LLaMA-7B": lambda: LlamaForCausalLM(LlamaConfig()),
}


def on_meta(name):
    with torch.device("meta"):
        return MODELS[name]()


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "settings", "count", "printed"),
    [
        # VeRA's tables: GLUE, E2E, images, instructions
        ("RoBERTa-base", {"r": 1024, "target_modules": ["query", "value"]}, 43_008, "0.043 M"),
        ("RoBERTa-large", {"r": 256, "target_modules": ["query", "value"]}, 61_440, "0.061 M"),
        ("GPT-2 medium", {"r": 1024, "target_modules": ["c_attn"]}, 98_304, "0.098 M"),
        # what used to be called query and value
        ("ViT-B", {"r": 256, "target_modules": ["q_proj", "v_proj"]}, 24_576, "24.6 K"),
        ("LLaMA-7B", {"r": 1024, "target_modules": "all-linear"}, 1_589_248, "1.6 M"),
    ],
)
def test_counts_of_the_papers(name, settings, count, printed):
    base = on_meta(name)
    start = time.perf_counter()
    model = get_vera_model(base, VeraConfig(**settings))
    assert time.perf_counter() - start < 5  # nothing is drawn or allocated
    assert trained(model) == count
    unit = {"M": 1e6, "K": 1e3}[printed[-1]]
    digits = len(printed.split()[0].partition(".")[2])
    assert f"{count / unit:.{digits}f} {printed[-1]}" == printed
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert trained(model) == sum(p.numel() for p in model.adapter_parameters("default"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RoBERTa-base", {"r": 1024, "target_modules": ["query", "value"]}),
        ("GPT-2 medium", {"r": 1024, "target_modules": ["c_attn"], "bias": "vera_only"}),
    ],
)
def test_peft_counts_the_same(name, settings):
    """Of its own model, which it fills: the others of the table would take too long."""
    theirs = peft.get_peft_model(on_meta(name), peft.VeraConfig(**settings))
    assert trained(theirs) == trained(get_vera_model(on_meta(name), VeraConfig(**settings)))


def test_dvora_trains_a_share_of_llama_that_its_paper_prints():
    """0.04 %, of VeRA 0.02 %: r = 1024, all linear layers but the one that gives words."""
    config = VeraConfig(r=1024, target_modules="all-linear", use_dora=True)
    base = on_meta("LLaMA-7B")
    total = sum(p.numel() for p in base.parameters())
    assert total == 6_738_415_616
    dvora = get_vera_model(base, config)
    assert trained(dvora) == 2_949_120  # with a magnitude for each of 1,359,872 outputs
    assert f"{100 * trained(dvora) / total:.2f}" == "0.04"
    vera = get_vera_model(on_meta("LLaMA-7B"), VeraConfig(r=1024, target_modules="all-linear"))
    assert f"{100 * trained(vera) / total:.2f}" == "0.02"


def test_what_is_printed(capsys):
    model = get_vera_model(
        on_meta("RoBERTa-base"), VeraConfig(r=1024, target_modules=["query", "value"])
    )
    model.print_trainable_parameters()
    total = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable parameters: 43,008 of {total:,} ({4_300_800 / total:.3f} %)\n"
    )


@pytest.mark.parametrize("rank", [1, 4, 64, 256, 1024])
def test_counts_grow_with_rank_by_one_vector_a_layer(rank):
    model = get_vera_model(on_meta("RoBERTa-large"), VeraConfig(r=rank, target_modules=["query"]))
    assert trained(model) == 24 * (rank + 1024)
    biases = VeraConfig(r=rank, target_modules=["query"], bias="vera_only")
    assert trained(get_vera_model(on_meta("RoBERTa-large"), biases)) == 24 * (rank + 2048)
