"""Launchers that are not run twice for the same shapes, strides, dtypes, devices and alignment.

What a launcher does, turn tensors into kernels, grids, integers and memory in between, follows from these, and takes
Python longer than a GPU needs for a small map; so does Triton, which chooses the compiled kernel by its arguments at
every launch. The first call of a ``recalled`` launcher runs it and notes what it asks of ``launch``, ``made``,
``empty`` and ``unbind``. Later ones repeat that with addresses, which compiled kernels take for tensors; memory that is
not returned is then one piece. Where a kernel is given any other new tensor, a copy or a view, the launcher is run at
each call; likewise by Triton's interpreter, where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial, reduce, wraps
from itertools import accumulate
from operator import itemgetter, or_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from maskd_kernels.alike import Recollection, described

ALIGNMENT = 512  # bytes, of each piece of memory: PyTorch's on a GPU
_USUAL = {Tensor, torch.nn.Parameter}

Nested = TypeVar("Nested", bound=Sequence[Any])
Getter = Callable[[Sequence[Any]], Any]  # takes what it wants from a list with an entry for each tensor


class _Call(NamedTuple):
    """What a launcher does, in terms of a list of tensors: first those that it is given, then those that it makes."""

    makes: Sequence[Callable[[], Tensor]]  # memory for what is not returned comes last
    parts: list[tuple[int, int]]  # further addresses: so many bytes from an earlier one
    launches: list[tuple[Callable[..., Any], list[Any], list[tuple[int, Getter]]]]  # kernel, values, addresses
    result: Getter

    def repeat(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        """Does the same with these tensors. Adds to both lists."""
        new = [make() for make in self.makes]
        tensors += new
        addresses += map(Tensor.data_ptr, new)
        for place, offset in self.parts:
            addresses.append(addresses[place] + offset)
        for run, values, getters in self.launches:
            arguments = values.copy()
            for i, get in getters:
                arguments[i] = get(addresses)
            run(*arguments)
        return self.result(tensors)


class _Notes(NamedTuple):
    """What a launcher does. Holds all tensors while notes are taken, so that none gets the id of another."""

    made: list[Tensor]
    rows: list[tuple[Tensor, Tensor]]  # each with the tensor that it is a row of
    launches: list[tuple[Any, tuple[int, ...], list[Any]]]  # compiled kernel, grid, arguments

    def call(self, given: Sequence[Tensor], result: Any) -> _Call | None:
        """What is to be repeated; None where it cannot be."""
        returned = set(map(id, _flatten([result], [], [])))
        kept = [x for x in self.made if id(x) in returned]
        makes = [partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in kept]
        places = {id(x): i for i, x in enumerate((*given, *kept))}
        if not returned <= places.keys():
            return None
        get = _getter(result, places) or (lambda _: result)
        scratch = [x for x in self.made if id(x) not in returned]
        starts = [0, *accumulate(-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in scratch)]
        if scratch:
            size, device = starts[-1] // torch.float32.itemsize, scratch[0].device
            makes.append(partial(torch.empty_strided, (size,), (1,), dtype=torch.float32, device=device))
        first = len(given) + len(makes)
        parts = [(first - 1, start) for start in starts[:-1]]
        places |= {id(x): first + i for i, x in enumerate(scratch)}
        for row, x in self.rows:
            if id(x) in places:
                places[id(row)] = first + len(parts)
                parts.append((places[id(x)], row.data_ptr() - x.data_ptr()))
        launches = []
        for compiled, grid, values in self.launches:
            if compiled is None or any(id(x) not in places for x in _flatten(values, [], [])):
                return None
            getters = [_getter(value, places) for value in values]
            # No tensor may be kept beyond its call.
            constants = [None if g else value for g, value in zip(getters, values, strict=True)]
            launches.append((compiled[(*grid, 1, 1)[:3]], constants, [(i, g) for i, g in enumerate(getters) if g]))
        return _Call(makes, parts, launches, get)


def _getter(value: Any, places: dict[int, int]) -> Getter | None:
    """Gives such a value of another call's tensors; None where there are no tensors in it."""
    if isinstance(value, Tensor):
        return itemgetter(places[id(value)])
    if not isinstance(value, (list, tuple)):
        return None
    if len(value) > 1 and all(isinstance(x, Tensor) for x in value):
        return itemgetter(*[places[id(x)] for x in value])
    getters = [_getter(x, places) for x in value]
    if not any(getters):
        return None
    parts = [(get, None if get else x) for get, x in zip(getters, value, strict=True)]
    return lambda entries: tuple([get(entries) if get else x for get, x in parts])


