"""Triton kernels of ``squared_error``. Equations and traffic: csrc/squared_error.h. How they walk: streams.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.triton import streams
from maskd_kernels.triton.common import is_wide, of_run, reduce_tiles
from maskd_kernels.triton.launch import recalled, unbind


class Wanted(NamedTuple):
    pred: bool
    target: bool
    scale: bool


@triton.jit
def forward_kernel(
    maps,  # pred, target
    levels,
    scale,  # tuple: [N, C]
    partials,  # [N * tiles, 1]
    HAS_SCALE: tl.constexpr,
    SHAPES: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, streams.STREAM_PIXELS) != narrow:
            SHAPE: tl.constexpr = SHAPES.NARROW if narrow else SHAPES.WIDE
            walk = streams.walk_of(levels, SHAPE)
            pred, target = streams.source(maps, 0, walk, SHAPE), streams.source(maps, 1, walk, SHAPE)
            factors, total = streams.per_channel(scale, walk, SHAPE), streams.accumulator(SHAPE)
            columns = streams.read_columns(factors, walk) if HAS_SCALE else 1.0
            for row in range(walk.first, walk.last, SHAPE.ROWS):
                step = streams.step_of(row, walk, SHAPE)
                value, goal = streams.read_step(pred, step), streams.read_step(target, step)
                factor = streams.read_line(factors, columns, step) if HAS_SCALE else 1.0
                e = goal - value * factor
                total += e * e
            tl.store(partials + walk.partial, tl.sum(tl.sum(tl.sum(total, 1), 1), 0))


@triton.jit(do_not_specialize=["row_size"])
def backward_kernel(
    maps,  # pred, target
    levels,
    scale,  # tuple: [N, C]
    grad,  # [levels, N]
    grad_pred,  # tuple: [N, C, P], laid out like pred
    grad_target,  # likewise
    partials,  # [N * tiles, row_size] gradients of scale
    row_size,
    HAS_SCALE: tl.constexpr,
    WANTED: tl.constexpr,
    SHAPES: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, streams.STREAM_PIXELS) != narrow:
            SHAPE: tl.constexpr = SHAPES.NARROW if narrow else SHAPES.WIDE
            walk = streams.walk_of(levels, SHAPE)
            pred, target = streams.source(maps, 0, walk, SHAPE), streams.source(maps, 1, walk, SHAPE)
            d_pred = streams.destination(grad_pred, walk, SHAPE)
            d_target = streams.destination(grad_target, walk, SHAPE)
            g = 2 * tl.load(grad + walk.level * tl.num_programs(1) + walk.n)
            factors = streams.per_channel(scale, walk, SHAPE)
            columns = streams.read_columns(factors, walk) if HAS_SCALE else 1.0
            d_factors, total = streams.partial_per_channel(partials, row_size, walk, SHAPE), streams.accumulator(SHAPE)
            for row in range(walk.first, walk.last, SHAPE.ROWS):
                step = streams.step_of(row, walk, SHAPE)
                value, goal = streams.read_step(pred, step), streams.read_step(target, step)
                factor = streams.read_line(factors, columns, step) if HAS_SCALE else 1.0
                e = goal - factor * value
                if WANTED.pred:
                    streams.write_step(d_pred, step, factor * -g * e)
                if WANTED.target:
                    streams.write_step(d_target, step, g * e)
                if WANTED.scale:
                    total = streams.add(d_factors, total, value * e, -g, step)
            if WANTED.scale:
                streams.finish(d_factors, total, -g, walk)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor], out: Tensor) -> None:
    for run in streams.runs_of(pred, target):
        partials = run.partials(1)
        run.launch(forward_kernel, run.of(scale or pred), partials, HAS_SCALE=bool(scale))
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
    wanted = Wanted(bool(grad_pred), bool(grad_target), bool(grad_scale))
    for run in streams.runs_of(pred, target, sums_rows=wanted.scale):
        row_size = max(run.levels.channels) if grad_scale else 0
        partials = run.partials(row_size)
        run.launch(
            backward_kernel,
            run.of(scale or pred),
            of_run(grad, run.part),
            run.of(grad_pred or pred),
            run.of(grad_target or pred),
            partials,
            row_size,
            HAS_SCALE=bool(scale),
            WANTED=wanted,
            maxnreg=None if wanted.target else run.shapes.REGISTERS,  # two maps to write take more
        )
        if grad_scale:
            reduce_tiles(partials, run.of(grad_scale), run.levels, run.levels.channels, run.images)
