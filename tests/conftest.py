"""What every test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors run faster without a pool of threads, and the goldens were made with one."""
    torch.set_num_threads(1)
