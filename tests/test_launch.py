"""Recalled launchers, with kernels that only note what they are given."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch

from maskd_kernels import alike
from maskd_kernels.triton import launch


def addresses(value):
    """What a kernel gets of its arguments: of tensors, where they begin."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return type(value)(map(addresses, value)) if isinstance(value, (list, tuple)) else value


class Kernel:
    """As much of a Triton kernel as launchers see; ``launched`` has what its compiled self was given."""

    arg_names = ("x", "maps", "partials", "scratch", "out", "size", "BLOCK")

    def __init__(self, interpreted=False):
        self.compiled, self.launched = None if interpreted else Compiled(self), []

    def __getitem__(self, grid):
        def first(*arguments, num_warps, **named):
            values = dict(zip(self.arg_names, arguments, strict=False)) | named
            self.launched.append((grid, addresses([values[name] for name in self.arg_names])))
            return self.compiled

        return first


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, list(arguments)))


class Recorded:
    """A launcher of a kernel, and how often it ran."""

    def __init__(self, interpreted=False, shift=lambda x: x):
        self.kernel, self.runs, self.shift = Kernel(interpreted), 0, shift
        self.call = launch.recalled(self.launcher)

    def launcher(self, maps, out, scale):
        self.runs += 1
        size = maps[0].shape[0]
        partials = launch.empty(maps[0], 2, size, dtype=torch.float32)
        scratch, rows = launch.empty(maps[0], 2, 129), launch.unbind(out)
        launch.launch(
            self.kernel,
            (size, 2),
            self.shift(maps[-1]),
            (tuple(maps), (rows[1], 7), "same"),
            partials,
            (launch.unbind(scratch)[1], launch.empty(partials, 1, dtype=torch.int64)),
            out=rows[0],
            size=size * scale,
            BLOCK=16,
            num_warps=4,
        )
        return partials, out


def tensors(size=3, count=2):
    return [torch.zeros(size) for _ in range(count)], torch.zeros(2, size)


def test_repeats_with_the_tensors_of_the_call():
    recorded = Recorded()
    results = []
    for _ in range(3):
        maps, out = tensors()
        partials, returned = recorded.call(maps, out, 5)
        assert returned is out
        grid, (x, nested, given, _, row, size, block) = recorded.kernel.launched[-1]
        assert grid == ((3, 2) if not results else (3, 2, 1))
        assert x == maps[1].data_ptr()
        assert nested == (addresses(tuple(maps)), (out[1].data_ptr(), 7), "same")
        assert given == partials.data_ptr()
        assert (partials.shape, partials.stride(), partials.dtype) == ((2, 3), (3, 1), torch.float32)
        assert row == out[0].data_ptr()
        assert (size, block) == (15, 16)
        results.append(partials)
    assert recorded.runs == 1
    assert len({x.data_ptr() for x in results}) == 3, "memory of its own for each call"


def test_memory_that_is_not_returned_is_one_piece():
    recorded = Recorded()
    for _ in range(2):
        recorded.call(*tensors(), 5)
    row, other = recorded.kernel.launched[-1][1][3]
    assert other - row == 3 * launch.ALIGNMENT - 129 * 4  # of two rows of 129 float32 the second, and what follows
    assert other % launch.ALIGNMENT == (row - 129 * 4) % launch.ALIGNMENT


@pytest.mark.parametrize("known", [False, True])
def test_runs_anew_where_alignment_or_settings_differ(known):
    recorded = Recorded()
    (a, b), out = tensors(size=4)
    shifted = torch.zeros(5)[1:]
    assert shifted.data_ptr() % 16

    def runs(maps, out, scale):
        before = recorded.runs
        keywords = {"tensors": [*maps, out], "known": (len(maps), scale)} if known else {}
        recorded.call(maps, out, scale, **keywords)
        return recorded.runs > before

    assert runs([a, b], out, 5)
    assert not runs([b, a], out, 5)
    runs([a, a], out, 5)
    assert not runs([b, b], out, 5)
    assert runs([a, shifted], out, 5)
    assert runs([a, b], out, 6)
    assert runs([a], out, 5)
    assert recorded.kernel.launched[-1][1][0] == a.data_ptr()


