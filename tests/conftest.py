"""What every test runs under."""

import pytest
import torch

import ldm.models.base  # noqa: F401 -- before any test imports Lightning: models are light here, as when they are run


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors run faster without a pool of threads, and the goldens were made with one."""
    torch.set_num_threads(1)
