"""Feature maps as strided ``[N, C, P]`` views: NCHW, channels-last and token sequences alike, without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from maskd_kernels import backends, native


class Feature(NamedTuple):
    """A ``[N, C, P]`` view with one dense axis: pixels, or channels where ``interleaved``."""

    view: Tensor
    interleaved: bool


def dense_view(x: Tensor) -> Feature:  # x: [N, C, *spatial]
    """The features with the pixel axes merged. Copies only what strides cannot express (slices, expanded pixels)."""
    n, c, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    try:
        flat = x.view(n, c, pixels)
    except RuntimeError:
        flat = x.contiguous().view(n, c, pixels)
    if is_interleaved(flat):
        return Feature(flat if flat.stride(1) == 1 else flat.contiguous(), True)
    return Feature(flat if flat.stride(2) == 1 else flat.contiguous(), False)


def is_interleaved(flat: Tensor) -> bool:  # flat: [N, C, P]
    """Whether the channels of a pixel lie side by side. A single pixel is read that way whatever its strides."""
    return flat.shape[2] == 1 or (flat.shape[1] > 1 and flat.stride(1) == 1 and flat.stride(2) != 1)


def with_layout(feature: Feature, interleaved: bool) -> Feature:
    """The same values with this axis dense."""
    if feature.interleaved == interleaved:
        return feature
    if interleaved:
        return Feature(feature.view.mT.contiguous().mT, True)
    return Feature(feature.view.contiguous(), False)


def empty_gradient(x: Tensor, interleaved: bool, pooled: bool = False) -> Tensor:  # [N, C, *spatial]
    """Memory for the gradient of ``x``, with this axis dense; ``pooled``: from memory kept by the native kernels."""
    channels, stride = x.shape[1], 1 if not interleaved else x.shape[1]
    strides = []
    for size in reversed(x.shape[2:]):
        strides.append(stride)
        stride = stride * max(size, 1)
    per_channel = 1 if interleaved else stride
    strides += [per_channel, stride if interleaved else stride * max(channels, 1)]
    strides.reverse()
    return native.empty(x.shape, x.dtype, strides) if pooled else x.new_empty_strided(x.shape, strides)


def empty_like(features: Sequence[Tensor], pooled: bool = False) -> list[Tensor]:
    """Memory for results shaped and laid out like each level."""
    return [empty_gradient(x, dense_view(x).interleaved, pooled) for x in features]


def copy_all(destinations: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Results of the reference into memory laid out as the operator promises."""
    for destination, source in zip(destinations, sources, strict=True):
        destination.copy_(source)


def describe_result(results: Sequence[Tensor], level: int) -> tuple[int, int, int, int, int]:
    """A level's result as the extension takes it; absent where results are not wanted."""
    return native.describe(dense_view(results[level]).view) if results else native.ABSENT


def is_small(levels: Sequence[Tensor], elements: int) -> bool:
    """Whether PyTorch's own operations are faster on a CPU, as calling a custom operator costs more than it saves."""
    if backends.current_backend() != "auto" or levels[0].device.type != "cpu":
        return False
    return sum(level.numel() for level in levels) < elements
