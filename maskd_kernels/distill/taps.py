"""Where features are taken from, and which loss compares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import as_levels, choose, kind, layer_name, tensors_in
from maskd_kernels.validation import check_number

LayerName = str | nn.Module
Key = str | int
Size = tuple[int, int]


class Features(NamedTuple):
    """The levels of one side of a tap, ``[N, C, *spatial]``."""

    levels: list[Tensor]
    keys: list[str] | None  # their names, where they come from a mapping and nobody chose among them
    single: bool  # a tensor, not a list of one level


@dataclass(frozen=True)
class Layer:
    """Where a model's features come from, and how they become ``[N, C, *spatial]``.

    Args:
        name: the layer's name, as ``named_modules`` spells it (``"backbone.fpn"``; without the ``module.`` of a
            ``DistributedDataParallel``), or the layer itself; or a list of them, one pyramid
            (``["model.16", "model.19", "model.22"]``). The empty name is the model's own output.
        levels: names or indices of what is taken from an output that is a list, tuple, dict or ``ModelOutput``:
            ``"out"``, ``"hidden_states"``, ``["0", "1", "2"]``, ``[-1]``. One name of a tensor gives the tensor.
            None: every feature; what is none (a loss, None, integers, fewer than three axes) does not count.
        select: called with the layer's output, instead of ``levels``: a function that returns features, a tensor, list
            or dict. With several layers it is called once for each, as ``levels`` is applied to each.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``: token sequences ``[N, L, C]``, or ``[N, H, W, C]``.
        prefix_tokens: tokens at a sequence's start that are no patches (class token, registers) and are left out.
        grid: (H, W) to which token sequences are reshaped, or one such pair per level; ``"input"`` finds it from the
            size of the images that the model is called with.

    A layer that runs several times in one forward (a head shared by the levels) counts as a list of levels.

    Raises:
        ValueError: numbers out of range, ``levels`` beside ``select``, a level named twice, no name.
        TypeError: something else than these.
    """

    name: LayerName | Sequence[LayerName]
    levels: Key | Sequence[Key] | None = None
    select: Callable[[Any], Any] | None = None
    channel_dim: int = 1
    prefix_tokens: int = 0
    grid: Size | Sequence[Size] | str | None = None

    def __post_init__(self) -> None:
        names = self.name if isinstance(self.name, (list, tuple)) else [self.name]
        if not names:
            raise ValueError("layer: expected at least one name, got an empty list")
        for name in names:
            if not isinstance(name, (str, nn.Module)):
                raise TypeError(f"layer: expected a layer's name, a module or a list of them, got {kind(name)}")
        if self.levels is not None and self.select is not None:
            raise ValueError("levels, select: expected one of them, got both")
        if self.select is not None and not callable(self.select):
            raise TypeError(f"select: expected a function of the layer's output, got {kind(self.select)}")
        keys = [] if self.levels is None else _as_list(self.levels)
        if self.levels is not None and not (keys and all(type(key) in (str, int) for key in keys)):
            raise TypeError(f"levels: expected a name, an index or a list of them, got {self.levels!r}")
        if len(set(keys)) < len(keys):
            raise ValueError(f"levels: expected each level once, got {self.levels!r}")
        if self.channel_dim not in (1, -1):
            raise ValueError(f"channel_dim: expected 1 or -1, got {self.channel_dim!r}")
        if type(self.prefix_tokens) is not int or self.prefix_tokens < 0:
            raise ValueError(f"prefix_tokens: expected a number of tokens from 0 on, got {self.prefix_tokens!r}")
        if not (self.grid is None or self.grid == "input" or _sizes(self.grid)):
            raise ValueError(f"grid: expected (H, W), one such pair per level, 'input' or None, got {self.grid!r}")

    def resolved(self, model: nn.Module, role: str) -> Layer:
        """The same with names alone, each of which is in the model."""
        if isinstance(self.name, (list, tuple)):
            return dataclasses.replace(self, name=[layer_name(model, name, role) for name in self.name])
        return dataclasses.replace(self, name=layer_name(model, self.name, role))  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        """The layers' names, once resolved."""
        return list(self.name) if isinstance(self.name, (list, tuple)) else [self.name]  # type: ignore[list-item]

    def pick(self, recorded: Mapping[str, list[Any]], role: str) -> dict[str, Any] | Tensor:
        """What this layer contributes of what its names have put out: a tensor as it is, or all levels by name.

        Raises:
            RuntimeError: a layer did not run.
            ValueError: a level that is not there.
            TypeError: an output without features.
        """
        several = not isinstance(self.name, str)
        found: dict[str, Any] = {}
        for name in self.names:
            where = f"{role} {name!r}"
            runs = recorded.get(name)
            if not runs:
                raise RuntimeError(
                    f"{role}: the layer {name!r} did not run in this forward (or a compiled model had run before the "
                    "Distiller was made: make it first)"
                )
            picked = self._pick_one(runs[0] if len(runs) == 1 else list(runs), where)
            if isinstance(picked, Tensor) and not several:
                return picked
            levels = {"": picked} if isinstance(picked, Tensor) else picked
            found.update({f"{name} {key}".strip() if several else key: level for key, level in levels.items()})
        return found

    def _pick_one(self, output: Any, where: str) -> Tensor | dict[str, Tensor]:
        if self.select is not None:
            output, where = self.select(output), f"{where}, after select"
        if isinstance(self.levels, (str, int)):
            output = choose(output, self.levels, where)
        elif self.levels is not None:
            chosen = {key: as_levels(choose(output, key, where), f"{where}, level {key!r}") for key in self.levels}
            return {f"{key} {name}".strip(): x for key, levels in chosen.items() for name, x in levels.items()}
        levels = as_levels(output, where)
        return levels[""] if isinstance(output, Tensor) else levels

    def features(self, recorded: Mapping[str, list[Any]], size: Size | None, role: str) -> Features:
        """The levels, ``[N, C, *spatial]``, of what the layers have put out in a call with images of a size."""
        picked = self.pick(recorded, role)
        single = isinstance(picked, Tensor)
        by_name = {"": picked} if isinstance(picked, Tensor) else picked
        chosen = single or self.levels is not None or not isinstance(self.name, str)
        (first,) = recorded[self.names[0]][:1]
        keys = list(by_name) if not chosen and isinstance(first, Mapping) else None
        where = f"{role} {', '.join(self.names)!r}"
        levels = [self.to_map(x, i, len(by_name), size, where) for i, x in enumerate(by_name.values())]
        return Features(levels, keys, single)

    def to_map(self, x: Tensor, level: int, count: int, size: Size | None, where: str) -> Tensor:
        """One level, as the layer puts it out, as ``[N, C, *spatial]``: prefix tokens dropped, on its grid."""
        if self.channel_dim == -1:
            x = x.movedim(-1, 1)
        if self.prefix_tokens or self.grid is not None:
            if x.dim() != 3 or x.shape[2] <= self.prefix_tokens:
                option = f"prefix_tokens={self.prefix_tokens}" if self.prefix_tokens else f"grid={self.grid!r}"
                raise ValueError(f"{where}: {option} needs token sequences of more tokens, got {list(x.shape)}")
            x = x[:, :, self.prefix_tokens :]
        if self.grid is None:
            return x
        length = x.shape[2]
        if self.grid == "input":
            height, width = grid_of(length, size, where)
        else:
            sizes = _sizes(self.grid)
            if len(sizes) not in (1, count):
                raise ValueError(f"{where}: expected one grid per level, {count}, got {len(sizes)}")
            height, width = sizes[level if len(sizes) > 1 else 0]
        if height * width != length:
            raise ValueError(
                f"{where}: grid ({height}, {width}) needs {height * width} tokens, got {length} "
                f"(prefix_tokens={self.prefix_tokens})"
            )
        image: Tensor = x.unflatten(2, (height, width))
        return image

    def from_map(self, masked: Tensor, x: Tensor) -> Tensor:
        """``to_map`` undone: the level as the layer put it out, with the map's values in place of its own."""
        if self.grid is not None:
            masked = masked.flatten(2)
        if self.channel_dim == -1:
            masked = masked.movedim(1, -1)
        if self.prefix_tokens:
            axis = 1 if self.channel_dim == -1 else 2
            masked = torch.cat([x.narrow(axis, 0, self.prefix_tokens), masked.to(x.dtype)], axis)
        return masked


