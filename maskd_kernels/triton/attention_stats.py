"""Triton kernels of ``attention_stats``. Equations and traffic: csrc/attention_stats.h. How they walk: blocks.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.triton import blocks
from maskd_kernels.triton.common import is_wide, partial_row, reduce_tiles
from maskd_kernels.triton.launch import recalled


@triton.jit(do_not_specialize=["row_size"])
def forward_kernel(
    maps,  # x
    levels,
    attention,  # tuple: [N, P]
    partials,  # [N * tiles, row_size] channel means
    row_size,
    STEPS: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            CHANNELS: tl.constexpr = STEP.CHANNELS
            tile = blocks.tile_of(tl.program_id(0), tl.program_id(1), levels, 0, STEP)
            x, strength = blocks.source(maps, 0, tile, STEP), blocks.zeros(STEP.VECTOR, STEP)
            to = partials + partial_row(tl.program_id(0), tile.n, tile.level, levels) * row_size
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                value, means = blocks.read_block(x, tile, start, 0, STEP), ()
                for j in tl.static_range(CHANNELS):
                    strength += tl.abs(value[j])
                    means += (blocks.over_pixels(value[j], STEP) * (1.0 / tile.pixels),)
                blocks.write_channels(to, means, tile, start, STEP)
                x, to = blocks.next_channels(x), to + STEP.GROUPS * STEP.CHANNELS
            blocks.write_pixels(attention, strength, 1.0 / tile.end, tile, STEP)


@triton.jit
def backward_kernel(
    maps,  # x
    levels,
    grad_attention,  # tuple: [N, P]
    grad_mean,  # tuple: [N, C]
    grad_x,  # tuple: [N, C, P], laid out like x
    STEPS: tl.constexpr,
):
    index, n = blocks.from_last()
    for narrow in tl.static_range(2):
        if is_wide(index, levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            CHANNELS: tl.constexpr = STEP.CHANNELS
            tile = blocks.tile_of(index, n, levels, 0, STEP)
            strength = blocks.read_pixels(grad_attention, tile) * (1.0 / tile.end)
            x, to = blocks.source(maps, 0, tile, STEP), blocks.destination(grad_x, tile, STEP)
            means = blocks.of_channels(grad_mean, tile)
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                value, d_x = blocks.read_block(x, tile, start, 0, STEP), ()
                mean = blocks.read_channels(means, 0, CHANNELS, tile, start, STEP)
                for j in tl.static_range(CHANNELS):
                    d_x += (signed(strength, value[j]) + mean[j] * (1.0 / tile.pixels),)
                blocks.write_block(to, d_x, tile, start, 0, STEP)
                x, to, means = blocks.next_channels(x), blocks.next_channels(to), means + STEP.GROUPS * STEP.CHANNELS


@triton.jit
def signed(magnitude, value):
    """sign(value) * magnitude, in three instructions."""
    flipped = magnitude.to(tl.int32, bitcast=True) ^ (value.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(tl.abs(value) > 0, flipped.to(tl.float32, bitcast=True), 0.0)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(x: Sequence[Tensor], attention: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    for run in blocks.runs_of(x):
        row_size = max(run.levels.channels)
        partials = run.partials(row_size)
        run.launch(forward_kernel, run.of(attention), partials, row_size)
        reduce_tiles(partials, mean[run.part], run.levels, run.levels.channels, run.images)


@recalled
def backward(
    x: Sequence[Tensor],
    grad_attention: Sequence[Tensor],
    grad_mean: Sequence[Tensor],
    grad_x: Sequence[Tensor],
) -> None:
    for run in blocks.runs_of(x):
        run.launch(backward_kernel, run.of(grad_attention), run.of(grad_mean), run.of(grad_x))
