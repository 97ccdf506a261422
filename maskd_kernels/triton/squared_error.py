"""Triton kernels of ``squared_error``. Equations and traffic: csrc/squared_error.h.

One program takes a tile of ``STREAM_PIXELS`` pixels of one image on one level, see streams.py. Sums over pixels are
written per tile and added in a fixed order, so that results are bitwise repeatable. 64-bit offsets; float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton.common import (
    as_levels,
    new_partials,
    of_run,
    partial_row,
    pick,
    pointers,
    reduce_tiles,
    runs,
    strides_of,
)
from maskd_kernels.triton.launch import launch, recalled, unbind
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
    pred,
    target,
    scale,
    partials,
    levels,
    pred_strides,
    target_strides,
    NARROW: tl.constexpr,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    walk = walk_of(levels, NARROW, SHAPE, PIXELS)
    p = source(pred, pred_strides, walk, NARROW, SHAPE, SHAPE[3])
    t = source(target, target_strides, walk, NARROW, SHAPE, TARGET_INTERLEAVED)
    p_at, t_at, total = p.pointer, t.pointer, accumulator(walk, SHAPE)
    factors = pick(scale, walk.level) + walk.n * walk.channels
    row = factors + rows(walk, SHAPE)
    if HAS_SCALE and SHAPE[3]:
        factor = along_columns(factors, walk)
    for start in range(walk.first, walk.last, SHAPE[1]):
        in_row = present(start, walk, NARROW, SHAPE)
        valid = in_row[:, None, None] & walk.exists[None, :, :]
        e = read_step(p_at, p.offsets, valid)
        goal = read_step(t_at, t.offsets, valid)
        if HAS_SCALE and not SHAPE[3]:
            factor = read(row, in_row)[:, None, None]
        if HAS_SCALE:
            e *= factor
        e = goal - e
        total += e * e
        row += SHAPE[1]
        p_at += p.step
        t_at += t.step
    total = tl.sum(tl.sum(tl.sum(total, 1), 1), 0)
    tl.store(partials + partial_row(tl.program_id(0), walk.n, walk.level, levels), total)


@triton.jit
def forward_kernel(
    pred,  # tuple: [N, C, P]
    target,  # tuple: [N, C, P]
    scale,  # tuple: [N, C]
    partials,  # [N * tiles, 1]
    levels,
    pred_strides,
    target_strides,
    SHAPE: tl.constexpr,  # laid out like pred
    PIXELS: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, PIXELS) != narrow:
            forward_level(
                pred,
                target,
                scale,
                partials,
                levels,
                pred_strides,
                target_strides,
                narrow,
                SHAPE,
                PIXELS,
                TARGET_INTERLEAVED,
                HAS_SCALE,
            )


class Gradients(NamedTuple):
    """Where gradients go, of those that are wanted."""

    pred: Any  # tuple: [N, C, P], laid out like pred
    target: Any  # likewise
    scale: Any  # [N * tiles, row_size] of each tile


class Wanted(NamedTuple):
    pred: bool
    target: bool
    scale: bool


@triton.jit
def backward_level(
    pred,
    target,
    scale,
    grad,
    results,
    levels,
    pred_strides,
    target_strides,
    row_size,
    NARROW: tl.constexpr,
    SHAPE: tl.constexpr,
    PIXELS: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANTED: tl.constexpr,
):
    walk = walk_of(levels, NARROW, SHAPE, PIXELS)
    p = source(pred, pred_strides, walk, NARROW, SHAPE, SHAPE[3])
    t = source(target, target_strides, walk, NARROW, SHAPE, TARGET_INTERLEAVED)
    grad_p, grad_t = dense_destination(results.pred, walk, SHAPE), dense_destination(results.target, walk, SHAPE)
    p_at, t_at, grad_p_at, grad_t_at = p.pointer, t.pointer, grad_p.pointer, grad_t.pointer
    g = 2 * tl.load(grad + walk.level * tl.num_programs(1) + walk.n)
    partial = results.scale + partial_row(tl.program_id(0), walk.n, walk.level, levels) * row_size
    factors = pick(scale, walk.level) + walk.n * walk.channels
    r = rows(walk, SHAPE)
    total = accumulator(walk, SHAPE)
    if HAS_SCALE and SHAPE[3]:
        factor = along_columns(factors, walk)
    for start in range(walk.first, walk.last, SHAPE[1]):
        in_row = present(start, walk, NARROW, SHAPE)
        valid = in_row[:, None, None] & walk.exists[None, :, :]
        value = read_step(p_at, p.offsets, valid)
        goal = read_step(t_at, t.offsets, valid)
        if HAS_SCALE:
            if not SHAPE[3]:
                factor = read(factors + r, in_row)[:, None, None]
            e = goal - factor * value
            slope = factor * -g
        else:
            e = goal - value
            slope = -g
        if WANTED[0]:
            write_step(grad_p_at, grad_p.offsets, slope * e, valid)
        if WANTED[1]:
            write_step(grad_t_at, grad_t.offsets, g * e, valid)
        if WANTED[2]:
            if SHAPE[3]:
                total += value * e
            else:
                tl.store(partial + r, across_columns(value * e) * -g, mask=in_row)
        r += SHAPE[1]
        p_at += p.step
        t_at += t.step
        grad_p_at += grad_p.step
        grad_t_at += grad_t.step
    if WANTED[2] and SHAPE[3]:
        tl.store(partial + walk.column, tl.sum(total, 0) * -g, mask=walk.exists)


@triton.jit(do_not_specialize=["row_size"])
def backward_kernel(
    pred,  # tuple: [N, C, P]
    target,  # tuple: [N, C, P]
    scale,  # tuple: [N, C]
    grad,  # [levels, N]
    results,  # Gradients
    levels,
    pred_strides,
    target_strides,
    row_size,
    SHAPE: tl.constexpr,  # laid out like pred
    PIXELS: tl.constexpr,
    TARGET_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANTED: tl.constexpr,
):
    for narrow in tl.static_range(2):
        if is_wide(tl.program_id(0), levels, PIXELS) != narrow:
            backward_level(
                pred,
                target,
                scale,
                grad,
                results,
                levels,
                pred_strides,
                target_strides,
                row_size,
                narrow,
                SHAPE,
                PIXELS,
                TARGET_INTERLEAVED,
                HAS_SCALE,
                WANTED,
            )


# ---- Launchers ---------------------------------------------------------------------------------


@recalled
def forward(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor], out: Tensor) -> None:
    maps, n = [tuple(map(layout.dense_view, level)) for level in zip(pred, target, strict=True)], pred[0].shape[0]
    for run, run_maps in runs(maps):
        levels, (p, t) = as_levels(run_maps, STREAM_PIXELS), zip(*run_maps, strict=True)
        element_size = max(x[0].tensor.element_size() for x in (p, t))
        partials = new_partials(levels, n, 1, out)
        if partials.numel():
            launch(
                forward_kernel,
                (sum(levels.tiles), n),
                pointers(p),
                pointers(t),
                tuple(scale[run]) if scale else (partials,) * len(p),
                partials,
                levels.encoded(),
                strides_of(p),
                strides_of(t),
                SHAPE=shape_of(levels.channels, element_size, p[0].interleaved),
                PIXELS=STREAM_PIXELS,
                TARGET_INTERLEAVED=t[0].interleaved,
                HAS_SCALE=bool(scale),
                num_warps=STREAM_WARPS,
            )
        reduce_tiles(partials, unbind(of_run(out, run)), levels, [1] * len(p), n)


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
    maps, n = [tuple(map(layout.dense_view, level)) for level in zip(pred, target, strict=True)], pred[0].shape[0]
    for run, run_maps in runs(maps):
        levels, (p, t) = as_levels(run_maps, STREAM_PIXELS), zip(*run_maps, strict=True)
        row_size = max(levels.channels) if grad_scale else 0
        element_size = max(x[0].tensor.element_size() for x in (p, t))
        partials = new_partials(levels, n, row_size, grad)
        if n and sum(levels.tiles):
            launch(
                backward_kernel,
                (sum(levels.tiles), n),
                pointers(p),
                pointers(t),
                tuple(scale[run]) if scale else (grad,) * len(p),
                of_run(grad, run),
                Gradients(
                    tuple(grad_pred[run]) if grad_pred else pointers(p),
                    tuple(grad_target[run]) if grad_target else pointers(p),
                    partials,
                ),
                levels.encoded(),
                strides_of(p),
                strides_of(t),
                row_size,
                SHAPE=shape_of(levels.channels, element_size, p[0].interleaved, bool(grad_scale)),
                PIXELS=STREAM_PIXELS,
                TARGET_INTERLEAVED=t[0].interleaved,
                HAS_SCALE=bool(scale),
                WANTED=Wanted(bool(grad_pred), bool(grad_target), bool(grad_scale)),
                num_warps=STREAM_WARPS,
            )
        if grad_scale:
            reduce_tiles(partials, grad_scale[run], levels, levels.channels, n)
