"""What is found again by how tensors look."""

import pytest
import torch

from maskd_kernels import alike


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
    kinds = [alike.described(x) for x in ([made(), made()], [made(), OTHERS[other]()], [OTHERS[other](), made()])]
    assert len(set(kinds)) == 3
    assert alike.described([made(), OTHERS[other]()]) == kinds[1]


def test_tells_where_tensors_lie_not_apart():
    memory = torch.zeros(1000)
    kinds = {alike.described([memory[start : start + 120].view(2, 3, 4, 5)]) for start in (0, 1, 7)}
    assert kinds == {alike.described([made()])}


def test_nested():
    with pytest.raises(RuntimeError):
        alike.described([torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])])


def test_finds_what_was_put_in(monkeypatch):
    monkeypatch.setattr(alike, "KEPT", 2)
    found = alike.Recollection()
    for key in "abc":
        found.put(key, key.upper())
    assert [found.get(key) for key in "abc"] == [None, "B", "C"]
    found.clear()
    assert found.get("c") is None
