"""Views of texts: word deletion, as FUNGI makes them for SimCLR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fmkernels import _checks

from .fungi_views import on_device

OP = "TextViews"
TOKENIZER = (
    "with one of transformers: "
    'TextViews(lambda texts: tokenizer(texts, padding=True, return_tensors="pt"))'
)
MOST_DELETED = 10
"""Words per view, as in the published augmentation."""


@dataclasses.dataclass(frozen=True)
class TextViews:
    """Texts as they are (``"plain"``), and V versions of each with random words left out.

    ``"patches"``, SimCLR's views, leave out max(1, ⌊deletion · words⌋) words of a text, at most 10,
    drawn anew for every view; a text of one word stays as it is.

    Args:
        tokenizer: called on a list of texts, gives a mapping of tensors, which the model is called
            on with ``model(**tokens)``.
        num_views: V.
        deletion: share of the words.

    Raises:
        TypeError: inputs that are no texts.

    Source:
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024, with 4 views and a share of 0.1.

    Example:
        With a tokenizer of transformers::

            TextViews(lambda texts: tokenizer(texts, padding=True, return_tensors="pt"))

        >>> from fmkernels.api import TextViews
        >>> views = TextViews(lambda texts: {"texts": texts}, num_views=2)
        >>> views.make("patches", ["one two three"], torch.device("cpu"), seeds=[7])
        {'texts': ['two three', 'one three']}
    """

    tokenizer: Callable[[list[str]], Any]
    num_views: int = 4
    deletion: float = 0.1

    def __post_init__(self) -> None:
        if not callable(self.tokenizer):
            raise TypeError(
                f"{OP}: tokenizer: expected a function of a list of texts, got "
                f"{self.tokenizer!r}; {TOKENIZER}"
            )
        _checks.positive_integer(OP, "num_views", self.num_views)
        _checks.non_negative(OP, "deletion", self.deletion)
        if self.deletion >= 1:
            raise ValueError(f"{OP}: deletion: expected a share below 1, got {self.deletion}")

    @property
    def counts(self) -> Mapping[str, int]:
        """Kind -> V."""
        return {"plain": 1, "patches": self.num_views}

    def make(self, kind: str, inputs: Any, device: torch.device, seeds: Sequence[int]) -> Any:
        """Tokens of B·V texts, on the device."""
        _checks.choice(OP, "kind", kind, tuple(self.counts))
        if isinstance(inputs, (str, Mapping)):
            raise TypeError(
                f"{OP}: texts: expected a list of texts, got {type(inputs).__name__}; put one text "
                "in a list, and give tokens to CustomViews()"
            )
        texts = list(inputs)
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"{OP}: texts[{position}]: expected a str, got {type(text).__name__}"
                )
        if kind == "patches":
            pairs = zip(texts, seeds, strict=True)
            texts = [view for text, seed in pairs for view in self._deleted(text, seed)]
        tokens = self.tokenizer(texts)
        values = tokens.values() if isinstance(tokens, Mapping) else [tokens]
        if any(map(_is_table, values)):
            raise TypeError(
                f"{OP}: tokenizer: expected one that gives a mapping of tensors, got "
                f"{type(tokens).__name__} of lists; {TOKENIZER}"
            )
        return on_device(tokens, device)

    def _deleted(self, text: str, seed: int) -> list[str]:
        words = text.split()
        count = min(MOST_DELETED, max(1, int(self.deletion * len(words))), len(words) - 1)
        if count < 1:
            return [text] * self.num_views
        generator = torch.Generator().manual_seed(seed)
        views = []
        for _ in range(self.num_views):
            order = torch.randperm(len(words), generator=generator, device=generator.device)
            gone = set(order[:count].tolist())
            views.append(" ".join(word for i, word in enumerate(words) if i not in gone))
        return views


def _is_table(value: Any) -> bool:
    """Lists of numbers, as tokenizers give that were not asked for tensors."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)
