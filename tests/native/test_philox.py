"""Random words, signs and entries at every register size, beside the published ones and the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmkernels.ops.project_gradients import philox
from fmkernels.ops.vera_matrices import reference as vera_matrices

ONES = 0xFFFFFFFF
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counters, keys and words: the known answers that come with Random123."""


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_words_are_the_published_ones(native, register_bytes, counter, key, words):
    counters = np.tile(np.array(counter, dtype=np.uint32), (32, 1))
    found = native.philox(counters, *key, register_bytes)
    assert (found == np.array(words, dtype=np.uint32)).all()


@given(seed=st.integers(0, 2**64 - 1), start=st.integers(0, 2**32 - 1))
def test_words_are_the_references(native, seed, start):
    counters = np.arange(start, start + 128).astype(np.uint32).reshape(32, 4)
    columns = tuple(torch.from_numpy(counters.astype(np.int64)).unbind(1))
    key = seed & ONES, seed >> 32
    expected = torch.stack(philox.philox4x32(columns, key), dim=1).numpy()
    for register_bytes in (0, 16, 32, 64):
        assert (native.philox(counters, *key, register_bytes) == expected).all()


@pytest.mark.parametrize("highest", [False, True])
def test_signs_are_the_bits(native, register_bytes, highest):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(256).astype(np.float32)
    values[[3, 40]] = 0.0, np.inf
    words = rng.integers(0, 2**32, 256 if highest else 8, dtype=np.uint32)
    place = np.arange(256)
    bits = words >> 31 if highest else words[place // 32] >> (place % 32) & 1
    expected = np.where(bits == 1, -values, values)
    found = native.flip(values, words, highest, register_bytes)
    assert (found == expected).all()
    assert (np.signbit(found) == np.signbit(expected)).all()


def test_entries_of_vera_s_matrices_are_the_reference_s(native, register_bytes):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    words[:4] = 0, 0x7FFFFFFF, 0x80000000, ONES
    expected = vera_matrices.uniform(torch.from_numpy(words.astype(np.int64))).numpy()
    found = native.vera_entries(words, register_bytes)
    assert (found == expected).all()
    assert found[0] == -found[3]
    assert found[1] == -found[2] == -vera_matrices.STEP