@dataclass
class Tap:
    """One loss between features of the student and features of the teacher.

    Args:
        student: a layer's name, as ``named_modules`` spells it (``"backbone.fpn"``), the layer itself, a list of them
            (one pyramid), or a ``Layer`` with options of its own.
        teacher: likewise.
        loss: called with the student's and the teacher's features; modules and functions alike. It gets tensors where
            the layer puts out a tensor, else lists of them (one per level).
        align: ``"auto"`` builds a 1x1 convolution for each level whose channels differ, unless the loss has an
            ``align`` of its own; None: nothing is aligned, the channels are left to the loss; or a module of yours (a
            list of them, one per level).
        name: the loss's name in the results; the student's layer by default.
        weight: factor on the loss.
        resize: whether student features of another size are interpolated to the teacher's. Off: an error.
        levels: see ``Layer``, like the options after it; for both sides, but for one that is given as a ``Layer``.
        select: which features of an output are taken, as a function.
        channel_dim: 1, or -1 for ``[N, *spatial, C]`` (token sequences); losses always get ``[N, C, *spatial]``.
        prefix_tokens: tokens at a sequence's start that are left out.
        grid: to which token sequences are reshaped.

    Raises:
        ValueError: options out of range.
        TypeError: a loss that cannot be called, or a class instead of an instance; a weight that is no number.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> from maskd_kernels import Layer, Tap
        >>> maps = Tap("backbone", Layer("backbone", levels="out"), mse_loss)  # the teacher's is a dict
        >>> tokens = Tap("blocks.5", "blocks.11", mse_loss, channel_dim=-1, prefix_tokens=1, grid="input")
    """

    student: LayerName | Sequence[LayerName] | Layer
    teacher: LayerName | Sequence[LayerName] | Layer
    loss: Callable[..., Tensor]
    align: str | nn.Module | Iterable[nn.Module] | None = "auto"
    name: str | None = None
    weight: float = 1.0
    resize: bool = False
    levels: Key | Sequence[Key] | None = None
    select: Callable[[Any], Any] | None = None
    channel_dim: int = 1
    prefix_tokens: int = 0
    grid: Size | Sequence[Size] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loss, type):
            raise TypeError(f"loss: expected a module or function, got the class {self.loss.__name__}; make one of it")
        if not callable(self.loss):
            raise TypeError(f"loss: expected a module or function, got {type(self.loss).__name__}")
        if not isinstance(self.weight, Tensor):
            check_number(self.weight, "weight")
        if isinstance(self.align, str) and self.align != "auto":
            raise ValueError(f"align: expected 'auto', None or modules, got {self.align!r}")
        if isinstance(self.align, Iterator):
            self.align = list(self.align)  # it can be read once, and a tap belongs to any number of distillers
        self.side(self.student)
        self.side(self.teacher)

    def side(self, layer: LayerName | Sequence[LayerName] | Layer) -> Layer:
        """The student's or the teacher's layer with its options."""
        if isinstance(layer, Layer):
            return layer
        return Layer(layer, self.levels, self.select, self.channel_dim, self.prefix_tokens, self.grid)

    @property
    def builds_align(self) -> bool:
        """Whether aligns are to be built: the loss brings none of its own."""
        own = getattr(self.loss, "align", None)
        return self.align == "auto" and not (isinstance(own, nn.Module) and any(True for _ in own.parameters()))


