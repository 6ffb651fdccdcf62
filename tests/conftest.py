"""Suite-wide: poisoned memory, one thread, reproducible Hypothesis."""

import hypothesis
import pytest
import torch

from fmkernels import testing

hypothesis.settings.register_profile(
    "fmkernels", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("fmkernels")


@pytest.fixture(autouse=True)
def poisoned():
    """Every test runs with NaN in uninitialised memory."""
    with testing.poisoned_allocation():
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small; two threads only wait for each other


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
