"""What was found out about tensors, for those that look the same."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar

from torch import Tensor

KEPT = 1024  # images come in many sizes

Found = TypeVar("Found")
_kind = attrgetter("__class__", "shape", "dtype", "device", "requires_grad")


def described(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """All about them but where they lie and what they hold.

    Raises:
        RuntimeError: for a nested tensor, which has no shape.
    """
    return *map(_kind, tensors), *map(Tensor.stride, tensors), *map(Tensor.is_neg, tensors)


class Recollection(Generic[Found]):
    """Finds what was put in, by the same key. The oldest is forgotten."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Found] = {}
        self._changing = threading.Lock()

    def get(self, key: Hashable) -> Found | None:
        """What was put in; None where nothing was."""
        return self._found.get(key)

    def put(self, key: Hashable, found: Found) -> None:
        """Remembers it."""
        with self._changing:
            while len(self._found) >= KEPT:
                del self._found[next(iter(self._found))]
            self._found[key] = found

    def clear(self) -> None:
        """Forgets everything."""
        with self._changing:
            self._found.clear()
