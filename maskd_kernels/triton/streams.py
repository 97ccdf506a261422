"""How the kernels that only stream walk a level: rows one after another, columns in registers.

Columns lie along the axis that is dense in memory: a planar map is walked channel by channel for a tile of pixels, an
interleaved one pixel by pixel with all channels. So what is summed along the walk stays in registers, element by
element, until the walk ends; what is summed along a row is summed within a warp, whose lanes lie along the columns.

A kernel takes ``maps``, ``levels`` and, last, ``SHAPES``, as ``Run.launch`` passes them; between these its own. It
walks once with each shape, and where its tile is of the other kind not at all: ``is_wide``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton.common import (
    WIDE,
    Levels,
    Strides,
    aligned,
    as_levels,
    integer,
    level_of,
    new_partials,
    partial_row,
    pick,
    pointers,
    runs,
    strides_of,
)
from maskd_kernels.triton.launch import launch

STREAM_PIXELS = tl.constexpr(128)  # of a tile
STREAM_WARPS = 4
THREAD_ELEMENTS = 16  # of one step
NARROW_WIDTH = 32  # where rows are not whole vectors: one element a lane


class Shape(NamedTuple):
    """Of a step, as constants of a kernel: [ROWS, PARTS, WIDTH], columns lie ``WIDTH`` apart from part to part."""

    PARTS: int
    ROWS: int
    WIDTH: int
    ALIGN: int  # what divides the lengths of rows and the distances between them: whole vectors, or 1
    INTERLEAVED: bool  # as the walk goes; so is the first map
    LAYOUTS: tuple[bool, ...]  # which maps are interleaved
    ALL_ROWS: bool  # are there, in every step, and need no mask
    ALL_COLUMNS: bool


class Shapes(NamedTuple):
    WIDE: Shape  # where rows are whole vectors and pixels fill the tile
    NARROW: Shape


class Map(NamedTuple):
    """A map on each level, as kernels take it."""

    pointers: Any
    strides: Strides


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


class Step(NamedTuple):
    """Some rows of a walk."""

    first: Any
    row: Any  # [ROWS]
    exists: Any  # [ROWS]
    valid: Any  # [ROWS, PARTS, WIDTH]


class Plane(NamedTuple):
    """An image of a map, where the columns of a program's walk begin."""

    pointer: Any
    offsets: Any  # [ROWS, PARTS, WIDTH] of a step's elements; of pairs, as int32, where bfloat16 is read
    stride: Any  # elements, or pairs, from one row to the next


@triton.jit
def is_wide(tile, levels, PIXELS: tl.constexpr):
    """Whether this tile's rows are whole vectors and all of its pixels are there: 1 or 0."""
    level = level_of(tile, levels)
    end = (tile - integer(levels.first_tile, level) + 1) * PIXELS
    return integer(levels.wide, level) & (end <= integer(levels.pixels, level)).to(tl.int32)


@triton.jit
def walk_of(levels, SHAPE: tl.constexpr):
    """This program's walk."""
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    start = (tile - integer(levels.first_tile, level)) * STREAM_PIXELS
    channels, pixels = integer(levels.channels, level), integer(levels.pixels, level)
    column = tl.arange(0, SHAPE.PARTS)[:, None] * SHAPE.WIDTH + tl.arange(0, SHAPE.WIDTH)[None, :]
    if SHAPE.INTERLEAVED:
        channels = aligned(channels, SHAPE.ALIGN)
        first, last, columns = start, tl.minimum(start + STREAM_PIXELS, pixels), channels
        start = 0
    else:
        pixels = aligned(pixels, SHAPE.ALIGN)
        column += start
        first, last, columns = 0, channels, pixels
    exists = tl.full(column.shape, 1, tl.int1) if SHAPE.ALL_COLUMNS else column < columns
    return Walk(level, n, channels, pixels, first, last, start, column, exists)


@triton.jit
def step_of(first, walk, SHAPE: tl.constexpr):
    """The walk's step that begins with this row."""
    row = first + tl.arange(0, SHAPE.ROWS)
    exists = tl.full(row.shape, 1, tl.int1) if SHAPE.ALL_ROWS else row < walk.last
    return Step(first, row, exists, exists[:, None, None] & walk.exists[None, :, :])


# ---- Maps --------------------------------------------------------------------------------------


