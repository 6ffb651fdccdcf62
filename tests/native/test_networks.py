"""C++ and Python wire the same networks, comparator by comparator."""

import numpy as np
import pytest

from fmkernels.ops.soft_sort.networks import NETWORKS, layers

SIZES = [*range(1, 257), 257, 300, 511, 512, 513, 700, 1000, 1023, 1024]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_comparators_in_the_same_order(native, network):
    sizes = [n for n in SIZES if n <= 257 or network != "odd_even" or n in (513, 1024)]
    for n in sizes:
        lo, hi, counts = native.layers(network, n)
        expected = layers(network, n)
        assert counts == [len(layer[0]) for layer in expected], n
        for actual, side in ((lo, 0), (hi, 1)):
            wanted = [wire for layer in expected for wire in layer[side]]
            assert np.array_equal(actual, wanted), n
    layers.cache_clear()


def test_an_unknown_name_has_no_layers(native):
    assert native.layers("bubble", 8)[2] == []