_notes: ContextVar[_Notes | None] = ContextVar("notes", default=None)  # that are being taken
_recalled: list[Recollection[_Call]] = []


def forget() -> None:
    """Has every launcher run again at its next call."""
    for calls in _recalled:
        calls.clear()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)``."""
    compiled = kernel[grid](*arguments, **named)
    if (notes := _notes.get()) is not None:
        named.update(zip(kernel.arg_names, arguments, strict=False))
        notes.launches.append((compiled, grid, [named[name] for name in kernel.arg_names]))


def made(memory: Nested) -> Nested:
    """The launcher's own new tensors, nothing in them: they are made anew in each call."""
    if (notes := _notes.get()) is not None:
        _flatten(memory, notes.made, [])
    return memory


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor on the device of another one."""
    return made([like.new_empty(shape, dtype=dtype or like.dtype)])[0]


def unbind(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of a tensor that the launcher was given or has made."""
    rows = x.unbind()
    if (notes := _notes.get()) is not None:
        notes.rows.extend((row, x) for row in rows)
    return rows


def _flatten(nested: Sequence[Any], tensors: list[Tensor], rest: list[Any]) -> list[Tensor]:
    """The tensors, added to the list; to ``rest`` all else, with how many tensors came before."""
    for x in nested:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, (list, tuple)):
            rest.append((len(tensors), "sequence", len(x)))
            if _USUAL.issuperset(map(type, x)):
                tensors += x
            else:
                _flatten(x, tensors, rest)
        else:
            rest.append((len(tensors), x))
    return tensors


def is_elsewhere(x: Tensor) -> bool:
    """Whether the tensor is on another device than the current one, where launches go."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def recalled(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a launcher once for each description of its arguments, on the device of the first tensor.

    The launcher takes tensors, hashable settings, None, and nested sequences of these; it returns None, a tensor that
    it was given or has made, or a tuple of such. It must not look at what tensors hold, nor which are the same.

    Who knows a call already gives the recalled launcher the keywords ``tensors``, all of them in order, and ``known``,
    something hashable that decides everything but their alignment.
    """
    calls: Recollection[_Call] = Recollection()
    _recalled.append(calls)

    @wraps(launcher)
    def call(*arguments: Any, tensors: Sequence[Tensor] = (), known: Any = None) -> Any:
        if _notes.get() is not None:  # part of another launcher
            return launcher(*arguments)
        if known is None:
            rest: list[Any] = []
            tensors = _flatten(arguments, [], rest)
            known = *described(tensors), *rest
        if is_elsewhere(tensors[0]):
            with torch.cuda.device(tensors[0].device):
                return call(*arguments, tensors=tensors, known=known)
        addresses = [*map(Tensor.data_ptr, tensors)]  # RuntimeError where there is no memory to stride over
        # Triton compiles for memory that begins on a multiple of 16 bytes, or not.
        odd = reduce(or_, addresses) & 15 and tuple([address & 15 > 0 for address in addresses])
        key: Any = known, odd
        noted = calls.get(key)
        if noted is None:
            # Notes tell tensors apart by their ids: those of a call with one twice are for such calls alone.
            ids = [*map(id, tensors)]
            if len(set(ids)) < len(ids):
                key = key, tuple(map(ids.index, ids))
                noted = calls.get(key)
        if noted is not None:
            return noted.repeat([*tensors], addresses)
        notes = _Notes([], [], [])
        before = _notes.set(notes)
        try:
            result = launcher(*arguments)
        finally:
            _notes.reset(before)
        noted = notes.call(tensors, result)
        if noted is not None:
            calls.put(key, noted)
        return result

    return call
