"""Plain PyTorch, written to be read next to the papers.

The fallback backend, and the only oracle of tests and benches. Shapes: ``N`` batch, ``K`` receptive tokens,
``C`` channels, ``P`` pixels, ``L`` levels of a feature pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TAPS = 9  # of a 3x3 convolution, row by row


class ReceptiveStats(NamedTuple):
    """What one pass over the features leaves behind. Levels lie side by side on the axes ``P`` and ``C``.

    Fields that were not asked for are empty tensors.
    """

    masks: Tensor  # [N, K, P] sigmoid(tokens . teacher), times sigmoid(tokens . student) where customized
    teacher_masks: Tensor  # [N, K, P] the first factor; only where customized
    distance: Tensor  # [N, P] sum_c (student - teacher)^2
    mass: Tensor  # [L, N, K] sum_p masks
    error: Tensor  # [L, N, K] sum_p masks^2 * distance
    gram: Tensor  # [L, N, K, K] sum_p masks_k * masks_l
    sums: Tensor  # [N, 9, C] sum of the teacher over the pixels that each tap of a zero-padded 3x3 convolution reads


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, whatever the features are; float64 for float64 features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def least_mass(dtype: torch.dtype) -> float:
    """A mask counts as vanished below this mass ``m0``, which then stands for its own in ``error / mass``.

    As no pixel's mask exceeds the mass, ``error / mass`` and, where the quotient is taken before it is multiplied,
    its gradients are within small multiples of ``max_p mask * max_p distance``, which here is below ``m0 distance``:
    that is what replacing the mass can change at most. ``m0`` leaves the upstream gradient a factor of ``2^32`` before
    ``g_error = g / mass`` overflows. It is ``2^-94`` in float32 and ``2^-990`` in float64.
    """
    return torch.finfo(dtype).tiny * 2.0**32


def tap_windows(spatial: Sequence[int], like: Tensor) -> Tensor:
    """``[9, P]``: 1 where a tap reads a pixel while its convolution slides over the image, padded with zeros.

    The tap above the centre misses the last row, the one left of it the last column. Only images have such borders:
    elsewhere every tap reads everything.
    """
    windows = like.new_ones(3, 3, *spatial)
    if len(spatial) == 2 and windows.numel():
        windows[0, :, -1], windows[2, :, 0], windows[:, 0, :, -1], windows[:, 2, :, 0] = 0, 0, 0, 0
    return windows.flatten(2).flatten(0, 1)


def is_customized(customize: Tensor | None, student: Sequence[Tensor]) -> bool:
    """Whether the student's own masks come into it, as ``customize`` then says.

    Raises:
        ValueError: there is no student whose masks these would be.
    """
    if customize is not None and not student:
        raise ValueError("customize: expected None where there is no student, got a bool tensor")
    return customize is not None


def receptive_stats(
    teacher: Sequence[Tensor],  # L x [N, C, *spatial]
    tokens: Sequence[Tensor],  # L x [K, C], or none: distance and sums only
    student: Sequence[Tensor] = (),  # L x [N, C, *spatial], or none
    customize: Tensor | None = None,  # 0-dim bool: whether the masks are multiplied by the student's own
    sums: bool = False,
) -> ReceptiveStats:
    """The statistics of every MasKD loss (arXiv 2205.14589, equations 3-6), differentiable by autograd."""
    dtype, customized = compute_dtype(teacher[0].dtype), is_customized(customize, student)
    num_tokens = tokens[0].shape[0] if tokens else 0
    empty = torch.empty(0, dtype=dtype, device=teacher[0].device)
    levels: list[ReceptiveStats] = []
    for level, raw in enumerate(teacher):
        t = raw.flatten(2).to(dtype)  # [N, C, P]
        e = tokens[level].to(dtype) if tokens else t.new_zeros(num_tokens, t.shape[1])
        masks = teacher_masks = (e @ t).sigmoid()  # [N, K, P]
        distance = error = empty
        if student:
            s = student[level].flatten(2).to(dtype)
            distance = (s - t).square().sum(1)  # [N, P]
            if customize is not None:
                student_masks = (e.detach() @ s.detach()).sigmoid()
                masks = masks * torch.where(customize, student_masks, torch.ones_like(student_masks))
            # In this order neither the sum nor a gradient overflows where a mask's share of the loss is large and
            # the mask small.
            error = (masks * (masks * distance[:, None])).sum(-1)
        levels.append(
            ReceptiveStats(
                masks,
                teacher_masks if customized else empty,
                distance,
                masks.sum(-1),
                error,
                masks @ masks.mT,
                tap_windows(raw.shape[2:], t) @ t.mT if sums else empty,
            )
        )
    return ReceptiveStats(
        masks=torch.cat([level.masks for level in levels], -1),
        teacher_masks=torch.cat([level.teacher_masks for level in levels], -1),
        distance=torch.cat([level.distance for level in levels], -1),
        mass=torch.stack([level.mass for level in levels]),
        error=torch.stack([level.error for level in levels]) if student else empty,
        gram=torch.stack([level.gram for level in levels]),
        sums=torch.cat([level.sums for level in levels], -1),
    )


def receptive_stats_backward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    saved: ReceptiveStats,
    grad: Sequence[Tensor | None],  # upstream, in the order of ReceptiveStats' fields
    needs: Sequence[bool],  # teacher, tokens, student
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of ``receptive_stats`` written out: the formulas that the kernels implement.

    With ``M`` the masks, ``M_T`` their teacher factor, ``D`` the distance and ``g`` the upstream gradients::

        d student = 2 (student - teacher) (sum_k g_error[k] M_k^2 + g_distance)
        d logit_k = M_k (1 - M_T,k) (g_mass[k] + 2 g_error[k] M_k D + sum_l (g_gram + g_gram^T)[k,l] M_l + g_masks[k])
        d tokens  = sum_{n,p} d logit_k teacher
        d teacher = -d student + sum_k tokens_k d logit_k + g_sums over the pixels each sum contains
    """
    grad_masks, _, grad_distance, grad_mass, grad_error, grad_gram, grad_sums = grad
    dtype = compute_dtype(teacher[0].dtype)
    pixels = [math.prod(t.shape[2:]) for t in teacher]
    channels = [t.shape[1] for t in teacher]

    def split(x: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
        return list(x.split(sizes, -1)) if x is not None and x.numel() else [None] * len(sizes)

    masks, teacher_masks = saved.masks.split(pixels, -1), split(saved.teacher_masks, pixels)
    distance, upstream_masks = split(saved.distance, pixels), split(grad_masks, pixels)
    upstream_distance, upstream_sums = split(grad_distance, pixels), split(grad_sums, channels)

    grad_teacher, grad_tokens, grad_student = [], [], []
    for level, raw in enumerate(teacher):
        t = raw.flatten(2).to(dtype)
        m = masks[level]  # [N, K, P]
        d, factor = distance[level], teacher_masks[level]
        g_masks, g_distance, g_sums = upstream_masks[level], upstream_distance[level], upstream_sums[level]
        d_teacher = torch.zeros_like(t)
        if student:
            s = student[level].flatten(2).to(dtype)
            coefficient = t.new_zeros(t.shape[0], t.shape[2])  # [N, P]
            if grad_error is not None:
                coefficient = coefficient + (grad_error[level][..., None] * m * m).sum(1)
            if g_distance is not None:
                coefficient = coefficient + g_distance
            d_student = 2 * coefficient[:, None] * (s - t)
            d_teacher = d_teacher - d_student
            if needs[2]:
                grad_student.append(d_student.reshape(raw.shape).to(student[level].dtype))
        if not (needs[0] or needs[1]):
            continue

        inner = torch.zeros_like(m)
        if grad_mass is not None:
            inner = inner + grad_mass[level][..., None]
        if grad_error is not None and d is not None:
            inner = inner + 2 * grad_error[level][..., None] * m * d[:, None]
        if grad_gram is not None:
            inner = inner + (grad_gram[level] + grad_gram[level].mT) @ m
        if g_masks is not None:
            inner = inner + g_masks
        d_logits = inner * m * (1 - (m if factor is None else factor))  # [N, K, P]
        if needs[1]:
            grad_tokens.append((d_logits @ t.mT).sum(0))
        if needs[0]:
            if tokens:
                d_teacher = d_teacher + tokens[level].to(dtype).mT @ d_logits
            if g_sums is not None:
                d_teacher = d_teacher + g_sums.mT @ tap_windows(raw.shape[2:], t)
            grad_teacher.append(d_teacher.reshape(raw.shape).to(raw.dtype))
    return grad_teacher, grad_tokens, grad_student


def published_maskd_loss(
    student: Tensor,  # [N, C, H, W]
    teacher: Tensor,  # [N, C, H, W]
    tokens: Tensor,  # [K, C]
    weighting: Sequence[Tensor] | None = None,  # conv_weight, conv_bias, projection_weight, projection_bias
    customize: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """One level of the MasKD loss as published (equations 3, 5 and 6), step by step, with its ``[N, K, C, H, W]``.

    Nothing simplified: what the fused loss is compared with, in tests and benches.
    """
    masks = (tokens @ teacher.flatten(2)).sigmoid().unflatten(-1, teacher.shape[2:])  # [N, K, H, W]
    if customize:
        with torch.no_grad():
            student_masks = (tokens @ student.flatten(2)).sigmoid().unflatten(-1, student.shape[2:])
        masks = masks * student_masks
    masked_student = student[:, None] * masks[:, :, None]  # [N, K, C, H, W]
    masked_teacher = teacher[:, None] * masks[:, :, None]
    error: Tensor = (masked_student - masked_teacher).square().sum((3, 4))  # [N, K, C]
    error = error / (masks.sum((2, 3)) + eps)[..., None]
    if weighting is None:
        return error.mean()
    conv_weight, conv_bias, projection_weight, projection_bias = weighting
    hidden = torch.nn.functional.conv2d(teacher, conv_weight, conv_bias, padding=1).mean((2, 3), keepdim=True)
    weights = torch.nn.functional.conv2d(hidden, projection_weight, projection_bias).flatten(1).softmax(-1)  # [N, K]
    loss: Tensor = (error.mean(-1) * weights).sum(-1).mean()
    return loss


# ---- scale_pixels ------------------------------------------------------------------------------


def scale_pixels(x: Sequence[Tensor], scale: Sequence[Tensor]) -> list[Tensor]:
    """``y = scale x``, per level: x ``[N, C, *spatial]``, scale ``[N, *spatial]`` in the compute dtype."""
    scaled = [level * s.unsqueeze(1) for level, s in zip(x, scale, strict=True)]
    return [y if y.dtype == level.dtype else y.to(level.dtype) for y, level in zip(scaled, x, strict=True)]


def scale_pixels_backward(
    x: Sequence[Tensor], scale: Sequence[Tensor], grad: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """``d x = scale g`` and ``d scale = sum_c x g``."""
    grad_x, grad_scale = [], []
    for level, s, g in zip(x, scale, grad, strict=True):
        if needs[0]:
            grad_x.append((g * s[:, None]).to(level.dtype))
        if needs[1]:
            grad_scale.append((g.to(s.dtype) * level).sum(1))
    return grad_x, grad_scale


# ---- squared_error -----------------------------------------------------------------------------


def squared_error(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor] = ()) -> Tensor:
    """``[L, N]``: ``sum_{c,p} (scale pred - target)^2``, with one scale ``[N, C]`` per level or none."""
    dtype = compute_dtype(pred[0].dtype)
    result = []
    for level, (raw, t) in enumerate(zip(pred, target, strict=True)):
        p = raw.flatten(2).to(dtype)
        if scale:
            p = p * scale[level][..., None]
        result.append((p - t.flatten(2).to(dtype)).square().sum((1, 2)))
    return torch.stack(result)


def squared_error_backward(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Tensor,  # [L, N]
    needs: Sequence[bool],  # pred, target, scale
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """With ``e = 2 g (scale pred - target)``: ``d pred = scale e``, ``d target = -e``, ``d scale = sum_p pred e``."""
    grad_pred, grad_target, grad_scale = [], [], []
    for level, (raw, target_raw) in enumerate(zip(pred, target, strict=True)):
        p, t = raw.flatten(2).to(grad.dtype), target_raw.flatten(2).to(grad.dtype)
        s = scale[level][..., None] if scale else p.new_ones(())
        e = 2 * grad[level][:, None, None] * (s * p - t)
        if needs[0]:
            grad_pred.append((s * e).reshape(raw.shape).to(raw.dtype))
        if needs[1]:
            grad_target.append((-e).reshape(raw.shape).to(target_raw.dtype))
        if needs[2]:
            grad_scale.append((p * e).sum(-1))
    return grad_pred, grad_target, grad_scale


# ---- attention_stats ---------------------------------------------------------------------------


def attention_stats(x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Per level ``[N, C, *spatial]``: ``sum_c |x| / C`` ``[N, *spatial]`` and the channels' means ``[N, C]``."""
    exact = [level.to(compute_dtype(level.dtype)) for level in x]
    means = [level.flatten(2).sum(-1) / max(math.prod(level.shape[2:]), 1) for level in exact]
    return [level.abs().mean(1) for level in exact], means


def attention_stats_backward(
    x: Sequence[Tensor], grad_attention: Sequence[Tensor | None], grad_mean: Sequence[Tensor | None]
) -> list[Tensor]:
    """``d x = sign(x) g_attention / C + g_mean / P``."""
    result = []
    for level, g_attention, g_mean in zip(x, grad_attention, grad_mean, strict=True):
        exact = level.to(compute_dtype(level.dtype))
        gradient = torch.zeros_like(exact)
        if g_attention is not None:
            gradient = gradient + exact.sign() * g_attention[:, None] / level.shape[1]
        if g_mean is not None:
            pixels = math.prod(level.shape[2:])
            gradient = gradient + g_mean.reshape(*g_mean.shape, *[1] * (level.dim() - 2)) / max(pixels, 1)
        result.append(gradient.to(level.dtype))
    return result
