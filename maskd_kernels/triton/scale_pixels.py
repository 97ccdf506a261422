"""Triton kernels of ``scale_pixels``. Equations and traffic: csrc/scale_pixels.h. How they walk: streams.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.triton import streams
from maskd_kernels.triton.common import is_wide
from maskd_kernels.triton.launch import recalled


class Wanted(NamedTuple):
    x: bool
    scale: bool


@triton.jit
def forward_kernel(
    maps,  # x
    levels,
    scale,  # tuple: [N, P]
    out,  # tuple: [N, C, P], laid out like x
    SHAPES: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, streams.STREAM_PIXELS) != narrow:
            SHAPE: tl.constexpr = SHAPES.NARROW if narrow else SHAPES.WIDE
            walk = streams.walk_of(levels, SHAPE)
            x, y = streams.source(maps, 0, walk, SHAPE), streams.destination(out, walk, SHAPE)
            factors = streams.per_pixel(scale, walk, SHAPE)
            columns = streams.read_columns(factors, walk)
            for row in range(walk.first, walk.last, SHAPE.ROWS):
                step = streams.step_of(row, walk, SHAPE)
                factor = streams.read_line(factors, columns, step)
                streams.write_step(y, step, streams.read_step(x, step) * factor)


@triton.jit
def backward_kernel(
    maps,  # x, grad_y
    levels,
    scale,  # tuple: [N, P]
    grad_x,  # tuple: [N, C, P], laid out like x
    grad_scale,  # tuple: [N, P]
    WANTED: tl.constexpr,
    SHAPES: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, streams.STREAM_PIXELS) != narrow:
            SHAPE: tl.constexpr = SHAPES.NARROW if narrow else SHAPES.WIDE
            walk = streams.walk_of(levels, SHAPE)
            x, grad_y = streams.source(maps, 0, walk, SHAPE), streams.source(maps, 1, walk, SHAPE)
            d_x = streams.destination(grad_x, walk, SHAPE)
            factors, d_factors = streams.per_pixel(scale, walk, SHAPE), streams.per_pixel(grad_scale, walk, SHAPE)
            columns, total = streams.read_columns(factors, walk), streams.accumulator(SHAPE)
            for row in range(walk.first, walk.last, SHAPE.ROWS):
                step = streams.step_of(row, walk, SHAPE)
                factor = streams.read_line(factors, columns, step)
                g = streams.read_step(grad_y, step)
                if WANTED.scale:
                    total = streams.add(d_factors, total, g * streams.read_step(x, step), 1.0, step)
                if WANTED.x:
                    streams.write_step(d_x, step, g * factor)
            if WANTED.scale:
                streams.finish(d_factors, total, 1.0, walk)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(x: Sequence[Tensor], scale: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for run in streams.runs_of(x):
        run.launch(forward_kernel, run.of(scale), run.of(out))


@recalled
def backward(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_x: Sequence[Tensor],  # none: not wanted
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    wanted = Wanted(bool(grad_x), bool(grad_scale))
    for run in streams.runs_of(x, grad):
        results = run.of(grad_x or x), run.of(grad_scale or scale)
        run.launch(backward_kernel, run.of(scale), *results, WANTED=wanted)
