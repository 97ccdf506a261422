"""Large results of the native kernels live in memory that is kept and reused."""

import gc
import subprocess
import sys

import pytest
import torch

from maskd_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels were not built")
LARGE = (5 << 20,)  # float32: 20 MiB


@pytest.fixture(autouse=True)
def drained():
    gc.collect()
    native.release_memory()
    yield
    gc.collect()
    native.release_memory()


def state():
    return native.module().pool_state()


def test_memory_is_reused():
    start, _ = state()
    first = native.empty(LARGE, torch.float32)
    address = first.data_ptr()
    assert address % 64 == 0
    assert state() == (start + first.nbytes, 0)
    view = first[10:20]
    del first
    assert state() == (start + 4 * LARGE[0], 0), "a view keeps the memory"
    del view
    assert state() == (start, 4 * LARGE[0])
    assert native.empty((LARGE[0] - 1000,), torch.float32).data_ptr() == address, "a little smaller fits"
    native.release_memory()
    assert state() == (start, 0)


def test_two_tensors_never_share_memory():
    tensors = [native.empty(LARGE, torch.float32).fill_(i) for i in range(4)]
    assert all(torch.equal(x, torch.full(LARGE, float(i))) for i, x in enumerate(tensors))


def test_kept_memory_is_bounded():
    """Whatever sizes follow each other, what is idle stays within twice what was in use at one time."""
    start, _ = state()
    most = 0
    for size in (8, 30, 10, 17, 64, 25, 12, 40):
        pair = [native.empty((size << 19,), torch.float16) for _ in range(2)]
        most = max(most, state()[0] - start)
        del pair
        assert state()[1] <= 2 * most


def test_sizes_that_alternate_are_all_kept():
    sizes = (4 << 20, 36 << 20, 8 << 20)
    for _ in range(3):
        for size in sizes:
            native.empty((size >> 2,), torch.float32)
    assert state()[1] == sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((), ()), ((3,), ()), ((2, 0, 4), ()), ((2, 3, 1, 5), ()), ((2, 4, 5, 6), (120, 1, 24, 4))],
)
def test_tensors_are_ordinary(shape, stride, dtype):
    x = native.empty(shape, dtype, stride)
    plain = torch.empty(shape, dtype=dtype) if not stride else torch.empty_strided(shape, stride, dtype=dtype)
    assert (x.shape, x.dtype, x.stride(), x.device) == (plain.shape, dtype, plain.stride(), plain.device)
    assert x._base is None, "a view may not be changed in place where autograd returns it"
    assert torch.equal(x.fill_(1.5).add_(1), torch.full(shape, 2.5, dtype=dtype))


def test_small_tensors_are_not_kept():
    before = state()
    small = native.empty((2, 3), torch.float64)
    assert small.data_ptr() % 64 == 0
    assert state() == before


def test_memory_that_nobody_takes_is_given_back():
    before, _ = state()
    capsule = native.module().new_tensor(list(LARGE), [1], 0)
    assert state()[0] == before + 4 * LARGE[0]
    del capsule
    assert state() == (before, 4 * LARGE[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_memory_is_freed_before_memory_is_short():
    """Under a limit of address space that leaves room only where the idle memory was."""
    program = """
import resource, torch
from maskd_kernels import native
native.empty((128 << 20,), torch.float32)  # 512 MiB, idle from here on
assert native.module().pool_state() == (0, 512 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
x = native.empty((100 << 20,), torch.float32)  # too small for the idle piece, too large beside it
assert native.module().pool_state() == (400 << 20, 0)
try:
    native.empty((1 << 30,), torch.float32)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
