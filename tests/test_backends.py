"""Which backend runs: settings of the process, of a block, and of other threads."""

import threading

import pytest
import torch
from helpers import DEVICE

import maskd_kernels
from maskd_kernels import backends, current_backend, use_backend
from maskd_kernels.alike import Recollection


@pytest.fixture(autouse=True)
def process_default():
    kept = list(backends._calls)
    yield
    backends._calls[:] = kept


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_plain_call_sets_the_default_of_every_thread():
    use_backend("reference")
    assert current_backend() == "reference"
    assert in_thread(current_backend) == "reference"


def test_a_block_counts_in_its_own_thread():
    with use_backend("reference"):
        assert current_backend() == "reference"
        assert in_thread(current_backend) == "auto"
        with use_backend("native"):
            assert current_backend() == "native"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_a_block_may_be_entered_twice():
    block = use_backend("reference")
    with block, block:
        assert current_backend() == "reference"
    assert current_backend() == "auto"
    with block:
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_overlapping_blocks_leave_the_default():
    """Made in one order, entered and left in another."""
    first, second = use_backend("reference"), use_backend("native")
    first.__enter__()
    assert in_thread(current_backend) == "native"  # until it is entered, a plain call

    def overlapped():
        with second:
            return current_backend()

    assert in_thread(overlapped) == "native"
    first.__exit__(None, None, None)
    assert current_backend() == in_thread(current_backend) == "auto"


def test_plain_calls_are_not_kept():
    for _ in range(100):
        use_backend("reference")
    assert len(backends._calls) < 4


def test_a_plan_is_made_for_the_backend_of_its_key(monkeypatch):
    """Another thread that sets the default in the middle of a call changes nothing of that call."""
    student, teacher, tokens = torch.randn(1, 5, 4, 7), torch.randn(1, 5, 4, 7), torch.randn(3, 5)
    student, teacher, tokens = (x.to(DEVICE) for x in (student, teacher, tokens))
    from maskd_kernels import functional
    from maskd_kernels.ops import maskd_loss as loss_op

    monkeypatch.setattr(loss_op, "_plans", Recollection())
    match = functional.match_tokens

    def interrupted(*arguments):
        use_backend("reference")
        match(*arguments)

    use_backend("auto")
    monkeypatch.setattr(functional, "match_tokens", interrupted)
    expected = maskd_kernels.maskd_loss(student, teacher, tokens)
    monkeypatch.setattr(functional, "match_tokens", match)
    ((settings, plan),) = loss_op._plans._found.items()
    assert "auto" in settings
    assert plan.backend != "reference"
    assert torch.allclose(maskd_kernels.maskd_loss(student, teacher, tokens), expected)


def of_three_images(channels=5):
    return torch.randn(3, channels, 4, 4, device=DEVICE)


CALLS = {
    "maskd_loss": lambda x: maskd_kernels.maskd_loss(x, of_three_images(), torch.randn(2, 5, device=DEVICE)),
    "receptive_masks": lambda x: maskd_kernels.receptive_masks(x, torch.randn(2, 5, device=DEVICE)),
    "scale_pixels": lambda x: maskd_kernels.scale_pixels(x, torch.ones(3, 4, 4, device=DEVICE)),
    "squared_error": lambda x: maskd_kernels.squared_error(x, of_three_images()),
    "attention_stats": lambda x: sum(y.sum() for y in maskd_kernels.attention_stats(x)),
}


@pytest.mark.parametrize("call", CALLS)
def test_batches_larger_than_a_grid_of_triton_can_be(call, monkeypatch):
    """Forced, it says so; what is chosen automatically is another backend."""
    if reason := backends.why_unavailable("triton", DEVICE, torch.float32):
        pytest.skip(reason)
    function, x = CALLS[call], of_three_images().requires_grad_()
    monkeypatch.setattr(backends, "TRITON_IMAGES", 2)
    with use_backend("triton"):
        with pytest.raises(maskd_kernels.BackendUnavailableError, match=r"batches of at most 2 images, got 3$"):
            function(x)
        monkeypatch.setattr(backends, "TRITON_IMAGES", 3)
        total = function(x).sum()
        monkeypatch.setattr(backends, "TRITON_IMAGES", 2)
        if call != "maskd_loss":  # whose backward is that of its plan
            with pytest.raises(maskd_kernels.BackendUnavailableError, match=r"batches of at most 2 images, got 3$"):
                total.backward()


@pytest.mark.skipif(backends.why_no_triton("cuda") is not None, reason="triton is not installed")
@pytest.mark.parametrize(("images", "expected"), [(1, "triton"), (65535, "triton"), (65536, "reference")])
def test_the_backend_of_a_batch(images, expected):
    with use_backend("auto"):
        assert backends.resolve(torch.device("cuda"), torch.float32, images=images) == expected
