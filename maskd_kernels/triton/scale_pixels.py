"""Triton kernels of ``scale_pixels``. Equations and traffic: csrc/scale_pixels.h. How they walk: blocks.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.triton import blocks
from maskd_kernels.triton.common import is_wide
from maskd_kernels.triton.launch import recalled


@triton.jit
def forward_kernel(
    maps,  # x
    levels,
    scale,  # tuple: [N, P]
    out,  # tuple: [N, C, P], laid out like x
    STEPS: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            tile = blocks.tile_of(tl.program_id(0), tl.program_id(1), levels, 0, STEP)
            factor = blocks.read_pixels(scale, tile)
            x, y = blocks.source(maps, 0, tile, STEP), blocks.destination(out, tile, STEP)
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                value, scaled = blocks.read_block(x, tile, start, 0, STEP), ()
                for m in tl.static_range(len(value)):
                    scaled += (value[m] * factor,)
                blocks.write_block(y, scaled, tile, start, 0, STEP)
                x, y = blocks.next_channels(x), blocks.next_channels(y)


@triton.jit
def backward_kernel(
    maps,  # grad_y, x
    levels,
    scale,  # tuple: [N, P]
    grad_x,  # tuple: [N, C, P], laid out like x; None: not wanted
    grad_scale,  # tuple: [N, P]; None: not wanted
    STEPS: tl.constexpr,
):
    index, n = blocks.from_last()
    for narrow in tl.static_range(2):
        if is_wide(index, levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            tile = blocks.tile_of(index, n, levels, 0, STEP)
            factor, total = blocks.read_pixels(scale, tile), blocks.zeros(STEP.VECTOR, STEP)
            grad, x = blocks.source(maps, 0, tile, STEP), blocks.source(maps, 1, tile, STEP)
            if grad_x is not None:
                to = blocks.destination(grad_x, tile, STEP)
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                g, d_x = blocks.read_block(grad, tile, start, 0, STEP), ()
                if grad_scale is not None:
                    value = blocks.read_block(x, tile, start, 0, STEP)
                for m in tl.static_range(len(g)):
                    if grad_scale is not None:
                        total += g[m] * value[m]
                    d_x += (g[m] * factor,)
                if grad_x is not None:
                    blocks.write_block(to, d_x, tile, start, 0, STEP)
                    to = blocks.next_channels(to)
                grad, x = blocks.next_channels(grad), blocks.next_channels(x)
            if grad_scale is not None:
                blocks.write_pixels(grad_scale, total, 1.0, tile, STEP)


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(x: Sequence[Tensor], scale: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for run in blocks.runs_of(x):
        run.launch(forward_kernel, run.of(scale), run.of(out))


@recalled
def backward(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_x: Sequence[Tensor],  # none: not wanted
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    for run in blocks.runs_of(grad, x):
        run.launch(backward_kernel, run.of(scale), run.of(grad_x), run.of(grad_scale))
