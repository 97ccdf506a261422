"""Triton kernels of ``squared_error``. Equations and traffic: csrc/squared_error.h. How they walk: blocks.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.triton import blocks
from maskd_kernels.triton.common import is_wide, of_run, partial_row, reduce_tiles
from maskd_kernels.triton.launch import recalled, unbind


@triton.jit
def forward_kernel(
    maps,  # target, pred
    levels,
    scale,  # tuple: [N, C]; None: 1
    partials,  # [N * tiles, 1]
    STEPS: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            CHANNELS: tl.constexpr = STEP.CHANNELS
            tile = blocks.tile_of(tl.program_id(0), tl.program_id(1), levels, 0, STEP)
            total = blocks.zeros(STEP.VECTOR, STEP)
            if scale is not None:
                factors = blocks.of_channels(scale, tile)
            target, pred = blocks.source(maps, 0, tile, STEP), blocks.source(maps, 1, tile, STEP)
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                goal = blocks.read_block(target, tile, start, 0, STEP)
                value = blocks.read_block(pred, tile, start, 0, STEP)
                if scale is not None:
                    factor = blocks.read_channels(factors, 0, CHANNELS, tile, start, STEP)
                    factors += STEP.GROUPS * STEP.CHANNELS
                for j in tl.static_range(CHANNELS):
                    e = goal[j] - (value[j] if scale is None else value[j] * factor[j])
                    total += e * e
                target, pred = blocks.next_channels(target), blocks.next_channels(pred)
            to = partials + partial_row(tl.program_id(0), tile.n, tile.level, levels)
            tl.store(to, tl.sum(tl.sum(tl.sum(total, 2), 1), 0))


@triton.jit(do_not_specialize=["row_size"])
def backward_kernel(
    maps,  # target, pred
    levels,
    scale,  # tuple: [N, C]; None: 1
    grad,  # [levels, N]
    grad_pred,  # tuple: [N, C, P], laid out like pred; None: not wanted
    grad_target,  # likewise
    partials,  # [N * tiles, row_size] gradients of scale; None: not wanted
    row_size,
    STEPS: tl.constexpr,
):
    index, n = blocks.from_last()
    first_channel, some = blocks.channels_from(index, levels, STEPS)
    for narrow in tl.static_range(2):
        if some & (is_wide(index, levels, STEPS.WIDE.SPAN) != narrow):
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            CHANNELS: tl.constexpr = STEP.CHANNELS
            SIZE: tl.constexpr = STEP.COLUMNS * STEP.VECTOR * STEP.PARTS
            tile = blocks.tile_of(index, n, levels, first_channel, STEP)
            g = 2 * tl.load(grad + tile.level * tl.num_programs(1) + tile.n)
            target, pred = blocks.source(maps, 0, tile, STEP), blocks.source(maps, 1, tile, STEP)
            if grad_pred is not None:
                to_pred = blocks.destination(grad_pred, tile, STEP)
            if grad_target is not None:
                to_target = blocks.destination(grad_target, tile, STEP)
            if scale is not None:
                factors = blocks.of_channels(scale, tile)
                factor = blocks.read_channels(factors, 0, CHANNELS, tile, 0, STEP)
            sums, totals = (blocks.zeros(1, STEP),) * CHANNELS, ()
            for start in range(0, tl.minimum(tile.pixels - tile.first, STEP.SPAN), SIZE):
                goal = blocks.read_block(target, tile, 0, start, STEP)
                value = blocks.read_block(pred, tile, 0, start, STEP)
                d_pred, d_target = (), ()
                for m in tl.static_range(len(value)):
                    e = goal[m] - (value[m] if scale is None else value[m] * factor[m % CHANNELS])
                    d_pred += (e * (-g if scale is None else -g * factor[m % CHANNELS]),)
                    d_target += (g * e,)
                    if partials is not None:
                        sums = sums[1:] + (sums[0] + tl.sum(value[m] * e, 2, keep_dims=True),)
                if grad_pred is not None:
                    blocks.write_block(to_pred, d_pred, tile, 0, start, STEP)
                    to_pred = blocks.next_pixels(to_pred)
                if grad_target is not None:
                    blocks.write_block(to_target, d_target, tile, 0, start, STEP)
                    to_target = blocks.next_pixels(to_target)
                target, pred = blocks.next_pixels(target), blocks.next_pixels(pred)
            if partials is not None:
                to = partials + partial_row(index, tile.n, tile.level, levels) * row_size
                for j in tl.static_range(CHANNELS):
                    totals += (blocks.over_pixels(sums[j], STEP) * -g,)
                blocks.write_channels(to, totals, tile, 0, STEP)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor], out: Tensor) -> None:
    for run in blocks.runs_of(target, pred):
        partials = run.partials(1)
        run.launch(forward_kernel, run.of(scale), partials)
        reduce_tiles(partials, unbind(of_run(out, run.part)), run.levels, [1] * len(run.levels.tiles), run.images)


@recalled
def backward(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Tensor,  # [L, N]
    grad_pred: Sequence[Tensor],  # none: not wanted
    grad_target: Sequence[Tensor],  # likewise
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    for run in blocks.runs_of(target, pred, step=blocks.pixel_step):
        row_size = max(run.levels.channels)
        partials = run.partials(row_size) if grad_scale else None
        run.launch(
            backward_kernel,
            run.of(scale),
            of_run(grad, run.part),
            run.of(grad_pred),
            run.of(grad_target),
            partials,
            row_size,
            grid=run.grid(channels=True),
        )
        if partials is not None:
            reduce_tiles(partials, grad_scale[run.part], run.levels, run.levels.channels, run.images)
