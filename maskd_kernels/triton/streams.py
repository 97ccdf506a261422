"""How the kernels that only stream walk a level: rows one after another, columns in registers.

Columns lie along the axis that is dense in memory: a planar map is walked channel by channel for a tile of pixels, an
interleaved one pixel by pixel with all channels. So what is summed along the walk stays in registers, element by
element, until the walk ends; what is summed along a row is summed within a warp, whose lanes lie along the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from maskd_kernels.triton.common import WIDE, aligned, integer, level_of, pick

STREAM_PIXELS = 128  # of a tile
STREAM_WARPS = 4
THREAD_ELEMENTS = 16  # of one step
NARROW_WIDTH = tl.constexpr(32)  # where rows are not whole vectors: one element a lane


class Shape(NamedTuple):
    """Of a step, as constants of a kernel: [ROWS, PARTS, WIDTH], columns lie ``WIDTH`` apart from part to part."""

    PARTS: int
    ROWS: int
    WIDTH: int
    INTERLEAVED: bool
    EVEN: bool  # channels fill whole steps, and need no mask


class Walk(NamedTuple):
    """A program's share of a level."""

    level: Any
    n: Any  # int64
    channels: Any
    pixels: Any
    first: Any  # rows
    last: Any
    start: Any  # the first column
    column: Any  # [PARTS, WIDTH]
    exists: Any  # [PARTS, WIDTH]


class Plane(NamedTuple):
    """A map of a level, where a program's walk begins."""

    pointer: Any
    offsets: Any  # [ROWS, PARTS, WIDTH] of a step's elements; of pairs, as int32, where bfloat16 is read
    step: Any  # elements, or pairs, from one step's to the next's


@triton.jit
def is_wide(tile, levels, PIXELS: tl.constexpr):
    """Whether this tile's rows are whole vectors and all of its pixels are there: 1 or 0."""
    level = level_of(tile, levels)
    end = (tile - integer(levels.first_tile, level) + 1) * PIXELS
    return integer(levels.wide, level) & (end <= integer(levels.pixels, level)).to(tl.int32)


@triton.jit
def walk_of(levels, NARROW: tl.constexpr, SHAPE: tl.constexpr, PIXELS: tl.constexpr):
    """This program's walk; ``NARROW``: element by element, where pixels are missing or rows are not whole vectors."""
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    start = (tile - integer(levels.first_tile, level)) * PIXELS
    channels, pixels = integer(levels.channels, level), integer(levels.pixels, level)
    WIDTH: tl.constexpr = NARROW_WIDTH if NARROW else SHAPE[2]
    PARTS: tl.constexpr = SHAPE[0] * SHAPE[2] // WIDTH
    column = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if SHAPE[3]:
        if not NARROW:
            channels = aligned(channels, WIDE)
        first, last, columns = start, tl.minimum(start + PIXELS, pixels), channels
        start = 0
    else:
        if not NARROW:
            pixels = aligned(pixels, WIDE)
        column += start
        first, last, columns = 0, channels, pixels
    if (SHAPE[3] and not SHAPE[4]) or (NARROW and not SHAPE[3]):
        exists = column < columns
    else:
        exists = tl.full(column.shape, 1, tl.int1)
    return Walk(level, n, channels, pixels, first, last, start, column, exists)


