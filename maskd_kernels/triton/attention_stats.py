"""Triton kernels of ``attention_stats``. Equations and traffic: csrc/attention_stats.h. How they walk: streams.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.triton import streams
from maskd_kernels.triton.common import is_wide, reduce_tiles
from maskd_kernels.triton.launch import recalled


@triton.jit(do_not_specialize=["row_size"])
def forward_kernel(
    maps,  # x
    levels,
    attention,  # tuple: [N, P]
    partials,  # [N * tiles, row_size] channel means
    row_size,
    SHAPES: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, streams.STREAM_PIXELS) != narrow:
            SHAPE: tl.constexpr = SHAPES.NARROW if narrow else SHAPES.WIDE
            walk = streams.walk_of(levels, SHAPE)
            x = streams.source(maps, 0, walk, SHAPE)
            strength = streams.per_pixel(attention, walk, SHAPE)
            mean = streams.partial_per_channel(partials, row_size, walk, SHAPE)
            strengths, means = streams.accumulator(SHAPE), streams.accumulator(SHAPE)
            for row in range(walk.first, walk.last, SHAPE.ROWS):
                step = streams.step_of(row, walk, SHAPE)
                value = streams.read_step(x, step)
                strengths = streams.add(strength, strengths, tl.abs(value), 1.0 / walk.channels, step)
                means = streams.add(mean, means, value, 1.0 / walk.pixels, step)
            streams.finish(strength, strengths, 1.0 / walk.channels, walk)
            streams.finish(mean, means, 1.0 / walk.pixels, walk)


@triton.jit
def backward_kernel(
    maps,  # x
    levels,
    grad_attention,  # tuple: [N, P]
    grad_mean,  # tuple: [N, C]
    grad_x,  # tuple: [N, C, P], laid out like x
    SHAPES: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, streams.STREAM_PIXELS) != narrow:
            SHAPE: tl.constexpr = SHAPES.NARROW if narrow else SHAPES.WIDE
            walk = streams.walk_of(levels, SHAPE)
            x, d_x = streams.source(maps, 0, walk, SHAPE), streams.destination(grad_x, walk, SHAPE)
            d_strength = streams.per_pixel(grad_attention, walk, SHAPE)
            d_mean = streams.per_channel(grad_mean, walk, SHAPE)
            strengths, means = streams.read_columns(d_strength, walk), streams.read_columns(d_mean, walk)
            for row in range(walk.first, walk.last, SHAPE.ROWS):
                step = streams.step_of(row, walk, SHAPE)
                value = streams.read_step(x, step)
                strength = streams.read_line(d_strength, strengths, step) * (1.0 / walk.channels)
                mean = streams.read_line(d_mean, means, step) * (1.0 / walk.pixels)
                streams.write_step(d_x, step, signed(strength, value) + mean)


@triton.jit
def signed(magnitude, value):
    """sign(value) * magnitude, in three instructions."""
    flipped = magnitude.to(tl.int32, bitcast=True) ^ (value.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(value == 0, 0.0, flipped.to(tl.float32, bitcast=True))


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(x: Sequence[Tensor], attention: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    for run in streams.runs_of(x, sums_rows=True):
        row_size = max(run.levels.channels)
        partials = run.partials(row_size)
        run.launch(forward_kernel, run.of(attention), partials, row_size)
        reduce_tiles(partials, run.of(mean), run.levels, run.levels.channels, run.images)


@recalled
def backward(
    x: Sequence[Tensor],
    grad_attention: Sequence[Tensor],
    grad_mean: Sequence[Tensor],
    grad_x: Sequence[Tensor],
) -> None:
    for run in streams.runs_of(x):
        run.launch(backward_kernel, run.of(grad_attention), run.of(grad_mean), run.of(grad_x))
