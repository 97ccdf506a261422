"""Launchers that are not run twice for the same shapes, strides, dtypes and alignment.

What a launcher does, turn tensors into kernels, grids, integers and memory in between, follows from these, and takes
Python longer than a GPU needs for a small map; so does Triton, which chooses the compiled kernel by its arguments at
every launch. The first call of a ``recalled`` launcher runs it and notes what it asks of ``launch``, ``empty`` and
``unbind``; later ones repeat that with their own tensors. Where a kernel is given any other new tensor, a copy or a
view, the launcher is run at each call; likewise by Triton's interpreter, where nothing is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

KEPT = 1024  # calls of each launcher: images come in many sizes

Step = Callable[[list[Any]], Any]  # of a call, on all tensors that it has so far; may add to them


class _Notes:
    """What a launcher does, in terms of its tensors: first those that it is given, then those that it makes."""

    def __init__(self, given: list[Any]) -> None:
        self.tensors = list(given)  # kept while notes are taken, so that no other tensor gets the id of one of them
        self.places = {id(x): i for i, x in enumerate(given)}
        self.steps: list[Step] = []
        self.complete = True

    def make(self, step: Step, results: Sequence[Tensor]) -> None:
        """A step that adds these to the tensors."""
        self.steps.append(step)
        for x in results:
            self.places[id(x)] = len(self.tensors)
            self.tensors.append(x)

    def place(self, x: Tensor) -> int:
        """Which of the tensors this is."""
        self.complete &= id(x) in self.places
        return self.places.get(id(x), 0)

    def getter(self, value: Any) -> Step | None:
        """Gives such a value of another call's tensors; None where there are no tensors in it."""
        if isinstance(value, Tensor):
            return itemgetter(self.place(value))
        if not isinstance(value, tuple):
            return None
        if len(value) > 1 and all(isinstance(x, Tensor) for x in value):
            return itemgetter(*map(self.place, value))
        getters = [self.getter(x) for x in value]
        if not any(getters):
            return None
        # No tensor may be kept beyond its call.
        parts = [(get, None if get else x) for get, x in zip(getters, value, strict=True)]
        return lambda tensors: tuple([get(tensors) if get else x for get, x in parts])

    def launch(self, compiled: Any, grid: tuple[int, ...], values: list[Any]) -> None:
        """A step that launches a compiled kernel."""
        getters = [(i, get) for i, get in enumerate(map(self.getter, values)) if get is not None]
        for i, _ in getters:
            values[i] = None
        run = compiled[(*grid, 1, 1)[:3]]

        def step(tensors: list[Any]) -> None:
            arguments = values.copy()
            for i, get in getters:
                arguments[i] = get(tensors)
            run(*arguments)

        self.steps.append(step)


class _Current(threading.local):
    notes: _Notes | None = None


_current = _Current()
_recalled: list[dict[Any, Any]] = []
_changing = threading.Lock()


def forget() -> None:
    """Has every launcher run again at its next call."""
    with _changing:
        for calls in _recalled:
            calls.clear()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)``."""
    compiled = kernel[grid](*arguments, **named)
    if _current.notes is None:
        return
    if compiled is None:
        _current.notes.complete = False
    else:
        named.update(zip(kernel.arg_names, arguments, strict=False))
        _current.notes.launch(compiled, grid, [named[name] for name in kernel.arg_names])


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """New memory on the device of a tensor that the launcher was given."""
    dtype = dtype or like.dtype
    result = like.new_empty(shape, dtype=dtype)
    if _current.notes is not None:
        place = _current.notes.place(like)
        _current.notes.make(lambda tensors: tensors.append(tensors[place].new_empty(shape, dtype=dtype)), [result])
    return result


def unbind(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of a tensor that the launcher was given."""
    result = x.unbind()
    if _current.notes is not None:
        place = _current.notes.place(x)
        _current.notes.make(lambda tensors: tensors.extend(tensors[place].unbind()), result)
    return result


def _flat(arguments: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """What the arguments hold, and how many of it each sequence."""
    found: list[Any] = []
    counts = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            counts.append(len(argument))
            for part in argument:
                if isinstance(part, (list, tuple)):
                    found += part
                else:
                    found.append(part)
        else:
            found.append(argument)
    return found, counts


def _key(tensors: list[Any], counts: list[int], known: Any) -> Any:
    """All that a launcher may look at, and which tensors are the same."""
    memory: list[int] = []
    described: list[Any] = []
    for x in tensors:
        if not isinstance(x, Tensor):
            described.append((x,))
            continue
        address = x.data_ptr()
        if address:
            memory.append(address)
        # Triton compiles for memory that begins on a multiple of 16 bytes, or not.
        aligned = address & 15 == 0
        described.append(aligned if known is not None else (aligned, x.shape, x.stride(), x.dtype))
    shared = len(set(memory)) < len(memory) and tuple(map(memory.index, memory))
    return known, tensors[0].device, shared, *counts, *described


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Has launches go to the tensor's device, whichever is the current one."""
    device = x.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def recalled(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a launcher once for each description of its arguments, on the device of the first tensor.

    The launcher takes tensors, hashable settings, None, and sequences of these or of sequences of them; it returns
    None, a tensor that it was given or has made, or a tuple of such. It must not look at what tensors hold.

    The keyword ``known`` of the recalled launcher: something hashable that decides shapes, strides and dtypes of all
    tensors; only their alignment is then looked at.
    """
    calls: dict[Any, tuple[list[Step], Step | None]] = {}
    _recalled.append(calls)

    @functools.wraps(launcher)
    def call(*arguments: Any, known: Any = None) -> Any:
        if _current.notes is not None:  # part of another launcher
            return launcher(*arguments)
        tensors, counts = _flat(arguments)
        key = _key(tensors, counts, known)
        noted = calls.get(key)
        with on_device_of(tensors[0]):
            if noted is None:
                return _first(launcher, arguments, tensors, calls, key)
            steps, result = noted
            for step in steps:
                step(tensors)
            return None if result is None else result(tensors)

    return call


def _first(
    launcher: Callable[..., Any], arguments: tuple[Any, ...], tensors: list[Any], calls: dict[Any, Any], key: Any
) -> Any:
    """Runs the launcher, and notes what it does."""
    notes = _current.notes = _Notes(tensors)
    try:
        result = launcher(*arguments)
    finally:
        _current.notes = None
    get = notes.getter(result)
    if notes.complete:
        with _changing:
            while len(calls) >= KEPT:
                del calls[next(iter(calls))]  # the oldest
            calls[key] = notes.steps, get
    return result
