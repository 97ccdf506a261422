import os

os.environ.setdefault("TRITON_INTERPRET", "1" if not os.environ.get("MASKD_TEST_GPU") else "0")

import pytest
import torch

from maskd_kernels import backends, native


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


BACKENDS = ["reference", "native", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn: Triton by its interpreter where there is no GPU."""
    name = request.param
    if name == "native" and not native.available():
        pytest.skip(f"native: {native.why_unavailable()}")
    if name == "triton" and backends.why_no_triton("cpu"):
        pytest.skip(f"triton: {backends.why_no_triton('cpu')}")
    with backends.use_backend(name):
        yield name
