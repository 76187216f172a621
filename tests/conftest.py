"""What every test shares: a seed, and a few small models."""

import pytest
import torch

torch.set_num_threads(1)  # the test runner itself uses all cores


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
