"""Masked distillation as functions: validate, call an operator, and combine its small results.

Shapes: ``N`` batch, ``K`` receptive tokens, ``C`` channels, ``*spatial`` one to three pixel axes. Wherever
a feature map is taken, a list of them (the levels of a feature pyramid) is taken too, and handled in one call.
Statistics and losses are float32 whatever the features are (float64 for float64 features), also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from maskd_kernels.mask_weighting import MaskWeighting, weights_from_sums
from maskd_kernels.ops import layout
from maskd_kernels.ops import maskd_loss as loss_op
from maskd_kernels.ops import receptive_stats as stats_op
from maskd_kernels.ops import scale_pixels as scale_op
from maskd_kernels.ops.registration import full_precision
from maskd_kernels.reference import ReceptiveStats, compute_dtype, least_mass
from maskd_kernels.streaming import attention_stats, scale_channels, scale_pixels, squared_error
from maskd_kernels.validation import (
    FLOATING,
    Levels,
    as_features,
    as_levels,
    as_list,
    as_weighting,
    channels_first,
    check_channel_dim,
    check_customize,
    check_eps,
    check_scale,
    kind_of,
    level_name,
    match_count,
    match_features,
    match_tokens,
    match_weighting,
    shape_of,
)

__all__ = [
    "MaskWeighting",
    "attention_stats",
    "dice_diversity",
    "mask_weights",
    "maskd_loss",
    "masked_features",
    "masked_mse",
    "receptive_masks",
    "scale_channels",
    "scale_pixels",
    "squared_error",
]

# ---- The operator's results combined -----------------------------------------------------------


def _computable(
    teacher: list[Tensor], tokens: list[Tensor], student: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The dtypes that the kernels take: one float64 makes all float64; tokens come in the compute dtype."""
    if any([x.dtype == torch.float64 for x in (*teacher, *tokens, *student)]):
        teacher, student = [t.double() for t in teacher], [s.double() for s in student]
    dtype = compute_dtype(teacher[0].dtype)
    return teacher, [e if e.dtype == dtype else e.to(dtype) for e in tokens], student


def _stats(
    teacher: list[Tensor],
    tokens: list[Tensor],
    student: list[Tensor],
    customize: bool | Tensor = False,
    sums: bool = False,
) -> ReceptiveStats:
    """The operator, its inputs brought to the dtypes it takes."""
    teacher, tokens, student = _computable(teacher, tokens, student)
    return stats_op.receptive_stats(teacher, tokens, student, stats_op.as_flag(customize, teacher[0].device), sums)


def _dice(gram: Tensor) -> Tensor:
    """``[..., N, K, K]`` to ``[...]``: the mean Dice coefficient over images and ordered pairs of different masks."""
    n, k = gram.shape[-3], gram.shape[-1]
    square = gram.diagonal(dim1=-2, dim2=-1)
    coefficient = 2 * gram / (square[..., :, None] + square[..., None, :] + 2e-12)
    pairs = coefficient.sum((-1, -2)) - coefficient.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs.sum(-1) / max(n * k * (k - 1), 1)


def _masked_error(error: Tensor, mass: Tensor, weights: Tensor | None, channels: list[int], eps: float) -> Tensor:
    """Sum over levels of mean_n sum_k weights * error / (C * mass); weights None: mean over the masks too.

    The quotient comes first: its derivative ``-(error / mass) / mass`` is then in range whatever the mass is, which
    that of ``weights / mass`` is not.
    """
    _, n, k = error.shape
    quotient = error / (mass + eps).clamp_min(least_mass(mass.dtype))
    if weights is not None:
        quotient = quotient * weights
    counts = [c * max(n, 1) * (k if weights is None else 1) for c in channels]
    if len(set(counts)) == 1:
        return quotient.sum() / counts[0]
    return torch.stack([x.sum() / count for x, count in zip(quotient.unbind(), counts, strict=True)]).sum()


# ---- Public functions --------------------------------------------------------------------------


