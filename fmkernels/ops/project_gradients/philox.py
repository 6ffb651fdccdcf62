"""The random bits of every projection: Philox4x32-10, a counter-based generator.

Every bit is a function of a key and a counter, so that it is the same on every device, for every
tile, batch and thread, and in every release: ``tests/ops/test_project_gradients.py`` and
``tests/native/test_philox.py`` hold golden values. The generator is that of Salmon, Moraes, Dror
and Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011.

    key      seed mod 2³², seed div 2³²
    counter  group, row, copy, stream · 2²⁴ + layer

One counter gives four words of 32 bits: bit b of word w is bit 32 w + b of 128. A sign is +1 where
its bit is 0 and −1 where it is 1. What is asked for at which counter:

    stream   what                                    group        row       copy     bit or word
    1        sign of Rademacher entry (k, i, j)      j div 128    i         k        bit j mod 128
             that of the bias entry (k, i)           i div 128    out       k        bit i mod 128
    2        sign in CountSketch block c, bucket k   c div 128    k         repeat   bit c mod 128
    3        shift of CountSketch block c            c div 4      0         repeat   word c mod 4
    4        sign of the left factor, (k, i)         i div 128    0         k        bit i mod 128
    5        sign of the right factor, (k, j)        j div 128    0         k        bit j mod 128
    6        whether vera_dropout keeps (t, j)       j div 4      t         see ¹    word j mod 4
    7        entry (k, j) of VeRA's matrix A         j div 4      k         0        word j mod 4
    8        entry (i, k) of VeRA's matrix B         k div 4      i         0        word k mod 4

A shift is (word · K) div 2³²; the right factor's bias is its entry j = in_features. ¹ Of t the row
has t mod 2³² and the copy t div 2³². Streams 6 to 8 have layer 0; what is made of their words is in
``fmkernels/ops/vera_dropout/reference.py`` and ``fmkernels/ops/vera_matrices/reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

DENSE, SKETCH, SHIFT, LEFT, RIGHT = range(1, 6)
"""The streams."""

GROUP = 128
"""Bits that one counter gives."""
LAYERS = 2**24
WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[int, int] | tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Four words for every counter: int64 tensors of values below 2³², in and out, broadcast.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [hex(int(word)) for word in philox4x32((zero, zero, zero, zero), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2⁶⁴, whatever the sign
        x0, x1, x2, x3 = (
            (second >> 32 & WORD) ^ x1 ^ k0,
            second & WORD,
            (first >> 32 & WORD) ^ x3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


def words(
    seed: int, layer: int, stream: int, groups: Tensor, rows: Tensor, copies: Tensor
) -> Tensor:
    """(…, 4): the words of every (group, row, copy), which broadcast to (…)."""
    last = torch.full_like(groups, stream * LAYERS + layer)
    return torch.stack(
        torch.broadcast_tensors(
            *philox4x32((groups, rows, copies, last), (seed & WORD, seed >> 32))
        ),
        dim=-1,
    )


def bits_to_signs(packed: Tensor, count: int) -> Tensor:
    """(…, n) words of 32 bits -> (…, count) signs ±1, float32."""
    shifts = torch.arange(32, device=packed.device)
    bits = packed.unsqueeze(-1) >> shifts & 1  # (…, n, 32)
    return 1.0 - 2.0 * bits.flatten(-2)[..., :count].float()


def signs(seed: int, layer: int, stream: int, rows: Tensor, copies: Tensor, count: int) -> Tensor:
    """(…, count): the first signs ±1 of every (row, copy), which broadcast to (…)."""
    groups = torch.arange(-(-count // GROUP), device=rows.device)
    drawn = words(seed, layer, stream, groups, rows.unsqueeze(-1), copies.unsqueeze(-1))
    return bits_to_signs(drawn.flatten(-2), count)


def sketch_signs(
    seed: int, layer: int, first: int, last: int, copy: int, buckets: Tensor
) -> Tensor:
    """(last − first, K): the signs ±1 of blocks of a CountSketch, in every bucket."""
    start = first // GROUP * GROUP
    groups = torch.arange(start // GROUP, -(-last // GROUP), device=buckets.device)
    rows = buckets.unsqueeze(-1)
    drawn = words(seed, layer, SKETCH, groups, rows, torch.full_like(rows, copy))
    return bits_to_signs(drawn.flatten(-2), last - start)[:, first - start :].mT


def shifts(seed: int, layer: int, blocks: Tensor, copy: int, dim: int) -> Tensor:
    """How far each block of a CountSketch is rotated, from 0 to ``dim`` − 1."""
    zero = torch.zeros_like(blocks)
    drawn = words(seed, layer, SHIFT, blocks // 4, zero, zero + copy)
    word = drawn.gather(-1, (blocks % 4).unsqueeze(-1)).squeeze(-1)
    return word * dim >> 32