@triton.jit
def source(maps, i: tl.constexpr, walk, SHAPE: tl.constexpr):
    """One of the maps, to be read."""
    of, INTERLEAVED = maps[i], SHAPE.LAYOUTS[i]
    pointer = pick(of.pointers, walk.level)
    WHOLE: tl.constexpr = SHAPE.ALL_ROWS and SHAPE.ALL_COLUMNS and SHAPE.INTERLEAVED == INTERLEAVED
    PAIR: tl.constexpr = 2 if WHOLE and pointer.dtype.element_ty == tl.bfloat16 else 1
    if PAIR == 2:
        # In pairs, as the compiler's own way of widening two elements that lie together takes three instructions.
        pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    stride_n, stride = integer(of.strides.image, walk.level), integer(of.strides.rest, walk.level)
    return plane_at(pointer, stride_n, stride, walk, SHAPE, INTERLEAVED, PAIR)


@triton.jit
def destination(pointers, walk, SHAPE: tl.constexpr):
    """A dense map of the walk's level, laid out as it is walked, to be written."""
    stride = walk.channels if SHAPE.INTERLEAVED else walk.pixels
    stride_n = walk.channels.to(tl.int64) * walk.pixels
    return plane_at(pick(pointers, walk.level), stride_n, stride, walk, SHAPE, SHAPE.INTERLEAVED, 1)