def image_size(arguments: Any) -> Size | None:
    """Height and width of the first images, ``[N, C, H, W]``, among a call's arguments."""
    return next(((x.shape[-2], x.shape[-1]) for x in tensors_in(arguments) if x.dim() == 4), None)


def grid_of(length: int, size: Size | None, where: str) -> Size:
    """The patches' grid for images of a size: the same stride both ways, whole patches rather than cut ones.

    Raises:
        ValueError: none fits, or several.
    """
    if size is None:
        raise ValueError(f"{where}: grid='input' needs images [N, C, H, W] among the arguments; give grid=(H, W)")
    whole: set[Size] = set()
    cut: set[Size] = set()
    for stride in range(1, max(size) + 1):
        for grid in ((size[0] // stride, size[1] // stride), (-(-size[0] // stride), -(-size[1] // stride))):
            if grid[0] * grid[1] == length:
                (cut if size[0] % stride or size[1] % stride else whole).add(grid)
    found = whole or cut
    if len(found) != 1:
        fits = f"several fit: {sorted(found)}" if found else "none fits"
        raise ValueError(
            f"{where}: grid='input' looks for a grid of {length} tokens for images of {size[0]}x{size[1]}, and {fits}; "
            "are prefix_tokens right? Else give grid=(H, W)"
        )
    return found.pop()


def _as_list(keys: Key | Sequence[Key]) -> list[Key]:
    return [keys] if isinstance(keys, (str, int)) else list(keys)


def _sizes(grid: Any) -> list[Size]:
    """A grid, or one per level, as a list; empty for anything else."""
    if not isinstance(grid, (list, tuple)) or not grid:
        return []
    pairs = [grid] if all(type(side) is int for side in grid) else list(grid)
    right = all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)
        for pair in pairs
    )
    return [(pair[0], pair[1]) for pair in pairs] if right else []
