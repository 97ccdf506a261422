"""Triton kernels of ``attention_stats``. Equations and traffic: csrc/attention_stats.h.

One program takes a tile of ``STREAM_PIXELS`` pixels of one image on one level, see streams.py. Sums over pixels are
written per tile and added in a fixed order, so that results are bitwise repeatable. 64-bit offsets; float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton.common import (
    as_levels,
    new_partials,
    partial_row,
    pick,
    pointers,
    reduce_tiles,
    runs,
    strides_of,
)
from maskd_kernels.triton.launch import launch, recalled
from maskd_kernels.triton.streams import (
    STREAM_PIXELS,
    STREAM_WARPS,
    accumulator,
    across_columns,
    along_columns,
    dense_destination,
    is_wide,
    present,
    read,
    read_step,
    rows,
    shape_of,
    source,
    walk_of,
    write_step,
)


@triton.jit
def forward_level(
    x, attention, partials, levels, x_strides, row_size, NARROW: tl.constexpr, SHAPE: tl.constexpr, PIXELS: tl.constexpr
):
    walk = walk_of(levels, NARROW, SHAPE, PIXELS)
    plane = source(x, x_strides, walk, NARROW, SHAPE, SHAPE[3])
    partial = partials + partial_row(tl.program_id(0), walk.n, walk.level, levels) * row_size
    strength = pick(attention, walk.level) + walk.n * walk.pixels
    at, total = plane.pointer, accumulator(walk, SHAPE)
    per_channel, per_pixel = 1.0 / walk.pixels, 1.0 / walk.channels
    if SHAPE[3]:
        row = strength + rows(walk, SHAPE)
    else:
        row = partial + rows(walk, SHAPE)
    for start in range(walk.first, walk.last, SHAPE[1]):
        in_row = present(start, walk, NARROW, SHAPE)
        valid = in_row[:, None, None] & walk.exists[None, :, :]
        value = read_step(at, plane.offsets, valid)
        if SHAPE[3]:
            total += value
            tl.store(row, across_columns(tl.abs(value)) * per_pixel, mask=in_row)
        else:
            total += tl.abs(value)
            tl.store(row, across_columns(value) * per_channel, mask=in_row)
        row += SHAPE[1]
        at += plane.step
    total = tl.sum(total, 0)
    if SHAPE[3]:
        tl.store(partial + walk.column, total * per_channel, mask=walk.exists)
    else:
        tl.store(strength + walk.column, total * per_pixel, mask=walk.exists)


@triton.jit(do_not_specialize=["row_size"])
def forward_kernel(
    x,  # tuple: [N, C, P]
    attention,  # tuple: [N, P]
    partials,  # [N * tiles, row_size] channel means
    levels,
    x_strides,
    row_size,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, PIXELS) != narrow:
            forward_level(x, attention, partials, levels, x_strides, row_size, narrow, SHAPE, PIXELS)


@triton.jit
def backward_level(
    x,
    grad_attention,
    grad_mean,
    grad_x,
    levels,
    x_strides,
    NARROW: tl.constexpr,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    walk = walk_of(levels, NARROW, SHAPE, PIXELS)
    plane, grad = source(x, x_strides, walk, NARROW, SHAPE, SHAPE[3]), dense_destination(grad_x, walk, SHAPE)
    at, to = plane.pointer, grad.pointer
    g_attention = pick(grad_attention, walk.level) + walk.n * walk.pixels
    g_mean = pick(grad_mean, walk.level) + walk.n * walk.channels
    per_channel, per_pixel = 1.0 / walk.pixels, 1.0 / walk.channels
    if SHAPE[3]:
        of_column = along_columns(g_mean, walk) * per_channel
        row = g_attention + rows(walk, SHAPE)
    else:
        row = g_mean + rows(walk, SHAPE)
        of_column = along_columns(g_attention, walk) * per_pixel
    for start in range(walk.first, walk.last, SHAPE[1]):
        in_row = present(start, walk, NARROW, SHAPE)
        valid = in_row[:, None, None] & walk.exists[None, :, :]
        value = read_step(at, plane.offsets, valid)
        if SHAPE[3]:
            of_row = read(row, in_row)[:, None, None] * per_pixel
            gradient = signed(of_row, value) + of_column
        else:
            of_row = read(row, in_row)[:, None, None] * per_channel
            gradient = signed(of_column, value) + of_row
        write_step(to, grad.offsets, gradient, valid)
        row += SHAPE[1]
        at += plane.step
        to += grad.step


@triton.jit
def signed(magnitude, value):
    """sign(value) * magnitude, in three instructions."""
    flipped = magnitude.to(tl.int32, bitcast=True) ^ (value.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(value == 0, 0.0, flipped.to(tl.float32, bitcast=True))


@triton.jit
def backward_kernel(
    x,  # tuple: [N, C, P]
    grad_attention,  # tuple: [N, P]
    grad_mean,  # tuple: [N, C]
    grad_x,  # tuple: [N, C, P], laid out like x
    levels,
    x_strides,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, PIXELS) != narrow:
            backward_level(x, grad_attention, grad_mean, grad_x, levels, x_strides, narrow, SHAPE, PIXELS)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(x: Sequence[Tensor], attention: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    maps, n = [(layout.dense_view(level),) for level in x], x[0].shape[0]
    for run, run_maps in runs(maps):
        levels, own = as_levels(run_maps, STREAM_PIXELS), [level[0] for level in run_maps]
        row_size = max(levels.channels)
        partials = new_partials(levels, n, row_size, x[0])
        if partials.numel():
            launch(
                forward_kernel,
                (sum(levels.tiles), n),
                pointers(own),
                tuple(attention[run]),
                partials,
                levels.encoded(),
                strides_of(own),
                row_size,
                SHAPE=shape_of(levels.channels, x[0].element_size(), own[0].interleaved, sums_rows=True),
                PIXELS=STREAM_PIXELS,
                num_warps=STREAM_WARPS,
            )
        reduce_tiles(partials, mean[run], levels, levels.channels, n)


@recalled
def backward(
    x: Sequence[Tensor],
    grad_attention: Sequence[Tensor],
    grad_mean: Sequence[Tensor],
    grad_x: Sequence[Tensor],
) -> None:
    maps, n = [(layout.dense_view(level),) for level in x], x[0].shape[0]
    for run, run_maps in runs(maps):
        levels, own = as_levels(run_maps, STREAM_PIXELS), [level[0] for level in run_maps]
        if n and sum(levels.tiles):
            launch(
                backward_kernel,
                (sum(levels.tiles), n),
                pointers(own),
                tuple(grad_attention[run]),
                tuple(grad_mean[run]),
                tuple(grad_x[run]),
                levels.encoded(),
                strides_of(own),
                SHAPE=shape_of(levels.channels, x[0].element_size(), own[0].interleaved),
                PIXELS=STREAM_PIXELS,
                num_warps=STREAM_WARPS,
            )
