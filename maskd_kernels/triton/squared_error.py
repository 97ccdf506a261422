"""Triton kernels of ``squared_error``. Equations and traffic: csrc/squared_error.h.

One program takes a tile of ``STREAM_P`` pixels of one image on one level and walks its channels. Sums over pixels are
written per tile and added in a fixed order, so that results are bitwise repeatable. 64-bit offsets; float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton.common import (
    NARROW_STREAM_C,
    STREAM_C,
    STREAM_P,
    STREAM_WARPS,
    WIDE,
    aligned,
    as_levels,
    feature_offsets,
    integer,
    level_of,
    new_partials,
    on_its_device,
    partial_row,
    pick,
    pointers,
    reduce_tiles,
    runs,
    strides_of,
)


@triton.jit
def forward_tile(
    pred,
    target,
    scale,
    partial,
    n,
    p,
    channels,
    pixels,
    pred_n,
    pred_stride,
    target_n,
    target_stride,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRED_INTERLEAVED: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    pred_n, pred_stride = aligned(pred_n, ALIGN), aligned(pred_stride, ALIGN)
    target_n, target_stride = aligned(target_n, ALIGN), aligned(target_stride, ALIGN)
    if PRED_INTERLEAVED or TARGET_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    if not (PRED_INTERLEAVED and TARGET_INTERLEAVED):
        pixels = aligned(pixels, ALIGN)
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
    tl.store(partial, tl.sum(total, 0))


@triton.jit
def forward_kernel(
    pred,  # tuple: [N, C, P]
    target,  # tuple: [N, C, P]
    scale,  # tuple: [N, C]
    partials,  # [N * tiles, 1]
    levels,
    pred_strides,
    target_strides,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRED_INTERLEAVED: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            forward_tile(
                pick(pred, level),
                pick(target, level),
                pick(scale, level),
                partials + partial_row(tile, n, level, levels),
                n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(pred_strides.image, level),
                integer(pred_strides.rest, level),
                integer(target_strides.image, level),
                integer(target_strides.rest, level),
                1 if narrow else WIDE,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                PRED_INTERLEAVED,
                TARGET_INTERLEAVED,
                HAS_SCALE,
            )


@triton.jit
def backward_tile(
    pred,
    target,
    scale,
    grad,
    grad_pred,
    grad_target,
    partial,
    n,
    p,
    channels,
    pixels,
    pred_n,
    pred_stride,
    target_n,
    target_stride,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRED_INTERLEAVED: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANT_PRED: tl.constexpr,
    WANT_TARGET: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    pred_n, pred_stride = aligned(pred_n, ALIGN), aligned(pred_stride, ALIGN)
    target_n, target_stride = aligned(target_n, ALIGN), aligned(target_stride, ALIGN)
    if PRED_INTERLEAVED or TARGET_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    if not (PRED_INTERLEAVED and TARGET_INTERLEAVED):
        pixels = aligned(pixels, ALIGN)
    grad_n, grad_stride = channels.to(tl.int64) * pixels, pixels
    if PRED_INTERLEAVED:
        grad_stride = channels
    inside = p < pixels
    g = 2 * tl.load(grad)
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
            tl.store(partial + c, tl.sum(value * e, 1), mask=c < channels)


@triton.jit(do_not_specialize=["row_size"])
def backward_kernel(
    pred,  # tuple: [N, C, P]
    target,  # tuple: [N, C, P]
    scale,  # tuple: [N, C]
    grad,  # [levels, N]
    grad_pred,  # tuple: [N, C, P], laid out like pred
    grad_target,  # tuple: [N, C, P], laid out like pred
    partials,  # [N * tiles, row_size] gradients of the scale
    levels,
    pred_strides,
    target_strides,
    row_size,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRED_INTERLEAVED: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANT_PRED: tl.constexpr,
    WANT_TARGET: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            backward_tile(
                pick(pred, level),
                pick(target, level),
                pick(scale, level),
                grad + level * tl.num_programs(1) + n,
                pick(grad_pred, level),
                pick(grad_target, level),
                partials + partial_row(tile, n, level, levels) * row_size,
                n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(pred_strides.image, level),
                integer(pred_strides.rest, level),
                integer(target_strides.image, level),
                integer(target_strides.rest, level),
                1 if narrow else WIDE,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                PRED_INTERLEAVED,
                TARGET_INTERLEAVED,
                HAS_SCALE,
                WANT_PRED,
                WANT_TARGET,
                WANT_SCALE,
            )


# ---- Launchers ---------------------------------------------------------------------------------


@on_its_device
def forward(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor], out: Tensor) -> None:
    maps, n = [tuple(map(layout.dense_view, level)) for level in zip(pred, target, strict=True)], pred[0].shape[0]
    for run, run_maps in runs(maps):
        levels, (p, t) = as_levels(run_maps, STREAM_P), zip(*run_maps, strict=True)
        partials = new_partials(levels, n, 1, out)
        if partials.numel():
            forward_kernel[sum(levels.tiles), n](
                pointers(p),
                pointers(t),
                tuple(scale[run]) if scale else (partials,) * len(p),
                partials,
                levels.encoded(),
                strides_of(p),
                strides_of(t),
                BLOCK_C=STREAM_C,
                NARROW_C=NARROW_STREAM_C,
                BLOCK_P=STREAM_P,
                PRED_INTERLEAVED=p[0].interleaved,
                TARGET_INTERLEAVED=t[0].interleaved,
                HAS_SCALE=bool(scale),
                num_warps=STREAM_WARPS,
            )
        reduce_tiles(partials, out[run].unbind(), levels, [1] * len(p), n)


@on_its_device
def backward(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Tensor,  # [L, N]
    grad_pred: Sequence[Tensor],  # none: not wanted
    grad_target: Sequence[Tensor],  # likewise
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    maps, n = [tuple(map(layout.dense_view, level)) for level in zip(pred, target, strict=True)], pred[0].shape[0]
    for run, run_maps in runs(maps):
        levels, (p, t) = as_levels(run_maps, STREAM_P), zip(*run_maps, strict=True)
        row_size = max(levels.channels) if grad_scale else 0
        partials = new_partials(levels, n, row_size, grad)
        if n and sum(levels.tiles):
            backward_kernel[sum(levels.tiles), n](
                pointers(p),
                pointers(t),
                tuple(scale[run]) if scale else (grad,) * len(p),
                grad[run],
                tuple(grad_pred[run]) if grad_pred else pointers(p),
                tuple(grad_target[run]) if grad_target else pointers(p),
                partials,
                levels.encoded(),
                strides_of(p),
                strides_of(t),
                row_size,
                BLOCK_C=STREAM_C,
                NARROW_C=NARROW_STREAM_C,
                BLOCK_P=STREAM_P,
                PRED_INTERLEAVED=p[0].interleaved,
                TARGET_INTERLEAVED=t[0].interleaved,
                HAS_SCALE=bool(scale),
                WANT_PRED=bool(grad_pred),
                WANT_TARGET=bool(grad_target),
                WANT_SCALE=bool(grad_scale),
                num_warps=STREAM_WARPS,
            )
        if grad_scale:
            reduce_tiles(partials, grad_scale[run], levels, levels.channels, n)
