"""Small models of the transformers library, made from a configuration: nothing is fetched."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 40
PEFT_WARNINGS = (
    "ignore:fan_in_fan_out is set to (False|True) but the target module is:UserWarning",
    "ignore:Specified to not save vera_A and vera_B within the state dictionary:UserWarning",
    "ignore:Specified to not load vera_A and vera_B from state dictionary. This means:UserWarning",
    "ignore:.(is_)?gradient_checkpointing.* is deprecated:FutureWarning",
)
"""What PEFT says of Conv1D and of files without A and B, where it is what a test is about."""


def tiny_roberta(seed=0, dtype=torch.float32, layers=2):
    """A classifier of sentences."""
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    return _built(RobertaForSequenceClassification, config, seed, dtype)


def tiny_gpt2(seed=0, dtype=torch.float32):
    """A language model whose linear layers are ``Conv1D``, with two layers."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=20, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return _built(GPT2LMHeadModel, config, seed, dtype)


def tiny_llama(seed=0, dtype=torch.float32, classifier=False, layers=2):
    """A language model (or a classifier) without biases, with fewer keys than queries."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=20,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    kind = LlamaForSequenceClassification if classifier else LlamaForCausalLM
    return _built(kind, config, seed, dtype)


def tiny_vit(seed=0, dtype=torch.float32):
    """A classifier of pictures, 8 by 8, with two layers."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    return _built(ViTForImageClassification, config, seed, dtype)


def _built(kind, config, seed, dtype):
    """In ``eval``; biases and norms are random too, so that none can be lost unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif parameter.ndim == 2:
                    parameter.normal_(std=0.3)
    return model


def inputs_for(model, rows=3, seed=1):
    """Keyword arguments for a call of the model, adapted or not."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(p for p in model.parameters() if p.dtype.is_floating_point)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator).to(parameter.dtype)}
    tokens = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def logits(model, rows=3, seed=1):
    """What the model answers, adapted or not, in float64."""
    return model(**inputs_for(model, rows, seed)).logits.double()


class Experts(nn.Module):
    """Numbered lists in a numbered list, as in a mixture of experts."""

    def __init__(self, depth=3, width=3):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(_expert_layer(width) for _ in range(depth))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.model.layers:
            x = torch.tanh(layer.proj(x))
            x = torch.stack([expert.up(x) for expert in layer.experts]).mean(0)
        return self.head(x)


def _expert_layer(width):
    layer = nn.Module()
    layer.proj = nn.Linear(8, 8)
    layer.experts = nn.ModuleList()
    for _ in range(width):
        expert = nn.Module()
        expert.up = nn.Linear(8, 8)
        layer.experts.append(expert)
    return layer


def randomize_vectors(model, seed=3):
    """Give all that is trained random values, of numbers that bfloat16 has too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(values.bfloat16())
    return model


def snapshot(model):
    """All that a refused call must leave: types of the modules, values, and what is trained."""
    return (
        {name: (id(module), type(module)) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: id(value) for name, value in model.named_buffers()},
    )


def assert_unchanged(model, before):
    """The model is what ``snapshot`` saw."""
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[3] == before[3]
    assert after[2].keys() == before[2].keys()
    for name, value in after[2].items():
        expected = before[2][name]
        assert value.dtype == expected.dtype, name
        assert torch.equal(value.nan_to_num(), expected.nan_to_num()), name