def test_what_is_noted_of_one_tensor_twice_is_not_recalled_for_two():
    recorded = Recorded()
    (a, b), out = tensors()
    for maps, runs in [([a, a], 1), ([b, b], 1), ([a, b], 2), ([b, a], 2), ([b, b], 2)]:
        recorded.call(maps, out, 5)
        assert recorded.runs == runs
        x, nested, *_ = recorded.kernel.launched[-1][1]
        assert (x, nested[0]) == (maps[1].data_ptr(), addresses(tuple(maps)))


def test_runs_anew_where_shapes_strides_or_dtypes_differ():
    recorded = Recorded()
    (a, b), out = tensors(size=4)
    others = [torch.zeros(5), torch.zeros(8)[::2], torch.zeros(4, dtype=torch.float16)]
    for i, other in enumerate([b, *others, *others]):
        recorded.call([a, other], out, 5)
        assert recorded.runs == min(i, len(others)) + 1
    launch.forget()
    recorded.call([a, b], out, 5)
    assert recorded.runs == len(others) + 2


def test_tensors_without_strides_are_refused():
    """As by PyTorch, whose guards, by which later calls are recalled, would end the process."""
    recorded = Recorded()
    maps, out = tensors()
    recorded.call(maps, out, 5)
    with pytest.raises(RuntimeError):
        recorded.call([maps[0], maps[1].to_sparse()], out, 5)
    assert recorded.runs == 1


def test_what_is_known_is_not_looked_at():
    recorded = Recorded()
    for size, known, runs in [(3, "this", 1), (3, "this", 1), (4, "that", 2), (4, "this", 2)]:
        maps, out = tensors(size)
        recorded.call(maps, out, 5, tensors=[*maps, out], known=known)
        assert recorded.runs == runs


@pytest.mark.parametrize("options", [{"interpreted": True}, {"shift": lambda x: x[1:]}], ids=["interpreted", "view"])
def test_never_recalls_what_it_cannot_repeat(options):
    recorded = Recorded(**options)
    for i in range(3):
        maps, out = tensors()
        recorded.call(maps, out, 5)
        assert recorded.runs == i + 1
        assert recorded.kernel.launched[-1][1][0] == recorded.shift(maps[1]).data_ptr()


def test_keeps_no_tensor():
    recorded = Recorded()
    (a, b), out = tensors()
    partials, _ = recorded.call([a, b], out, 5)
    recorded.call(*tensors(), 5)
    recorded.kernel.launched.clear()
    references = [weakref.ref(x) for x in (a, b, out, partials)]
    del a, b, out, partials, _
    assert [r() for r in references] == [None] * 4


def test_keeps_the_latest_calls(monkeypatch):
    monkeypatch.setattr(alike, "KEPT", 2)
    recorded = Recorded()
    for size, runs in [(3, 1), (4, 2), (5, 3), (4, 3), (5, 3), (3, 4)]:
        recorded.call(*tensors(size), 5)
        assert recorded.runs == runs


def test_knows_the_device_of_a_tensor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    places = [(False, -1), (True, 1), (True, 0)]
    tensors = [SimpleNamespace(is_cuda=cuda, get_device=lambda index=index: index) for cuda, index in places]
    assert [launch.is_elsewhere(x) for x in tensors] == [False, False, True]


def test_goes_to_the_device_of_the_tensor(monkeypatch):
    """Each time; and it still looks at the tensors then."""
    recorded, inside = Recorded(), []

    @contextlib.contextmanager
    def on(device):
        inside.append(device)
        yield
        inside.append("out")

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(launch, "is_elsewhere", lambda x: len(inside) % 2 == 0)
    for i, (size, runs) in enumerate([(3, 1), (3, 1), (4, 2)]):
        recorded.call(*tensors(size), 5)
        assert inside == [torch.device("cpu"), "out"] * (i + 1)
        assert recorded.runs == runs


def test_a_launcher_within_another_is_part_of_it():
    inner = Recorded()

    @launch.recalled
    def outer(maps, out):
        return inner.call(maps, out, 5)

    for i in range(2):
        maps, out = tensors()
        assert outer(maps, out)[1] is out
        assert inner.kernel.launched[i][1][0] == maps[1].data_ptr()
    assert inner.runs == 1
