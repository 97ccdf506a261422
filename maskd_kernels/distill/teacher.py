"""A teacher that belongs to a module without being a part of it, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import map_tensors, unwrap
from maskd_kernels.validation import check_module

_Owner = TypeVar("_Owner", bound="FrozenTeacher")


class FrozenTeacher(nn.Module):
    """A module that owns a teacher without registering it: moved along, never trained, never saved by ``state_dict``.

    As a context manager it lets go of its models at the end.
    """

    def __init__(self, teacher: nn.Module) -> None:
        check_module(teacher, "teacher")
        super().__init__()
        object.__setattr__(self, "teacher", teacher)

    teacher: nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        nn.Module._apply(self, fn, recurse)
        self.teacher._apply(fn)
        return self

    def remove(self) -> None:
        """Lets go of its models."""
        raise NotImplementedError

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a tuple are its arguments, a dict its keywords, all else is its one argument."""
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def cast_to(model: nn.Module, inputs: Any) -> Any:
    """The inputs, floating tensors in the dtype of a model in bfloat16 or float16; prepared teachers see to it."""
    if hasattr(unwrap(model), "preparation"):
        return inputs
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype not in (torch.bfloat16, torch.float16):
        return inputs
    return map_tensors(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)
