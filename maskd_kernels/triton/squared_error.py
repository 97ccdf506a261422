"""Triton kernels of ``squared_error``. Equations and traffic: csrc/squared_error.h.

One program takes a tile of ``STREAM_P`` pixels of one image and walks its channels. Sums over pixels are written per
tile and added in a fixed order, so that results are bitwise repeatable. 64-bit offsets; float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton.common import (
    STREAM_C,
    STREAM_P,
    STREAM_WARPS,
    alignment,
    feature_offsets,
    new_partials,
    reduce_tiles,
    tile_grid,
)

_COMMON = ["channels", "pixels", "pred_n", "pred_stride", "target_n", "target_stride"]


@triton.jit(do_not_specialize=_COMMON)
def forward_kernel(
    pred,  # [N, C, P]
    target,  # [N, C, P]
    scale,  # [N, C]
    partials,  # [N * tiles, 1]
    channels,
    pixels,
    pred_n,
    pred_stride,
    target_n,
    target_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    PRED_INTERLEAVED: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    pred_n, pred_stride = pred_n // ALIGN * ALIGN, pred_stride // ALIGN * ALIGN
    target_n, target_stride = target_n // ALIGN * ALIGN, target_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    inside = p < pixels
    total = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, pred_n, pred_stride, PRED_INTERLEAVED)
        e = tl.load(pred + at, mask=valid, other=0.0).to(tl.float32)
        if HAS_SCALE:
            e *= tl.load(scale + n * channels + c, mask=c < channels, other=0.0)[:, None]
        at = feature_offsets(n, c, p, target_n, target_stride, TARGET_INTERLEAVED)
        e -= tl.load(target + at, mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(e * e, 0)
    tl.store(partials + n * tl.num_programs(0) + tile, tl.sum(total, 0))


@triton.jit(do_not_specialize=_COMMON)
def backward_kernel(
    pred,  # [N, C, P]
    target,  # [N, C, P]
    scale,  # [N, C]
    grad,  # [N]
    grad_pred,  # [N, C, P], laid out like pred
    grad_target,  # [N, C, P], laid out like pred
    partials,  # [N * tiles, C] gradients of the scale
    channels,
    pixels,
    pred_n,
    pred_stride,
    target_n,
    target_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    PRED_INTERLEAVED: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANT_PRED: tl.constexpr,
    WANT_TARGET: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    pred_n, pred_stride = pred_n // ALIGN * ALIGN, pred_stride // ALIGN * ALIGN
    target_n, target_stride = target_n // ALIGN * ALIGN, target_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    grad_n, grad_stride = channels.to(tl.int64) * pixels, pixels
    if PRED_INTERLEAVED:
        grad_stride = channels
    inside = p < pixels
    g = 2 * tl.load(grad + n)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, pred_n, pred_stride, PRED_INTERLEAVED)
        value = tl.load(pred + at, mask=valid, other=0.0).to(tl.float32)
        at = feature_offsets(n, c, p, target_n, target_stride, TARGET_INTERLEAVED)
        goal = tl.load(target + at, mask=valid, other=0.0).to(tl.float32)
        s = tl.full([BLOCK_C], 1.0, tl.float32)
        if HAS_SCALE:
            s = tl.load(scale + n * channels + c, mask=c < channels, other=0.0)
        e = g * (s[:, None] * value - goal)
        at = feature_offsets(n, c, p, grad_n, grad_stride, PRED_INTERLEAVED)
        if WANT_PRED:
            tl.store(grad_pred + at, (s[:, None] * e).to(grad_pred.dtype.element_ty), mask=valid)
        if WANT_TARGET:
            tl.store(grad_target + at, (-e).to(grad_target.dtype.element_ty), mask=valid)
        if WANT_SCALE:
            to = (n * tl.num_programs(0) + tile) * channels + c
            tl.store(partials + to, tl.sum(value * e, 1), mask=c < channels)


# ---- Launchers ---------------------------------------------------------------------------------


def forward(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor], out: Tensor) -> None:
    for i, (raw, goal) in enumerate(zip(pred, target, strict=True)):
        p, t = layout.dense_view(raw), layout.dense_view(goal)
        n, channels, pixels = p.shape
        tiles, _ = grid = tile_grid(p, STREAM_P)
        partials = new_partials(p, n * tiles, 1)
        if raw.numel():
            forward_kernel[grid](
                p.tensor,
                t.tensor,
                scale[i] if scale else partials,
                partials,
                channels,
                pixels,
                p.stride[0],
                p.rest_stride,
                t.stride[0],
                t.rest_stride,
                BLOCK_C=STREAM_C,
                BLOCK_P=STREAM_P,
                **alignment(p, t),
                PRED_INTERLEAVED=p.interleaved,
                TARGET_INTERLEAVED=t.interleaved,
                HAS_SCALE=bool(scale),
                num_warps=STREAM_WARPS,
            )
        reduce_tiles(partials, out[i][:, None], n, tiles, 0, 1)


def backward(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Tensor,  # [L, N]
    grad_pred: Sequence[Tensor],  # none: not wanted
    grad_target: Sequence[Tensor],  # likewise
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    for i, (raw, goal) in enumerate(zip(pred, target, strict=True)):
        p, t = layout.dense_view(raw), layout.dense_view(goal)
        n, channels, pixels = p.shape
        tiles, _ = grid = tile_grid(p, STREAM_P)
        partials = new_partials(p, n * tiles, channels if grad_scale else 0)
        if raw.numel():
            backward_kernel[grid](
                p.tensor,
                t.tensor,
                scale[i] if scale else partials,
                grad[i],
                grad_pred[i] if grad_pred else p.tensor,
                grad_target[i] if grad_target else p.tensor,
                partials,
                channels,
                pixels,
                p.stride[0],
                p.rest_stride,
                t.stride[0],
                t.rest_stride,
                BLOCK_C=STREAM_C,
                BLOCK_P=STREAM_P,
                **alignment(p, t),
                PRED_INTERLEAVED=p.interleaved,
                TARGET_INTERLEAVED=t.interleaved,
                HAS_SCALE=bool(scale),
                WANT_PRED=bool(grad_pred),
                WANT_TARGET=bool(grad_target),
                WANT_SCALE=bool(grad_scale),
                num_warps=STREAM_WARPS,
            )
        if grad_scale:
            reduce_tiles(partials, grad_scale[i], n, tiles, 0, channels)
