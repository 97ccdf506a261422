"""What every public function checks of its arguments: errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from maskd_kernels.mask_weighting import MaskWeighting

Levels = Tensor | Sequence[Tensor]
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MAX_TOKENS = 1024  # the largest Gram matrix that one Triton program holds; on a CPU tiles would shrink to few pixels


def shape_of(x: Tensor) -> str:
    """A shape, for messages."""
    return str(list(x.shape))


def are_tensors(items: Sequence[object]) -> bool:
    """Whether all are tensors. Every call pays for this."""
    return _USUAL.issuperset(map(type, items)) or all([isinstance(x, Tensor) for x in items])


_USUAL = {Tensor, nn.Parameter}


def as_list(x: Levels, name: str) -> list[Tensor]:
    """A tensor or a sequence of tensors as a list."""
    found = [x] if isinstance(x, Tensor) else list(x) if isinstance(x, (list, tuple)) else None
    if found is None or not are_tensors(found):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {kind_of(x)}")
    if not found:
        raise ValueError(f"{name}: expected at least one level, got an empty list")
    return found


def as_levels(x: Levels, name: str) -> list[Tensor]:
    """The same of dense tensors alone."""
    found = as_list(x, name)
    for level in found:
        if level.layout is not torch.strided or level.is_nested:
            raise TypeError(f"{name}: expected dense tensors, got {kind_of_memory(level)}")
    return found


def kind_of_memory(x: Tensor) -> str:
    """How a tensor is stored that is not dense, for messages."""
    return "a nested tensor" if x.is_nested else f"one of layout {x.layout}"


def kind_of(x: object) -> str:
    """What something is that is no tensor, for messages."""
    if isinstance(x, (list, tuple)):
        return f"a {type(x).__name__} of {', '.join(sorted({type(item).__name__ for item in x}))}"
    return type(x).__name__


def check_number(
    value: float, name: str, expected: str = "a finite number", within: Callable[[float], bool] = math.isfinite
) -> float:
    """A finite number, ``within`` a range that ``expected`` words; no tensor, whose value would be waited for."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not (math.isfinite(value) and within(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def check_count(value: int, name: str, least: int = 1) -> int:
    """A whole number, from ``least`` on."""
    expected = "a positive whole number" if least == 1 else f"a whole number from {least} on"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def check_module(value: object, name: str) -> None:
    """A model."""
    if not isinstance(value, nn.Module):
        got = f"the class {value.__name__}" if isinstance(value, type) else kind_of(value)
        raise TypeError(f"{name}: expected a module, got {got}")


def check_channels(channels: int | Sequence[int], name: str) -> list[int]:
    """The channels of each level; one number is one level."""
    if isinstance(channels, str) or not isinstance(channels, Sequence):
        return [check_count(channels, name)]
    if not channels:
        raise ValueError(f"{name}: expected at least one level, got an empty list")
    return [check_count(c, level_name(name, i, len(channels))) for i, c in enumerate(channels)]


def check_eps(eps: float) -> float:
    """A number that may be added to a mask's mass. Every call pays for this."""
    if type(eps) is float and 0 <= eps < math.inf:
        return eps
    return check_number(eps, "eps", "a number from 0 on", lambda value: value >= 0)


def check_channel_dim(channel_dim: int) -> None:
    """Where the channels are. Every call pays for this."""
    if type(channel_dim) is not int or channel_dim not in (1, -1):
        raise ValueError(f"channel_dim: expected 1 ([N, C, *spatial]) or -1 ([N, *spatial, C]), got {channel_dim!r}")


def check_customize(customize: bool | Tensor, features: Tensor) -> None:
    """A bool, or a tensor that holds one. Every call pays for this."""
    if type(customize) is bool:
        return
    if not isinstance(customize, Tensor):
        raise TypeError(f"customize: expected a bool or a bool tensor, got {kind_of(customize)}")
    if customize.dtype != torch.bool:
        raise TypeError(f"customize: expected a bool tensor, got {customize.dtype}")
    if customize.dim() != 0:
        raise ValueError(f"customize: expected a tensor of no axes, got {shape_of(customize)}")
    if customize.device != features.device:
        raise ValueError(f"customize: expected device {features.device} like the features, got {customize.device}")


def level_name(name: str, level: int, count: int) -> str:
    """An argument's name, with the level where there are several."""
    return name if count == 1 else f"{name}[{level}]"


def as_features(x: Levels, name: str, channel_dim: int) -> list[Tensor]:
    """The levels as ``[N, C, *spatial]`` views."""
    levels = as_levels(x, name)
    check_channel_dim(channel_dim)
    expected = "[N, C, *spatial]" if channel_dim == 1 else "[N, *spatial, C]"
    for i, level in enumerate(levels):
        label = level_name(name, i, len(levels))
        if not 3 <= level.dim() <= 5:
            raise ValueError(f"{label}: expected {expected} with one to three pixel axes, got {shape_of(level)}")
        if level.dtype not in FLOATING:
            raise TypeError(f"{label}: expected float32, float16, bfloat16 or float64, got {level.dtype}")
        if level.shape[channel_dim] == 0:
            raise ValueError(f"{label}: expected at least one channel, got {shape_of(level)}")
        if i > 0 and level.device != levels[0].device:
            raise ValueError(f"{label}: expected device {levels[0].device} like {name}[0], got {level.device}")
        if i > 0 and level.shape[0] != levels[0].shape[0]:
            raise ValueError(f"{label}: expected batch size {levels[0].shape[0]} like {name}[0], got {shape_of(level)}")
    return channels_first(levels, channel_dim)


