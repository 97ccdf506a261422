"""Reaching the features inside a model: layers by name, and whatever structure they put out."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

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


def layer_name(model: nn.Module, layer: str | nn.Module, role: str) -> str:
    """A layer's name, as ``named_modules`` of the unwrapped model spells it; the empty name is the model itself.

    Args:
        model: where the layer is.
        layer: its name, or the layer itself.
        role: what the model is, for messages.

    Raises:
        ValueError: no such layer, with the names that come near; or a batch norm was folded into what it puts out.
        TypeError: neither a name nor a module.
    """
    inner = unwrap(model)
    if isinstance(layer, nn.Module):
        for name, module in inner.named_modules():
            if module is layer or module is unwrap(layer):
                return layer_name(inner, name, role)
        raise ValueError(f"{role}: the {type(layer).__name__} given as a layer is not in {type(inner).__name__}")
    if not isinstance(layer, str):
        raise TypeError(f"{role}: expected a layer's name or a module, got {type(layer).__name__}")
    try:
        inner.get_submodule(layer)
    except AttributeError:
        layers = [name for name, _ in inner.named_modules()]
        near = difflib.get_close_matches(layer.removeprefix("module."), layers, n=5, cutoff=0.4)
        near = near or [top for top, _ in inner.named_children()][:8]
        raise ValueError(f"{role}: no layer {layer!r} in {type(inner).__name__}; near it: {', '.join(near)}") from None
    folded = getattr(inner.get_submodule(layer), "folded_batch_norm", None)
    if folded is not None:
        raise ValueError(
            f"{role}: {layer!r} puts out other values than the original since the batch norm {folded!r} was folded "
            f"into it; tap that, or give {layer!r} to prepare_teacher(taps=...)"
        )
    return layer


def tensors_in(structure: Any) -> list[Tensor]:
    """Every tensor in lists, tuples, mappings and dataclasses, in order."""
    if isinstance(structure, Tensor):
        return [structure]
    return [x for _, value in _items(structure) for x in tensors_in(value)]


def map_tensors(structure: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with each tensor replaced; ``function`` sees them in the order of ``tensors_in``."""
    if isinstance(structure, Tensor):
        return function(structure)
    items = [(key, map_tensors(value, function)) for key, value in _items(structure)]
    if isinstance(structure, tuple):
        values = [value for _, value in items]
        return type(structure)(*values) if hasattr(structure, "_fields") else tuple(values)
    if not items:
        return structure
    result = copy.copy(structure)
    for key, value in items:
        if isinstance(structure, (Mapping, list)):
            result[key] = value
        else:
            object.__setattr__(result, key, value)
    return result


def _items(structure: Any) -> list[tuple[Any, Any]]:
    if isinstance(structure, Mapping):  # also the outputs of transformers
        return list(structure.items())
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return list(zip(structure._fields, structure, strict=True))
    if isinstance(structure, (list, tuple)):
        return list(enumerate(structure))
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        return [(f.name, getattr(structure, f.name)) for f in dataclasses.fields(structure)]
    return []


def is_feature(value: Any) -> bool:
    """Whether this can be a level: a floating tensor ``[N, C, *spatial]``, not a loss or an index beside one."""
    return isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point()


def as_levels(output: Any, where: str) -> dict[str, Tensor]:
    """The features in a layer's output (tensor, list, tuple or mapping) by name; what is no feature does not count.

    Raises:
        TypeError: no features in it.
    """
    if is_feature(output):
        return {"": output}
    items = {} if isinstance(output, Tensor) else {str(key): value for key, value in _items(output)}
    found = {key: value for key, value in items.items() if is_feature(value)}
    if not found:
        held = ", ".join(f"{key}: {kind(value)}" for key, value in items.items())
        inner = [key for key, value in items.items() if any(map(is_feature, tensors_in(value)))]
        hint = f"; levels={inner[0]!r} reaches the features in it" if inner else ""
        raise TypeError(
            f"{where}: expected features of at least three axes, or a list, tuple or dict of them, got {kind(output)}"
            f"{f' of {held}' if held else ''}{hint}"
        )
    return found


def choose(output: Any, key: str | int, where: str) -> Any:
    """What lies under a name or, in order, a number in a layer's output.

    Raises:
        ValueError: nothing is there, with what is.
    """
    items = [] if isinstance(output, Tensor) else _items(output)
    found = [value for name, value in items if name == key and type(name) is type(key)]
    if not found and isinstance(key, int) and -len(items) <= key < len(items):
        found = [items[key][1]]
    if not found or found[0] is None:
        held = ", ".join(str(name) for name, value in items if value is not None)
        raise ValueError(f"{where}: no level {key!r} in {kind(output)}{f' of {held}' if held else ''}")
    return found[0]


def kind(value: Any) -> str:
    """What something is, for messages: a tensor by its shape."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
