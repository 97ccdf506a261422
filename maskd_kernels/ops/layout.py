"""Feature maps as strided ``[N, C, P]`` views: NCHW, channels-last and token sequences alike, without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskd_kernels import native
from maskd_kernels.reference import compute_dtype


def as_dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of this dtype; the tensor itself where it is, as even calls that change nothing take time."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def as_factors(x: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Small factors as the operators take them: dense, in the compute dtype of the features that they belong to."""
    return [as_dense(factor, compute_dtype(level.dtype)) for factor, level in zip(x, like, strict=True)]


class Feature(NamedTuple):
    """A map seen as ``[N, C, P]`` with one dense axis: pixels, or channels where ``interleaved``."""

    tensor: Tensor  # whose memory it is
    shape: tuple[int, int, int]
    stride: tuple[int, int, int]  # in elements
    interleaved: bool

    @property
    def rest_stride(self) -> int:
        """The stride of the axis that is not dense."""
        return self.stride[2 if self.interleaved else 1]


def dense_view(x: Tensor) -> Feature:  # [N, C, *spatial]
    """The features with the pixel axes merged. Copies only what strides cannot express (slices, expanded pixels)."""
    feature = _merge_pixels(x)
    if feature is None or not _is_dense(feature):
        feature = _merge_pixels(x.contiguous())
        assert feature is not None, "a contiguous tensor's pixel axes merge"
    return feature


def _merge_pixels(x: Tensor) -> Feature | None:
    # By arithmetic, as every view is a call through PyTorch's dispatcher.
    shape, stride = x.shape, x.stride()
    pixels, step = 1, 1
    for size, distance in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if size != 1:
            step = distance if pixels == 1 else step
            if distance != step * pixels and x.numel() > 0:
                return None
            pixels *= size
    channels, channel_step = shape[1], stride[1]
    # A single pixel is read channel by channel whatever its strides.
    interleaved = pixels == 1 or (channels > 1 and channel_step == 1 and step != 1)
    return Feature(x, (shape[0], channels, pixels), (stride[0], channel_step, step), interleaved)


def _is_dense(feature: Feature) -> bool:
    axis = 1 if feature.interleaved else 2
    return feature.stride[axis] == 1 or feature.shape[axis] <= 1


def with_layout(feature: Feature, interleaved: bool) -> Feature:
    """The same values with this axis dense."""
    if feature.interleaved == interleaved:
        return feature
    x = feature.tensor
    copy = x.movedim(1, -1).contiguous().movedim(-1, 1) if interleaved else x.contiguous()
    merged = _merge_pixels(copy)
    assert merged is not None, "a dense tensor's pixel axes merge"
    return merged._replace(interleaved=interleaved)


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


Address = tuple[int, int, tuple[int, int, int], tuple[int, int, int], int]
ABSENT: Address = (0, 0, (0, 0, 0), (0, 0, 0), 0)


def describe(feature: Feature) -> Address:
    """A feature as the extension takes it: address, dtype code, shape, strides, elements up to its memory's end."""
    x = feature.tensor
    available = x.untyped_storage().nbytes() // x.element_size() - int(x.storage_offset())
    return x.data_ptr(), native.DTYPE_CODES[x.dtype], feature.shape, feature.stride, available


def describe_result(results: Sequence[Tensor], level: int) -> Address:
    """A level's result as the extension takes it; absent where results are not wanted."""
    return describe(dense_view(results[level])) if results else ABSENT


def map_shape(feature: Feature) -> Any:
    """The size of a level and which axis is dense, as the extension takes them."""
    return native.module().MapShape(*feature.shape, feature.interleaved, torch.get_num_threads())
