"""Reaching the features inside a model: layers by name, and whatever structure they put out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and ``DistributedDataParallel``, where the layers have their own names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_layer(model: nn.Module, name: str, role: str) -> nn.Module:
    """The layer of that name, as ``named_modules`` spells it; the empty name is the model itself.

    Raises:
        ValueError: no such layer, with the names that come near; or a batch norm was folded into what it puts out.
    """
    layers = dict(unwrap(model).named_modules())
    if name in layers:
        folded = getattr(layers[name], "folded_batch_norm", None)
        if folded is not None:
            raise ValueError(
                f"{role}: {name!r} puts out other values than the original since the batch norm {folded!r} was folded "
                f"into it; tap that, or give {name!r} to prepare_teacher(taps=...)"
            )
        return layers[name]
    near = difflib.get_close_matches(name, list(layers), n=5, cutoff=0.4)
    near = near or [top for top, _ in unwrap(model).named_children()][:8]
    raise ValueError(f"{role}: no layer {name!r} in {type(unwrap(model)).__name__}; near it: {', '.join(near)}")


def as_levels(features: Any, where: str) -> tuple[list[Tensor], list[str]]:
    """The tensors in a layer's output (tensor, list, tuple or dict of them), and their names.

    Raises:
        TypeError: another structure.
    """
    if isinstance(features, Tensor):
        return [features], [""]
    if isinstance(features, Mapping):
        items = [(str(key), value) for key, value in features.items()]
    elif isinstance(features, (list, tuple)):
        items = [(str(i), value) for i, value in enumerate(features)]
    else:
        items = []
    if not items or not all(isinstance(value, Tensor) for _, value in items):
        held = ", ".join(sorted({type(value).__name__ for _, value in items}))
        got = f"{type(features).__name__}{f' of {held}' if held else ''}"
        raise TypeError(f"{where}: expected a tensor, or a list, tuple or dict of tensors, got {got}")
    return [value for _, value in items], [key for key, _ in items]


def map_levels(features: Any, function: Callable[[int, Tensor], Tensor], where: str) -> Any:
    """The same structure with each tensor replaced."""
    levels, _ = as_levels(features, where)
    replaced = [function(i, level) for i, level in enumerate(levels)]
    if isinstance(features, Tensor):
        return replaced[0]
    if isinstance(features, Mapping):
        result = type(features)(zip(features.keys(), replaced, strict=True))  # type: ignore[call-arg]
        return result
    if isinstance(features, tuple):
        return type(features)(*replaced) if hasattr(features, "_fields") else tuple(replaced)
    return replaced


_Owner = TypeVar("_Owner", bound="FrozenTeacher")


class FrozenTeacher(nn.Module):
    """A module that owns a teacher without registering it: moved along, never trained, never saved.

    As a context manager it lets go of its models at the end.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "teacher", teacher)

    teacher: nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        super()._apply(fn, recurse)
        self.teacher._apply(fn)
        return self

    def remove(self) -> None:
        """Removes the hooks that it has put into models."""
        raise NotImplementedError

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
