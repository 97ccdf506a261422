"""What is found again by how tensors look: by PyTorch's guards, and where there are none."""

import weakref

import pytest
import torch

from maskd_kernels import alike


@pytest.fixture(params=["guards", "no guards"], autouse=True)
def guards(request, monkeypatch):
    if request.param == "no guards":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")


def made(**options):
    return torch.zeros(2, 3, 4, 5, **options)


OTHERS = {
    "shape": lambda: torch.zeros(2, 3, 5, 4),
    "axes": lambda: torch.zeros(2, 3, 20),
    "strides": lambda: made().to(memory_format=torch.channels_last),
    "dtype": lambda: made(dtype=torch.bfloat16),
    "device": lambda: made(device="meta"),
    "trained": lambda: made(requires_grad=True),
    "type": lambda: torch.nn.Parameter(made(), requires_grad=False),
    "negated": lambda: made()._neg_view(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_tells_tensors_apart(other):
    same = alike.look([made(), made()])
    assert same(made(), made())
    for x, y in [(made(), OTHERS[other]()), (OTHERS[other](), made())]:
        assert not same(x, y)
        assert alike.look([x, y])(x, y)
    assert alike.look([OTHERS[other]()] * 2)(OTHERS[other](), OTHERS[other]())


def test_tells_where_tensors_lie_not_apart():
    same, memory = alike.look([made()]), torch.zeros(1000)
    for start in (0, 1, 7):
        assert same(memory[start : start + 120].view(2, 3, 4, 5))


def test_one_tensor_twice():
    x = made()
    same = alike.look([x, x])
    assert same(x, x)
    assert same(made(), made())
    assert not same(made(), made(dtype=torch.float16))


def test_nothing_to_look_at():
    assert alike.look([])()


def test_finds_what_was_put_in(monkeypatch):
    monkeypatch.setattr(alike, "KEPT", 2)
    monkeypatch.setattr(alike, "ALIKE", 2)
    found = alike.Recollection()
    for key, n in [("a", 1), ("a", 2), ("b", 1)]:
        found.put(key, [torch.zeros(n)], (key, n))
    for key, n in [("a", 1), ("a", 2), ("b", 1)]:
        assert found.get(key, [torch.ones(n)]) == (key, n)
    assert found.get("b", [torch.zeros(2)]) is None
    found.put("a", [torch.zeros(3)], ("a", 3))
    assert [found.get("a", [torch.zeros(n)]) for n in (1, 2, 3)] == [None, ("a", 2), ("a", 3)]
    found.put("c", [torch.zeros(1)], ("c", 1))
    assert [found.get(key, [torch.zeros(1)]) for key in "bc"] == [None, ("c", 1)]
    found.clear()
    assert found.get("c", [torch.zeros(1)]) is None


def test_keeps_no_tensor():
    found, x = alike.Recollection(), made()
    found.put("key", [x], "found")
    kept = weakref.ref(x)
    del x
    assert kept() is None
