"""Functions that read or write feature maps once and need no tokens: what MGD, AMD and others are made of.

Shapes as in ``maskd_kernels.functional``, from where they are public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from maskd_kernels.ops import attention_stats as attention_op
from maskd_kernels.ops import layout
from maskd_kernels.ops import scale_pixels as scale_op
from maskd_kernels.ops import squared_error as error_op
from maskd_kernels.validation import Levels, as_features, match_features, match_scale


def _same_precision(*features: list[Tensor]) -> tuple[list[Tensor], ...]:
    """One float64 makes all float64: what comes of several levels has one dtype."""
    if any([x.dtype == torch.float64 for group in features for x in group]):
        return tuple([x.double() for x in group] for group in features)
    return features


@overload
def scale_pixels(x: Tensor, scale: Levels, *, channel_dim: int = 1) -> Tensor: ...
@overload
def scale_pixels(x: Sequence[Tensor], scale: Levels, *, channel_dim: int = 1) -> list[Tensor]: ...
def scale_pixels(x: Levels, scale: Levels, *, channel_dim: int = 1) -> Tensor | list[Tensor]:
    """A feature map times one number per pixel; the backward gives both gradients in one pass.

    Args:
        x: features ``[N, C, *spatial]``, or a list of levels.
        scale: ``[N, *spatial]``, floating or bool (1 keeps, 0 drops), or one such tensor per level.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``.

    Returns:
        Shaped and typed like ``x``; a list where a list was given. Differentiable in both.

    Raises:
        ValueError: shapes, level counts or devices that do not match.
        TypeError: integer features or scales, or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> maskd_kernels.scale_pixels(torch.ones(1, 3, 2, 2), torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))[0, 0]
        tensor([[0., 1.],
                [2., 3.]])
    """
    levels = as_features(x, "x", channel_dim)
    factors = match_scale(scale, "scale", levels, "spatial", "x")
    scaled = scale_op.scale_pixels(levels, layout.as_factors(factors, levels))
    scaled = scaled if channel_dim == 1 else [level.movedim(1, -1) for level in scaled]
    return scaled[0] if isinstance(x, Tensor) else scaled


@overload
def scale_channels(x: Tensor, scale: Levels, *, channel_dim: int = 1) -> Tensor: ...
@overload
def scale_channels(x: Sequence[Tensor], scale: Levels, *, channel_dim: int = 1) -> list[Tensor]: ...
def scale_channels(x: Levels, scale: Levels, *, channel_dim: int = 1) -> Tensor | list[Tensor]:
    """A feature map times one number per channel: ``scale_pixels`` with the two axes exchanged.

    Args:
        x: features ``[N, C, *spatial]``, or a list of levels.
        scale: ``[N, C]``, floating or bool, or one such tensor per level.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``.

    Returns:
        Shaped and typed like ``x``; a list where a list was given. Differentiable in both.

    Raises:
        ValueError: shapes, level counts or devices that do not match.
        TypeError: integer features or scales, or something that is no dense tensor.
    """
    levels = as_features(x, "x", channel_dim)
    factors = match_scale(scale, "scale", levels, "channels", "x")
    exchanged = scale_op.scale_pixels([level.flatten(2).mT for level in levels], layout.as_factors(factors, levels))
    scaled = [y.mT.reshape(level.shape) for y, level in zip(exchanged, levels, strict=True)]
    scaled = scaled if channel_dim == 1 else [level.movedim(1, -1) for level in scaled]
    return scaled[0] if isinstance(x, Tensor) else scaled


def squared_error(pred: Levels, target: Levels, *, channel_scale: Levels | None = None, channel_dim: int = 1) -> Tensor:
    """``sum_{c,p} (channel_scale * pred - target)^2`` per image, accumulated in float32 whatever the features are.

    Args:
        pred: features ``[N, C, *spatial]``, or a list of levels.
        target: features of the same shapes; their floating dtype may differ.
        channel_scale: ``[N, C]``, or one such tensor per level; None: 1.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``.

    Returns:
        ``[N]`` float32 (float64 for float64 features), or ``[levels, N]`` where a list was given. Differentiable in
        all inputs.

    Raises:
        ValueError: shapes, level counts or devices that do not match.
        TypeError: integer features or scales, or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> maskd_kernels.squared_error(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
        tensor([48., 48.])
    """
    p, t = as_features(pred, "pred", channel_dim), as_features(target, "target", channel_dim)
    match_features(p, t, "pred", "target")
    p, t = _same_precision(p, t)
    scale: list[Tensor] = []
    if channel_scale is not None:
        scale = layout.as_factors(match_scale(channel_scale, "channel_scale", p, "channels", "pred"), p)
    error = error_op.squared_error(p, t, scale)
    return error[0] if isinstance(pred, Tensor) else error


@overload
def attention_stats(x: Tensor, *, channel_dim: int = 1) -> tuple[Tensor, Tensor]: ...
@overload
def attention_stats(x: Sequence[Tensor], *, channel_dim: int = 1) -> tuple[list[Tensor], list[Tensor]]: ...
def attention_stats(x: Levels, *, channel_dim: int = 1) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Where a feature map is strong, and the means of its channels, in one read.

    Args:
        x: features ``[N, C, *spatial]``, or a list of levels.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``.

    Returns:
        ``mean_c |x|`` ``[N, *spatial]`` and ``mean_p x`` ``[N, C]``, float32 (float64 where any level is); two lists
        where a list was given. Differentiable.

    Raises:
        ValueError: features that are not ``[N, C, *spatial]``; devices or batch sizes that do not match.
        TypeError: integer features or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> attention, mean = maskd_kernels.attention_stats(-torch.ones(1, 3, 2, 2))
        >>> attention.unique(), mean
        (tensor([1.]), tensor([[-1., -1., -1.]]))
    """
    levels = as_features(x, "x", channel_dim)
    (levels,) = _same_precision(levels)
    attention, mean = attention_op.attention_stats(levels)
    return (attention[0], mean[0]) if isinstance(x, Tensor) else (attention, mean)
