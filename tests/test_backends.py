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
    ((settings, ((_, plan),)),) = loss_op._plans._found.items()
    assert "auto" in settings
    assert plan.backend != "reference"
    assert torch.allclose(maskd_kernels.maskd_loss(student, teacher, tokens), expected)
