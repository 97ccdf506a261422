"""Triton kernels of ``scale_pixels``. Equations and traffic: csrc/scale_pixels.h.

One program takes a tile of ``STREAM_P`` pixels of one image on one level and walks its channels, so that the scale's
gradient stays in registers. 64-bit offsets; float32 arithmetic.
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
    on_its_device,
    pick,
    pointers,
    runs,
    strides_of,
)


@triton.jit
def forward_tile(
    x,
    scale,
    y,
    n,
    p,
    channels,
    pixels,
    x_n,
    x_stride,
    y_n,
    y_stride,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    x_n, x_stride = aligned(x_n, ALIGN), aligned(x_stride, ALIGN)
    y_n, y_stride = aligned(y_n, ALIGN), aligned(y_stride, ALIGN)
    if INTERLEAVED:
        channels = aligned(channels, ALIGN)
    else:
        pixels = aligned(pixels, ALIGN)
    inside = p < pixels
    s = tl.load(scale + n * pixels + p, mask=inside, other=0.0)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, x_n, x_stride, INTERLEAVED)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * s[None, :]
        at = feature_offsets(n, c, p, y_n, y_stride, INTERLEAVED)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def forward_kernel(
    x,  # tuple: [N, C, P]
    scale,  # tuple: [N, P]
    y,  # tuple: [N, C, P], laid out like x
    levels,
    x_strides,
    y_strides,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            forward_tile(
                pick(x, level),
                pick(scale, level),
                pick(y, level),
                n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(x_strides.image, level),
                integer(x_strides.rest, level),
                integer(y_strides.image, level),
                integer(y_strides.rest, level),
                1 if narrow else WIDE,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                INTERLEAVED,
            )


@triton.jit
def backward_tile(
    x,
    scale,
    grad_y,
    grad_x,
    grad_scale,
    n,
    p,
    channels,
    pixels,
    x_n,
    x_stride,
    grad_y_n,
    grad_y_stride,
    grad_x_n,
    grad_x_stride,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
    GRAD_Y_INTERLEAVED: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    x_n, x_stride = aligned(x_n, ALIGN), aligned(x_stride, ALIGN)
    grad_y_n, grad_y_stride = aligned(grad_y_n, ALIGN), aligned(grad_y_stride, ALIGN)
    grad_x_n, grad_x_stride = aligned(grad_x_n, ALIGN), aligned(grad_x_stride, ALIGN)
    if X_INTERLEAVED or GRAD_Y_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    if not (X_INTERLEAVED and GRAD_Y_INTERLEAVED):
        pixels = aligned(pixels, ALIGN)
    inside = p < pixels
    s = tl.load(scale + n * pixels + p, mask=inside, other=0.0)
    d_scale = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, grad_y_n, grad_y_stride, GRAD_Y_INTERLEAVED)
        g = tl.load(grad_y + at, mask=valid, other=0.0).to(tl.float32)
        if WANT_SCALE:
            at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
            d_scale += tl.sum(g * tl.load(x + at, mask=valid, other=0.0).to(tl.float32), 0)
        if WANT_X:
            at = feature_offsets(n, c, p, grad_x_n, grad_x_stride, X_INTERLEAVED)
            tl.store(grad_x + at, (g * s[None, :]).to(grad_x.dtype.element_ty), mask=valid)
    if WANT_SCALE:
        tl.store(grad_scale + n * pixels + p, d_scale, mask=inside)


@triton.jit
def backward_kernel(
    x,  # tuple: [N, C, P]
    scale,  # tuple: [N, P]
    grad_y,  # tuple: [N, C, P]
    grad_x,  # tuple: [N, C, P], laid out like x
    grad_scale,  # tuple: [N, P]
    levels,
    x_strides,
    grad_y_strides,
    grad_x_strides,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
    GRAD_Y_INTERLEAVED: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            backward_tile(
                pick(x, level),
                pick(scale, level),
                pick(grad_y, level),
                pick(grad_x, level),
                pick(grad_scale, level),
                n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(x_strides.image, level),
                integer(x_strides.rest, level),
                integer(grad_y_strides.image, level),
                integer(grad_y_strides.rest, level),
                integer(grad_x_strides.image, level),
                integer(grad_x_strides.rest, level),
                1 if narrow else WIDE,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                X_INTERLEAVED,
                GRAD_Y_INTERLEAVED,
                WANT_X,
                WANT_SCALE,
            )


# ---- Launchers ---------------------------------------------------------------------------------


@on_its_device
def forward(x: Sequence[Tensor], scale: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    maps = [(layout.dense_view(level), layout.dense_view(y)) for level, y in zip(x, out, strict=True)]
    for run, run_maps in runs(maps):
        levels, (a, y) = as_levels(run_maps, STREAM_P), zip(*run_maps, strict=True)
        if x[0].shape[0] and sum(levels.tiles):
            forward_kernel[sum(levels.tiles), x[0].shape[0]](
                pointers(a),
                tuple(scale[run]),
                pointers(y),
                levels.encoded(),
                strides_of(a),
                strides_of(y),
                BLOCK_C=STREAM_C,
                NARROW_C=NARROW_STREAM_C,
                BLOCK_P=STREAM_P,
                INTERLEAVED=a[0].interleaved,
                num_warps=STREAM_WARPS,
            )


@on_its_device
def backward(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_x: Sequence[Tensor],  # none: not wanted
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    maps = [tuple(map(layout.dense_view, level)) for level in zip(x, grad, grad_x or x, strict=True)]
    for run, run_maps in runs(maps):
        levels, (a, g, result) = as_levels(run_maps, STREAM_P), zip(*run_maps, strict=True)
        if x[0].shape[0] and sum(levels.tiles):
            backward_kernel[sum(levels.tiles), x[0].shape[0]](
                pointers(a),
                tuple(scale[run]),
                pointers(g),
                pointers(result),
                tuple(grad_scale[run] if grad_scale else scale[run]),
                levels.encoded(),
                strides_of(a),
                strides_of(g),
                strides_of(result),
                BLOCK_C=STREAM_C,
                NARROW_C=NARROW_STREAM_C,
                BLOCK_P=STREAM_P,
                X_INTERLEAVED=a[0].interleaved,
                GRAD_Y_INTERLEAVED=g[0].interleaved,
                WANT_X=bool(grad_x),
                WANT_SCALE=bool(grad_scale),
                num_warps=STREAM_WARPS,
            )