@overload
def receptive_masks(
    teacher: Tensor, tokens: Tensor, *, student: Tensor | None = None, channel_dim: int = 1
) -> Tensor: ...
@overload
def receptive_masks(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    *,
    student: Sequence[Tensor] | None = None,
    channel_dim: int = 1,
) -> list[Tensor]: ...
def receptive_masks(
    teacher: Levels, tokens: Levels, *, student: Levels | None = None, channel_dim: int = 1
) -> Tensor | list[Tensor]:
    """Masks of the receptive tokens: ``sigmoid(tokens . teacher)`` (MasKD, arXiv 2205.14589, equation 3).

    Args:
        teacher: features ``[N, C, *spatial]``, or a list of levels.
        tokens: receptive tokens ``[K, C]``, or one such tensor per level.
        student: features like the teacher's; the masks are then multiplied by the student's own, which
            receive no gradient (the authors' customised masks).
        channel_dim: 1, or -1 for ``[N, *spatial, C]`` (token sequences of transformers).

    Returns:
        ``[N, K, *spatial]`` float32 (float64 for float64 features), values in (0, 1); a list where a list was given.

    Raises:
        ValueError: shapes, level counts or devices that do not match.
        TypeError: integer features or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> maskd_kernels.receptive_masks(torch.randn(2, 16, 8, 8), torch.randn(6, 16)).shape
        torch.Size([2, 6, 8, 8])
    """
    t = as_features(teacher, "teacher", channel_dim)
    e = as_levels(tokens, "tokens")
    match_tokens(e, t)
    s = [] if student is None else as_features(student, "student", channel_dim)
    if s:
        match_features(s, t)
    stats = _stats(t, e, s, customize=len(s) > 0)
    split = stats.masks.split([math.prod(x.shape[2:]) for x in t], -1)
    masks = [m.reshape(*m.shape[:2], *x.shape[2:]) for m, x in zip(split, t, strict=True)]
    return masks[0] if isinstance(teacher, Tensor) else masks


