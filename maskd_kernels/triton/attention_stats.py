"""Triton kernels of ``attention_stats``. Equations and traffic: csrc/attention_stats.h.

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
    x,
    attention,
    partial,
    n,
    p,
    channels,
    pixels,
    x_n,
    x_stride,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
):
    x_n, x_stride = aligned(x_n, ALIGN), aligned(x_stride, ALIGN)
    if X_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    else:
        pixels = aligned(pixels, ALIGN)
    inside = p < pixels
    strength = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        strength += tl.sum(tl.abs(value), 0)
        tl.store(partial + c, tl.sum(value, 1) / pixels, mask=c < channels)
    tl.store(attention + n * pixels + p, strength / channels, mask=inside)


@triton.jit(do_not_specialize=["row_size"])
def forward_kernel(
    x,  # tuple: [N, C, P]
    attention,  # tuple: [N, P]
    partials,  # [N * tiles, row_size] channel means
    levels,
    x_strides,
    row_size,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            forward_tile(
                pick(x, level),
                pick(attention, level),
                partials + partial_row(tile, n, level, levels) * row_size,
                n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(x_strides.image, level),
                integer(x_strides.rest, level),
                1 if narrow else WIDE,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                X_INTERLEAVED,
            )


@triton.jit
def backward_tile(
    x,
    grad_attention,
    grad_mean,
    grad_x,
    n,
    p,
    channels,
    pixels,
    x_n,
    x_stride,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
):
    x_n, x_stride = aligned(x_n, ALIGN), aligned(x_stride, ALIGN)
    if X_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    else:
        pixels = aligned(pixels, ALIGN)
    grad_n, grad_stride = channels.to(tl.int64) * pixels, pixels
    if X_INTERLEAVED:
        grad_stride = channels
    inside = p < pixels
    g_attention = tl.load(grad_attention + n * pixels + p, mask=inside, other=0.0) / channels
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        g_mean = tl.load(grad_mean + n * channels + c, mask=c < channels, other=0.0) / pixels
        sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
        at = feature_offsets(n, c, p, grad_n, grad_stride, X_INTERLEAVED)
        gradient = sign * g_attention[None, :] + g_mean[:, None]
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask=valid)


@triton.jit
def backward_kernel(
    x,  # tuple: [N, C, P]
    grad_attention,  # tuple: [N, P]
    grad_mean,  # tuple: [N, C]
    grad_x,  # tuple: [N, C, P], laid out like x
    levels,
    x_strides,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            backward_tile(
                pick(x, level),
                pick(grad_attention, level),
                pick(grad_mean, level),
                pick(grad_x, level),
                n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(x_strides.image, level),
                integer(x_strides.rest, level),
                1 if narrow else WIDE,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                X_INTERLEAVED,
            )


# ---- Launchers ---------------------------------------------------------------------------------


@on_its_device
def forward(x: Sequence[Tensor], attention: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    maps, n = [(layout.dense_view(level),) for level in x], x[0].shape[0]
    for run, run_maps in runs(maps):
        levels, own = as_levels(run_maps, STREAM_P), [level[0] for level in run_maps]
        row_size = max(levels.channels)
        partials = new_partials(levels, n, row_size, x[0])
        if partials.numel():
            forward_kernel[sum(levels.tiles), n](
                pointers(own),
                tuple(attention[run]),
                partials,
                levels.encoded(),
                strides_of(own),
                row_size,
                BLOCK_C=STREAM_C,
                NARROW_C=NARROW_STREAM_C,
                BLOCK_P=STREAM_P,
                X_INTERLEAVED=own[0].interleaved,
                num_warps=STREAM_WARPS,
            )
        reduce_tiles(partials, mean[run], levels, levels.channels, n)


@on_its_device
def backward(
    x: Sequence[Tensor], grad_attention: Sequence[Tensor], grad_mean: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    maps, n = [(layout.dense_view(level),) for level in x], x[0].shape[0]
    for run, run_maps in runs(maps):
        levels, own = as_levels(run_maps, STREAM_P), [level[0] for level in run_maps]
        if n and sum(levels.tiles):
            backward_kernel[sum(levels.tiles), n](
                pointers(own),
                tuple(grad_attention[run]),
                tuple(grad_mean[run]),
                tuple(out[run]),
                levels.encoded(),
                strides_of(own),
                BLOCK_C=STREAM_C,
                NARROW_C=NARROW_STREAM_C,
                BLOCK_P=STREAM_P,
                X_INTERLEAVED=own[0].interleaved,
                num_warps=STREAM_WARPS,
            )
