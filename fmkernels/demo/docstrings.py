"""Real texts with labels that are installed already: what a function is for, and its subpackage.

The docstrings of SciPy, scikit-image and scikit-learn, up to their parameters. The label is the
subpackage, which says what a text is about: integrals, distances, corners of images. Of texts that
share most of their words (half of SciPy's distributions) only one is kept, so that none of the
texts to test has a twin among those to learn from, and paths and links, which would give the
answer away, are left out. Corpora of news or reviews would have to be downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

TOPICS = (
    "scipy.cluster.hierarchy", "scipy.fft", "scipy.integrate", "scipy.interpolate",
    "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal", "scipy.sparse",
    "scipy.sparse.csgraph", "scipy.special", "scipy.stats",
    "skimage.feature", "skimage.filters", "skimage.measure", "skimage.morphology",
    "skimage.transform",
    "sklearn.cluster", "sklearn.datasets", "sklearn.linear_model", "sklearn.metrics",
    "sklearn.model_selection", "sklearn.preprocessing",
)  # fmt: skip
MOST = 60
"""Texts of a topic."""
SHARED = 0.5
"""Words that two texts have in common, of all words of both, from which one of them is left out."""

_SECTION = re.compile(r"\n\s*\w[\w ]*\n\s*-{3,}|\n\s*\.\. |\n\s*>>>")
_CALL = re.compile(r"^\w+\([^)]*\).*\n")
_GUIDE = re.compile(r"Read more in the :ref:`[^`]*`\.?")
_PATH = re.compile(r":\w+:`[^`]*`|\b(?:scipy|skimage|sklearn)(?:\.\w+)*")


class Texts(NamedTuple):
    """Texts, and the number of the topic of each."""

    texts: list[str]
    labels: list[int]


class Split(NamedTuple):
    """Two, one and two fifths of every topic."""

    train: Texts
    validation: Texts
    test: Texts


def split(seed: int = 0) -> Split:
    """The texts in three parts, which the seed draws."""
    rng = random.Random(seed)
    parts = Split(*(Texts([], []) for _ in Split._fields))
    for label, texts in enumerate(_of_topics(rng)):
        bounds = [0, round(0.4 * len(texts)), round(0.6 * len(texts)), len(texts)]
        for part, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
            part.texts.extend(texts[start:stop])
            part.labels.extend([label] * (stop - start))
    return parts


def _of_topics(rng: random.Random) -> Iterator[list[str]]:
    kept: list[set[str]] = []
    for topic in TOPICS:
        texts: list[str] = []
        candidates = sorted(set(_of_module(topic)))
        rng.shuffle(candidates)
        for text in candidates:
            words = set(re.findall(r"\w+", text.lower()))
            shared = (len(words & other) / len(words | other) for other in kept)
            if len(words) >= 4 and len(texts) < MOST and all(part < SHARED for part in shared):
                kept.append(words)
                texts.append(text)
        yield texts


def _of_module(path: str) -> Iterator[str]:
    module = importlib.import_module(path)
    for name in sorted(dir(module)):
        value = getattr(module, name)
        if not name.startswith("_") and callable(value) and isinstance(value.__doc__, str):
            yield description(value.__doc__)


def description(docstring: str) -> str:
    """What a docstring says before its first section, on one line, without paths and links."""
    text = _SECTION.split(_CALL.sub("", inspect.cleandoc(docstring)))[0]
    return " ".join(_PATH.sub("", _GUIDE.sub("", text)).split())
