import os

os.environ.setdefault("TRITON_INTERPRET", "1" if not os.environ.get("MASKD_TEST_GPU") else "0")

import pytest
import torch
from helpers import DEVICE

from maskd_kernels import backends


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that a kernel forgets to write is NaN, not the zeros that fresh pages happen to hold."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request):
    """Each backend in turn: Triton by its interpreter where there is no GPU."""
    reason = backends.why_unavailable(request.param, DEVICE, torch.float32)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with backends.use_backend(request.param):
        yield request.param
