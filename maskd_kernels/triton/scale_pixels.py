"""Triton kernels of ``scale_pixels``. Equations and traffic: csrc/scale_pixels.h.

One program takes a tile of ``STREAM_PIXELS`` pixels of one image on one level, see streams.py. 64-bit offsets;
float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton.common import as_levels, pick, pointers, runs, strides_of
from maskd_kernels.triton.launch import launch, recalled
from maskd_kernels.triton.streams import (
    STREAM_PIXELS,
    STREAM_WARPS,
    accumulator,
    across_columns,
    along_columns,
    destination,
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
    x, scale, y, levels, x_strides, y_strides, NARROW: tl.constexpr, SHAPE: tl.constexpr, PIXELS: tl.constexpr
):
    walk = walk_of(levels, NARROW, SHAPE, PIXELS)
    a = source(x, x_strides, walk, NARROW, SHAPE, SHAPE[3])
    b = destination(y, y_strides, walk, NARROW, SHAPE, SHAPE[3])
    at, to = a.pointer, b.pointer
    factors = pick(scale, walk.level) + walk.n * walk.pixels
    row = factors + rows(walk, SHAPE)
    if not SHAPE[3]:
        factor = along_columns(factors, walk)
    for start in range(walk.first, walk.last, SHAPE[1]):
        in_row = present(start, walk, NARROW, SHAPE)
        valid = in_row[:, None, None] & walk.exists[None, :, :]
        if SHAPE[3]:
            factor = read(row, in_row)[:, None, None]
        value = read_step(at, a.offsets, valid) * factor
        write_step(to, b.offsets, value, valid)
        row += SHAPE[1]
        at += a.step
        to += b.step


@triton.jit
def forward_kernel(
    x,  # tuple: [N, C, P]
    scale,  # tuple: [N, P]
    y,  # tuple: [N, C, P], laid out like x
    levels,
    x_strides,
    y_strides,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, PIXELS) != narrow:
            forward_level(x, scale, y, levels, x_strides, y_strides, narrow, SHAPE, PIXELS)


class Maps(NamedTuple):
    """What the backward pass reads and writes, of each level; then their strides."""

    x: Any  # [N, C, P]
    grad_y: Any  # [N, C, P]
    grad_x: Any  # [N, C, P], laid out like x


class Wanted(NamedTuple):
    x: bool
    scale: bool


@triton.jit
def backward_level(
    maps,
    strides,
    scale,
    grad_scale,
    levels,
    NARROW: tl.constexpr,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
    GRAD_INTERLEAVED: tl.constexpr,
    WANTED: tl.constexpr,
):
    walk = walk_of(levels, NARROW, SHAPE, PIXELS)
    a = source(maps.x, strides.x, walk, NARROW, SHAPE, SHAPE[3])
    b = source(maps.grad_y, strides.grad_y, walk, NARROW, SHAPE, GRAD_INTERLEAVED)
    result = destination(maps.grad_x, strides.grad_x, walk, NARROW, SHAPE, SHAPE[3])
    a_at, b_at, to = a.pointer, b.pointer, result.pointer
    factors = pick(scale, walk.level) + walk.n * walk.pixels
    d_scale = pick(grad_scale, walk.level) + walk.n * walk.pixels
    row, sum_at = factors + rows(walk, SHAPE), d_scale + rows(walk, SHAPE)
    total = accumulator(walk, SHAPE)
    if not SHAPE[3]:
        factor = along_columns(factors, walk)
    for start in range(walk.first, walk.last, SHAPE[1]):
        in_row = present(start, walk, NARROW, SHAPE)
        valid = in_row[:, None, None] & walk.exists[None, :, :]
        g = read_step(b_at, b.offsets, valid)
        if WANTED[1]:
            product = g * read_step(a_at, a.offsets, valid)
            if SHAPE[3]:
                tl.store(sum_at, across_columns(product), mask=in_row)
            else:
                total += product
        if WANTED[0]:
            if SHAPE[3]:
                factor = read(row, in_row)[:, None, None]
            write_step(to, result.offsets, g * factor, valid)
        row += SHAPE[1]
        sum_at += SHAPE[1]
        a_at += a.step
        b_at += b.step
        to += result.step
    if WANTED[1] and not SHAPE[3]:
        tl.store(d_scale + walk.column, tl.sum(total, 0), mask=walk.exists)


@triton.jit
def backward_kernel(
    maps,  # Maps
    strides,  # Maps
    scale,  # tuple: [N, P]
    grad_scale,  # tuple: [N, P]
    levels,
    SHAPE: tl.constexpr,  # laid out like x
    PIXELS: tl.constexpr,
    GRAD_INTERLEAVED: tl.constexpr,
    WANTED: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, PIXELS) != narrow:
            backward_level(maps, strides, scale, grad_scale, levels, narrow, SHAPE, PIXELS, GRAD_INTERLEAVED, WANTED)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(x: Sequence[Tensor], scale: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    maps = [(layout.dense_view(level), layout.dense_view(y)) for level, y in zip(x, out, strict=True)]
    for run, run_maps in runs(maps):
        levels, (a, y) = as_levels(run_maps, STREAM_PIXELS), zip(*run_maps, strict=True)
        if x[0].shape[0] and sum(levels.tiles):
            launch(
                forward_kernel,
                (sum(levels.tiles), x[0].shape[0]),
                pointers(a),
                tuple(scale[run]),
                pointers(y),
                levels.encoded(),
                strides_of(a),
                strides_of(y),
                SHAPE=shape_of(levels.channels, a[0].tensor.element_size(), a[0].interleaved),
                PIXELS=STREAM_PIXELS,
                num_warps=STREAM_WARPS,
            )


@recalled
def backward(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_x: Sequence[Tensor],  # none: not wanted
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    maps = [tuple(map(layout.dense_view, level)) for level in zip(x, grad, grad_x or x, strict=True)]
    for run, run_maps in runs(maps):
        levels, (a, g, result) = as_levels(run_maps, STREAM_PIXELS), zip(*run_maps, strict=True)
        if x[0].shape[0] and sum(levels.tiles):
            launch(
                backward_kernel,
                (sum(levels.tiles), x[0].shape[0]),
                Maps(pointers(a), pointers(g), pointers(result)),
                Maps(strides_of(a), strides_of(g), strides_of(result)),
                tuple(scale[run]),
                tuple(grad_scale[run] if grad_scale else scale[run]),
                levels.encoded(),
                SHAPE=shape_of(levels.channels, a[0].tensor.element_size(), a[0].interleaved),
                PIXELS=STREAM_PIXELS,
                GRAD_INTERLEAVED=g[0].interleaved,
                WANTED=Wanted(bool(grad_x), bool(grad_scale)),
                num_warps=STREAM_WARPS,
            )