@triton.jit
def plane_at(pointer, stride_n, stride, walk, SHAPE: tl.constexpr, INTERLEAVED: tl.constexpr, PAIR: tl.constexpr):
    """A map with these strides, of images and of the axis that is not dense."""
    ALIGN: tl.constexpr = max(SHAPE.ALIGN // PAIR, 1)
    WIDTH: tl.constexpr = SHAPE.WIDTH // PAIR
    pointer += walk.n * aligned(stride_n // PAIR, ALIGN)
    stride = aligned(stride // PAIR, ALIGN).to(tl.int64)
    row = tl.arange(0, SHAPE.ROWS)[:, None, None].to(tl.int64)
    column = tl.arange(0, SHAPE.PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    column = (column + aligned(walk.start // PAIR, ALIGN))[None, :, :]
    if SHAPE.INTERLEAVED == INTERLEAVED:
        plane = Plane(pointer, row * stride + column, stride)
    else:
        plane = Plane(pointer, row + column.to(tl.int64) * stride, tl.full([], 1, tl.int64))
    return plane


@triton.jit
def read(pointers, valid):
    """Elements in float32; 0 where there are none."""
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def read_step(plane, step):
    """A step's elements in float32, of a source; 0 where there are none."""
    at = plane.pointer + step.first * plane.stride + plane.offsets
    if plane.pointer.dtype.element_ty == tl.int32:
        both = tl.load(at)
        value = tl.reshape(tl.join(both << 16, both & -65536), step.valid.shape).to(tl.float32, bitcast=True)
    else:
        value = read(at, step.valid)
    return value


@triton.jit
def write_step(plane, step, value):
    """A step's elements, in the dtype of the memory."""
    at = plane.pointer + step.first * plane.stride + plane.offsets
    tl.store(at, value.to(plane.pointer.dtype.element_ty), mask=step.valid)


# ---- Lines: what pixels or channels have one of ------------------------------------------------
#
# In memory, where rows have one each: a pointer to the first row's. Where columns have: a pointer for each, [PARTS,
# WIDTH].


@triton.jit
def per_pixel(pointers, walk, SHAPE: tl.constexpr):
    """The line of the walk's level and image: tuple of [N, P]."""
    return line_at(pick(pointers, walk.level) + walk.n * walk.pixels, walk, SHAPE.INTERLEAVED)


@triton.jit
def per_channel(pointers, walk, SHAPE: tl.constexpr):
    """The line of the walk's level and image: tuple of [N, C]."""
    return line_at(pick(pointers, walk.level) + walk.n * walk.channels, walk, not SHAPE.INTERLEAVED)


@triton.jit
def partial_per_channel(partials, row_size, levels, walk, SHAPE: tl.constexpr):
    """The line of this program: [N * tiles, row_size]."""
    row = partial_row(tl.program_id(0), walk.n, walk.level, levels)
    return line_at(partials + row * row_size, walk, not SHAPE.INTERLEAVED)


@triton.jit
def line_at(pointer, walk, OF_ROWS: tl.constexpr):
    return pointer if OF_ROWS else pointer + walk.column


@triton.jit
def read_columns(line, walk):
    """What is read before the walk, for ``read_line``: of columns their numbers."""
    if len(line.shape) > 0:
        value = read(line, walk.exists)[None, :, :]
    else:
        value = 0.0
    return value


@triton.jit
def read_line(line, columns, step):
    """A step's numbers, to be broadcast."""
    if len(line.shape) > 0:
        value = columns
    else:
        value = read(line + step.row, step.exists)[:, None, None]
    return value


@triton.jit
def accumulator(SHAPE: tl.constexpr):
    """Zeros, [ROWS, PARTS, WIDTH]."""
    return tl.full([SHAPE.ROWS, SHAPE.PARTS, SHAPE.WIDTH], 0.0, tl.float32)


@triton.jit
def add(line, total, value, weight, step):
    """Sums of a step times ``weight``: those of rows are stored; those of columns go into the total, unweighted."""
    if len(line.shape) > 0:
        total += value
    else:
        # Sums of a lane, then within a warp.
        sums = tl.sum(tl.reshape(value, [value.shape[0], value.shape[1] * value.shape[2]]), 1)
        tl.store(line + step.row, sums * weight, mask=step.exists)
    return total


@triton.jit
def finish(line, total, weight, walk):
    """After the walk, what was added up of columns is stored, times ``weight``."""
    if len(line.shape) > 0:
        tl.store(line, tl.sum(total, 0) * weight, mask=walk.exists)


# ---- Launchers ---------------------------------------------------------------------------------


class Run(NamedTuple):
    """Levels that one launch handles, and the maps that are read."""

    part: slice  # of all levels
    images: int
    levels: Levels
    maps: tuple[Map, ...]
    shapes: Shapes

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Those of these levels."""
        return tuple(tensors[self.part])

    def partials(self, row_size: int, like: Tensor) -> Tensor:
        """Memory for one row of partial sums per tile and image."""
        return new_partials(self.levels, self.images, row_size, like)

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Unless there is nothing to walk."""
        grid = sum(self.levels.tiles), self.images
        if 0 not in grid:
            constants |= {"SHAPES": self.shapes, "num_warps": STREAM_WARPS}
            launch(kernel, grid, self.maps, self.levels.encoded(), *arguments, **constants)


def runs_of(*maps: Sequence[Tensor], sums_rows: bool = False) -> Iterator[Run]:
    """All levels of these maps, which are walked as the first is laid out."""
    levels_of_maps = [tuple(map(layout.dense_view, level)) for level in zip(*maps, strict=True)]
    for part, run in runs(levels_of_maps):
        levels, own = as_levels(run, STREAM_PIXELS.value), list(zip(*run, strict=True))
        layouts = tuple(level[0].interleaved for level in own)
        element_size = max(level[0].tensor.element_size() for level in own)
        shapes = shapes_of(levels.channels, element_size, layouts, sums_rows)
        yield Run(part, maps[0][0].shape[0], levels, tuple(Map(pointers(m), strides_of(m)) for m in own), shapes)


def shapes_of(
    channels: Sequence[int], element_size: int, layouts: tuple[bool, ...], sums_rows: bool
) -> Shapes:
    """A thread reads 128 bits at a time, and a step has ``THREAD_ELEMENTS`` of each thread, unless rows are long. Few
    lanes along a row, where sums of rows are wanted: they are added up across lanes at every step.
    """
    interleaved, vector, elements = layouts[0], 16 // element_size, THREAD_ELEMENTS
    columns = max(channels) if interleaved else STREAM_PIXELS.value
    if interleaved:
        lanes = 16 if columns <= 64 * vector else 32
    elif sums_rows:  # all that a thread reads is of one row
        elements = 4 * vector
        lanes = columns // elements
    else:
        lanes = 8
    width = min(lanes * vector, max(triton.next_power_of_2(columns), NARROW_WIDTH))
    parts = triton.next_power_of_2(triton.cdiv(columns, width))
    rows = max(elements * 32 * STREAM_WARPS // (parts * width), STREAM_WARPS)
    even = all(c % (parts * width if interleaved else rows) == 0 for c in channels)
    wide = Shape(
        parts,
        rows,
        width,
        ALIGN=WIDE.value,
        INTERLEAVED=interleaved,
        LAYOUTS=layouts,
        ALL_ROWS=interleaved or even,
        ALL_COLUMNS=even or not interleaved,
    )
    narrow = wide._replace(
        PARTS=parts * width // NARROW_WIDTH,
        WIDTH=NARROW_WIDTH,
        ALIGN=1,
        ALL_ROWS=even and not interleaved,
        ALL_COLUMNS=even and interleaved,
    )
    return Shapes(wide, narrow)