@triton.jit
def source(pointers, strides, walk, NARROW: tl.constexpr, SHAPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A map of the walk's level, to be read."""
    if pick(pointers, walk.level).dtype.element_ty != tl.bfloat16 or NARROW or not SHAPE[4] or SHAPE[3] != INTERLEAVED:
        plane = destination(pointers, strides, walk, NARROW, SHAPE, INTERLEAVED)
    else:
        # In pairs, as the compiler's own way of widening two elements that lie together takes three instructions.
        PAIR: tl.constexpr = WIDE // 2
        stride_n = aligned(integer(strides.image, walk.level) // 2, PAIR)
        stride = aligned(integer(strides.rest, walk.level) // 2, PAIR)
        column = tl.arange(0, SHAPE[0])[:, None] * (SHAPE[2] // 2) + tl.arange(0, SHAPE[2] // 2)[None, :]
        column += aligned(walk.start // 2, PAIR)
        pointer = pick(pointers, walk.level).to(tl.pointer_type(tl.int32), bitcast=True)
        plane = plane_at(pointer, stride_n, stride, walk, column, SHAPE, INTERLEAVED)
    return plane


@triton.jit
def destination(pointers, strides, walk, NARROW: tl.constexpr, SHAPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A map of the walk's level, to be written."""
    stride_n, stride = integer(strides.image, walk.level), integer(strides.rest, walk.level)
    if not NARROW:
        stride_n, stride = aligned(stride_n, WIDE), aligned(stride, WIDE)
    return plane_at(pick(pointers, walk.level), stride_n, stride, walk, walk.column, SHAPE, INTERLEAVED)


@triton.jit
def plane_at(pointer, stride_n, stride, walk, column, SHAPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A map with these strides, of images and of the axis that is not dense."""
    row = tl.arange(0, SHAPE[1])[:, None, None].to(tl.int64)
    pointer += walk.n * stride_n
    if SHAPE[3] == INTERLEAVED:
        pointer += walk.first * stride.to(tl.int64)
        offsets, step = row * stride + column[None, :, :], SHAPE[1] * stride.to(tl.int64)
    else:
        pointer += walk.first
        offsets, step = row + column[None, :, :].to(tl.int64) * stride, tl.full([], SHAPE[1], tl.int64)
    return Plane(pointer, offsets, step)


@triton.jit
def dense_destination(pointers, walk, SHAPE: tl.constexpr):
    """A dense map of the walk's level, laid out as it is walked, to be written."""
    stride = walk.pixels
    if SHAPE[3]:
        stride = walk.channels
    stride_n = walk.channels.to(tl.int64) * walk.pixels
    return plane_at(pick(pointers, walk.level), stride_n, stride, walk, walk.column, SHAPE, SHAPE[3])


@triton.jit
def rows(walk, SHAPE: tl.constexpr):
    """The rows of the walk's first step."""
    return walk.first + tl.arange(0, SHAPE[1])


@triton.jit
def present(start, walk, NARROW: tl.constexpr, SHAPE: tl.constexpr):
    """Which rows of a step there are, [ROWS]."""
    if (NARROW and SHAPE[3]) or not (SHAPE[3] or SHAPE[4]):
        result = start + tl.arange(0, SHAPE[1]) < walk.last
    else:
        result = tl.full([SHAPE[1]], 1, tl.int1)
    return result


@triton.jit
def accumulator(walk, SHAPE: tl.constexpr):
    """Zeros, [ROWS, PARTS, WIDTH]."""
    return tl.full([SHAPE[1], walk.column.shape[0], walk.column.shape[1]], 0.0, tl.float32)


@triton.jit
def read(pointers, valid):
    """Elements in float32; 0 where there are none."""
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def read_step(pointer, offsets, valid):
    """A step's elements in float32, of what ``source`` gives; 0 where there are none."""
    if pointer.dtype.element_ty == tl.int32:
        both = tl.load(pointer + offsets)
        value = tl.reshape(tl.join(both << 16, both & -65536), valid.shape).to(tl.float32, bitcast=True)
    else:
        value = read(pointer + offsets, valid)
    return value


@triton.jit
def write_step(pointer, offsets, value, valid):
    """A step's elements, in the dtype of the memory."""
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=valid)


@triton.jit
def along_columns(pointer, walk):
    """What each column has one of, [1, PARTS, WIDTH]."""
    return read(pointer + walk.column, walk.exists)[None, :, :]


@triton.jit
def across_columns(value):
    """Sums of [ROWS, PARTS, WIDTH] over columns: those of a lane, then within a warp."""
    return tl.sum(tl.reshape(value, [value.shape[0], value.shape[1] * value.shape[2]]), 1)


# ---- Launchers ---------------------------------------------------------------------------------


def shape_of(channels: Sequence[int], element_size: int, interleaved: bool, sums_rows: bool = False) -> Shape:
    """A thread reads 128 bits at a time, and a step has ``THREAD_ELEMENTS`` of each thread, unless rows are long.

    Few lanes along a row, where sums of rows are wanted: they are added up across lanes at every step.
    """
    columns, vector, elements = max(channels) if interleaved else STREAM_PIXELS, 16 // element_size, THREAD_ELEMENTS
    if interleaved:
        lanes = 16 if columns <= 64 * vector else 32
    elif sums_rows:  # all that a thread reads is of one row
        elements = 4 * vector
        lanes = columns // elements
    else:
        lanes = 8
    width = min(lanes * vector, max(triton.next_power_of_2(columns), NARROW_WIDTH.value))
    parts = triton.next_power_of_2(triton.cdiv(columns, width))
    rows = max(elements * 32 * STREAM_WARPS // (parts * width), STREAM_WARPS)
    even = all(c % (parts * width if interleaved else rows) == 0 for c in channels)
    return Shape(parts, rows, width, interleaved, even)