@overload
def maskd_loss(
    student: Levels,
    teacher: Levels,
    tokens: Levels,
    *,
    weighting: MaskWeighting | Sequence[MaskWeighting] | None = None,
    customize: bool | Tensor = False,
    eps: float = 0.0,
    channel_dim: int = 1,
    return_dice: Literal[False] = False,
) -> Tensor: ...
@overload
def maskd_loss(
    student: Levels,
    teacher: Levels,
    tokens: Levels,
    *,
    weighting: MaskWeighting | Sequence[MaskWeighting] | None = None,
    customize: bool | Tensor = False,
    eps: float = 0.0,
    channel_dim: int = 1,
    return_dice: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def maskd_loss(
    student: Levels,
    teacher: Levels,
    tokens: Levels,
    *,
    weighting: MaskWeighting | Sequence[MaskWeighting] | None = None,
    customize: bool | Tensor = False,
    eps: float = 0.0,
    channel_dim: int = 1,
    return_dice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The MasKD distillation loss (arXiv 2205.14589, equations 5 and 6): the teacher reconstructed under the masks.

    ``sum_levels mean_n sum_k w[n,k] * sum_p M[n,k,p]^2 |S - T|^2[n,p] / (C * (sum_p M[n,k,p] + eps))``

    Args:
        student: features ``[N, C, *spatial]`` with the teacher's shape, or a list of levels. Its dtype may differ.
        teacher: features ``[N, C, *spatial]``, or a list of levels.
        tokens: receptive tokens ``[K, C]``, or one such tensor per level.
        weighting: parameters of the mask weighting per level (images only). None: the mean over the masks.
        customize: whether the masks are multiplied by the student's own, as the authors do after a warm-up. A
            0-dim bool tensor on the features' device decides without the host waiting for the device.
        eps: added to each mask's mass, from 0 on: 0 in the authors' detection loss, 1e-5 in their segmentation loss.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``.
        return_dice: also return the Dice coefficient of each level.

    Returns:
        The loss, a float32 scalar (float64 for float64 features); with ``return_dice`` also the mean Dice
        coefficient between the masks of each level, ``[levels]``. Differentiable in all inputs. An empty batch
        gives 0.

    Raises:
        ValueError: shapes, level counts or devices that do not match.
        TypeError: integer features or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> student = torch.randn(2, 16, 8, 8, requires_grad=True)
        >>> loss = maskd_kernels.maskd_loss(student, torch.randn(2, 16, 8, 8), torch.randn(6, 16))
        >>> loss.backward()
    """
    t, s = as_list(teacher, "teacher"), as_list(student, "student")
    e, w = as_list(tokens, "tokens"), as_weighting(weighting)
    eps = check_eps(eps)
    check_channel_dim(channel_dim)
    check_customize(customize, t[0])
    inputs = loss_op.Inputs(t, e, s, w)
    tensors = inputs.tensors()
    call = None if return_dice else loss_op.signature(channel_dim, inputs, tensors)
    plan = loss_op.recall(call)
    if plan is not None:
        if channel_dim != 1:
            inputs = loss_op.Inputs(channels_first(t, channel_dim), e, channels_first(s, channel_dim), w)
            tensors = inputs.tensors()
        return loss_op.maskd_loss(plan, inputs, tensors, customize, eps)
    t, s = as_features(t, "teacher", channel_dim), as_features(s, "student", channel_dim)
    e = as_levels(e, "tokens")
    match_features(s, t)
    match_tokens(e, t)
    if w:
        match_weighting(w, t, e[0].shape[0])
    inputs = loss_op.Inputs(t, e, s, w)
    if call is not None and loss_op.applies(call, inputs):
        plan, inputs = loss_op.prepare(call, inputs, loss_op.Inputs(*_computable(t, e, s), w))
        return loss_op.maskd_loss(plan, inputs, inputs.tensors(), customize, eps)
    with full_precision(t[0]):
        stats = _stats(t, e, s, customize, sums=len(w) > 0)
        weights = weights_from_sums(stats.sums, t, w) if w else None
        loss = _masked_error(stats.error, stats.mass, weights, [x.shape[1] for x in t], eps)
        return (loss, _dice(stats.gram)) if return_dice else loss


def masked_mse(
    student: Levels,
    teacher: Levels,
    masks: Levels,
    *,
    weights: Levels | None = None,
    eps: float = 0.0,
    channel_dim: int = 1,
) -> Tensor:
    """The same loss under masks of your own: boxes, attention maps, anything per pixel.

    Args:
        student: features ``[N, C, *spatial]`` with the teacher's shape, or a list of levels.
        teacher: features ``[N, C, *spatial]``, or a list of levels.
        masks: ``[N, K, *spatial]`` floating or bool, or one such tensor per level; bool masks count as 0 and 1.
        weights: weight of each mask ``[N, K]``, or one such tensor per level. None: the mean over the masks.
        eps: added to each mask's mass, from 0 on.
        channel_dim: 1, or -1 for features ``[N, *spatial, C]`` (masks stay ``[N, K, *spatial]``).

    Returns:
        The loss, a float32 scalar (float64 for float64 features), differentiable in all inputs.

    Raises:
        ValueError: shapes, level counts or devices that do not match.
        TypeError: integer features or masks, or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> student, teacher = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
        >>> inside = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
        >>> inside[:, :, 2:6, 2:6] = True
        >>> loss = maskd_kernels.masked_mse(student, teacher, inside)
    """
    t, s = as_features(teacher, "teacher", channel_dim), as_features(student, "student", channel_dim)
    match_features(s, t)
    m = as_levels(masks, "masks")
    match_count(m, "masks", t, "teacher")
    k = m[0].shape[1] if m[0].dim() > 1 else 0
    for i, (mask, x) in enumerate(zip(m, t, strict=True)):
        label = level_name("masks", i, len(t))
        if mask.dtype != torch.bool and mask.dtype not in FLOATING:
            raise TypeError(f"{label}: expected a floating dtype or bool, got {mask.dtype}")
        if k < 1 or list(mask.shape) != [x.shape[0], k, *x.shape[2:]]:
            raise ValueError(f"{label}: expected [{x.shape[0]}, K, {str(list(x.shape[2:]))[1:]}, got {shape_of(mask)}")
        if mask.device != x.device:
            raise ValueError(f"{label}: expected device {x.device} like the features, got {mask.device}")
    w = None if weights is None else as_levels(weights, "weights")
    if w is not None:
        match_count(w, "weights", t, "teacher")
        for i, (weight, x) in enumerate(zip(w, t, strict=True)):
            check_scale(weight, level_name("weights", i, len(t)), [x.shape[0], k], x)
    eps = check_eps(eps)
    with full_precision(t[0]):
        distance = _stats(t, [], s).distance.split([math.prod(x.shape[2:]) for x in t], -1)  # L x [N, P]
        flat = [mask.flatten(2).to(distance[0].dtype) for mask in m]  # L x [N, K, P]
        error = torch.stack([(x.square() @ d[..., None]).squeeze(-1) for x, d in zip(flat, distance, strict=True)])
        mass = torch.stack([x.sum(-1) for x in flat])
        stacked = None if w is None else torch.stack([x.to(error.dtype) for x in w])
        return _masked_error(error, mass, stacked, [x.shape[1] for x in t], eps)


def dice_diversity(masks: Levels) -> Tensor:
    """How much the masks of one image overlap: the Dice loss that keeps tokens apart (arXiv 2205.14589, equation 4).

    ``mean over n, k != l of 2 <M_k, M_l> / (|M_k|^2 + |M_l|^2 + 2e-12)``, summed over levels.

    Args:
        masks: ``[N, K, *spatial]``, floating, or a list of levels.

    Returns:
        A scalar between 0 (disjoint masks) and the number of levels (equal masks); 0 for a single mask, which has
        nothing to differ from.

    Raises:
        ValueError: masks that are not ``[N, K, *spatial]``.
        TypeError: masks that are not floating.

    Example:
        >>> import torch, maskd_kernels
        >>> maskd_kernels.dice_diversity(torch.eye(4).reshape(1, 4, 2, 2))
        tensor(0.)
    """
    levels = as_features(masks, "masks", 1)
    with full_precision(levels[0]):
        flat = [m.flatten(2).to(compute_dtype(m.dtype)) for m in levels]
        return torch.stack([_dice(m @ m.mT) for m in flat]).sum()


def masked_features(
    x: Tensor,
    tokens: Tensor,
    *,
    weighting: MaskWeighting | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """What the tokens see of a feature map: ``x * sum_k w_k M_k``, and the Dice coefficient between the masks.

    Put in the place of ``x`` in the frozen teacher's forward, the task loss plus the Dice coefficient trains the
    tokens (arXiv 2205.14589, section 3.2).

    Args:
        x: features ``[N, C, *spatial]``.
        tokens: receptive tokens ``[K, C]``.
        weighting: parameters of the mask weighting (images only). None: masks count 1 each.
        channel_dim: 1, or -1 for ``[N, *spatial, C]``.

    Returns:
        The masked features, shape and dtype of ``x``, and the Dice coefficient, a scalar.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: integer features or something that is no dense tensor.

    Example:
        >>> import torch, maskd_kernels
        >>> seen, dice = maskd_kernels.masked_features(torch.randn(2, 16, 8, 8), torch.randn(6, 16))
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {kind_of(x)}")
    t, e = as_features(x, "x", channel_dim), as_levels(tokens, "tokens")
    w = as_weighting(weighting)
    match_tokens(e, t)
    if w:
        match_weighting(w, t, e[0].shape[0])
    with full_precision(x):
        stats = _stats(t, e, [], sums=len(w) > 0)
        if w:
            weights = weights_from_sums(stats.sums, t, w)[0]  # [N, K]
            scale = (weights[:, None] @ stats.masks).squeeze(1)  # [N, P]
        else:
            scale = stats.masks.sum(1)
        scale = scale.reshape(len(scale), *t[0].shape[2:])
        (seen,) = scale_op.scale_pixels(t, layout.as_factors([scale], t))
        return seen if channel_dim == 1 else seen.movedim(1, -1), _dice(stats.gram)[0]


def mask_weights(teacher: Tensor, weighting: MaskWeighting) -> Tensor:
    """Weights of the masks of each image: softmax of the weighting module's logits, without its convolution.

    Args:
        teacher: images ``[N, C, H, W]``.
        weighting: the module's parameters.

    Returns:
        ``[N, K]`` float32 (float64 for float64 features), summing to 1 over the tokens.

    Raises:
        ValueError: shapes or devices that do not match.
        TypeError: integer features or something that is no dense tensor.
    """
    t = as_features(teacher, "teacher", 1)
    if not isinstance(weighting, MaskWeighting):
        raise TypeError(f"weighting: expected MaskWeighting, got {kind_of(weighting)}")
    match_weighting([weighting], t, weighting.projection_weight.shape[0])
    with full_precision(t[0]):
        return weights_from_sums(_stats(t, [], [], sums=True).sums, t, [weighting])[0]