def channels_first(levels: list[Tensor], channel_dim: int) -> list[Tensor]:
    """The levels as ``[N, C, *spatial]`` views."""
    return levels if channel_dim == 1 else [level.movedim(-1, 1) for level in levels]


def match_count(x: Sequence[object], name: str, like: Sequence[object], like_name: str) -> None:
    """As many levels as another argument has."""
    if len(x) != len(like):
        raise ValueError(f"{name}: expected {len(like)} level(s) like {like_name}, got {len(x)}")


def match_features(
    student: list[Tensor], teacher: list[Tensor], student_name: str = "student", teacher_name: str = "teacher"
) -> None:
    """Student features shaped like the teacher\'s."""
    match_count(student, student_name, teacher, teacher_name)
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        label = level_name(student_name, i, len(teacher))
        other = level_name(teacher_name, i, len(teacher))
        if s.shape != t.shape:
            hint = ""
            if s.dim() == t.dim() and s.shape[1] != t.shape[1]:
                hint = f"; align the student with a 1x1 convolution from {s.shape[1]} to {t.shape[1]} channels first"
            raise ValueError(f"{label}: expected {shape_of(t)} like {other}, got {shape_of(s)}{hint}")
        if s.device != t.device:
            raise ValueError(f"{label}: expected device {t.device} like {other}, got {s.device}")


def match_tokens(tokens: list[Tensor], teacher: list[Tensor]) -> None:
    """One ``[K, C]`` per level."""
    match_count(tokens, "tokens", teacher, "teacher")
    for i, (e, t) in enumerate(zip(tokens, teacher, strict=True)):
        label = level_name("tokens", i, len(teacher))
        if e.dtype not in FLOATING:
            raise TypeError(f"{label}: expected a floating dtype, got {e.dtype}")
        if e.dim() != 2 or e.shape[1] != t.shape[1]:
            raise ValueError(f"{label}: expected [K, {t.shape[1]}] for a teacher of {shape_of(t)}, got {shape_of(e)}")
        if e.shape[0] < 1:
            raise ValueError(f"{label}: expected at least one token, got {shape_of(e)}")
        if e.shape[0] > MAX_TOKENS:
            raise ValueError(f"{label}: expected at most {MAX_TOKENS} tokens, got {shape_of(e)}")
        if e.shape[0] != tokens[0].shape[0]:
            raise ValueError(f"{label}: expected {tokens[0].shape[0]} tokens like tokens[0], got {shape_of(e)}")
        if e.device != t.device:
            raise ValueError(f"{label}: expected device {t.device} like the features, got {e.device}")


def as_weighting(weighting: MaskWeighting | Sequence[MaskWeighting] | None) -> list[MaskWeighting]:
    """One level's parameters or a sequence of them as a list; empty for none."""
    if weighting is None:
        return []
    levels = (
        weighting if isinstance(weighting, (list, tuple)) and not isinstance(weighting, MaskWeighting) else [weighting]
    )
    if not all([isinstance(w, MaskWeighting) for w in levels]):
        raise TypeError(f"weighting: expected MaskWeighting or a list of it, got {kind_of(weighting)}")
    return list(levels)


def match_weighting(weighting: Sequence[MaskWeighting], teacher: list[Tensor], num_tokens: int) -> None:
    """Parameters that fit the channels and tokens of each level."""
    match_count(weighting, "weighting", teacher, "teacher")
    if not are_tensors([*chain.from_iterable(weighting)]):
        raise TypeError(f"weighting: expected tensors in every field, got {', '.join(map(kind_of, weighting))}")
    for i, (w, t) in enumerate(zip(weighting, teacher, strict=True)):
        label, c = level_name("weighting", i, len(teacher)), t.shape[1]
        if t.dim() != 4:
            raise ValueError(
                f"{label}: weighting masks needs images [N, C, H, W], got a teacher of {shape_of(t)}; sequences take "
                "weight_mask=False, or Tap(grid=...)"
            )
        for field, expected in zip(
            MaskWeighting._fields, ([c, c, 3, 3], [c], [num_tokens, c, 1, 1], [num_tokens]), strict=True
        ):
            got = getattr(w, field)
            if got.dtype not in FLOATING:
                raise TypeError(f"{label}.{field}: expected a floating dtype, got {got.dtype}")
            if list(got.shape) != expected:
                raise ValueError(f"{label}.{field}: expected {expected}, got {shape_of(got)}")
            if got.device != t.device:
                raise ValueError(f"{label}.{field}: expected device {t.device} like the features, got {got.device}")


def check_scale(scale: Tensor, label: str, expected: list[int], features: Tensor) -> None:
    """One factor or mask: its dtype, its shape, and the device of the features it belongs to."""
    if scale.dtype != torch.bool and scale.dtype not in FLOATING:
        raise TypeError(f"{label}: expected a floating dtype or bool, got {scale.dtype}")
    if list(scale.shape) != expected:
        raise ValueError(f"{label}: expected {expected} for features of {shape_of(features)}, got {shape_of(scale)}")
    if scale.device != features.device:
        raise ValueError(f"{label}: expected device {features.device} like the features, got {scale.device}")


def match_scale(scale: Levels, name: str, x: list[Tensor], axis: str, like: str) -> list[Tensor]:
    """One number per pixel (``axis`` spatial) or per channel (``axis`` channels) of each level."""
    found = as_levels(scale, name)
    match_count(found, name, x, like)
    for i, (s, level) in enumerate(zip(found, x, strict=True)):
        label = level_name(name, i, len(x))
        expected = [level.shape[0], *level.shape[2:]] if axis == "spatial" else list(level.shape[:2])
        check_scale(s, label, expected, level)
    return found
