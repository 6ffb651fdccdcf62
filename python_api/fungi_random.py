"""Seeds: every random thing of an extractor is a function of its seed and of what it is for."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, the same on every machine, unrelated to those of other purposes.

    Example:
        >>> from fmkernels.api.fungi_random import derived_seed
        >>> derived_seed(42, "KL", "head") == derived_seed(42, "KL", "head")
        True
        >>> derived_seed(42, "crops", 0) == derived_seed(42, "crops", 1)
        False
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
