"""How the kernels that only stream walk a level: rows one after another, columns in registers.

One program takes a tile of ``STREAM_PIXELS`` pixels of one image on one level. Columns lie along the axis that is dense
in memory: a planar map is walked channel by channel for the tile's pixels, an interleaved one pixel by pixel with all
channels. So what is summed along the walk stays in registers, element by element, until the walk ends; what is summed
along a row is summed within a warp, whose lanes lie along the columns. Sums over pixels are written per tile and added
in a fixed order, so that results are bitwise repeatable. 64-bit offsets; float32 arithmetic.

Every kernel takes ``maps``, ``levels``, its own arguments and ``SHAPES``, as ``Run.launch`` passes them, and says what
it does with a step's elements; which axis lies along rows it need not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton import common
from maskd_kernels.triton.launch import launch

STREAM_PIXELS = tl.constexpr(128)  # of a tile
STREAM_WARPS = 4
THREAD_BYTES, THREAD_ELEMENTS = 128, 32  # a step of all maps that are read, and of each: a thread's at most
FEW_ELEMENTS = 16  # the latter where masks or scattered elements take registers too
# Of a thread: told so, the compiler has all loads of a step under way, and 16 warps fit; but with columns up to here.
REGISTERS, LONG_ROW = 128, 256
NARROW_WIDTH = 32  # where rows are not whole vectors: one element a lane, and half the rows as each has an address


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
    REGISTERS: int | None  # that a thread may take, where a step is sure to fit them


class Map(NamedTuple):
    """A map on each level, as kernels take it."""

    pointers: Any
    strides: common.Strides


class Walk(NamedTuple):
    """A program's share of a level."""

    level: Any
    n: Any  # int64
    channels: Any
    pixels: Any
    partial: Any  # the row of its partial sums
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

    pointer: Any  # [ROWS, 1, 1]; to pairs, as int32, where bfloat16 is read
    columns: Any  # [1, PARTS, WIDTH], elements or pairs
    stride: Any  # elements, or pairs, from one row to the next


@triton.jit
def walk_of(levels, SHAPE: tl.constexpr):
    """This program's walk."""
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = common.level_of(tile, levels)
    start = (tile - common.integer(levels.first_tile, level)) * STREAM_PIXELS
    channels, pixels = common.integer(levels.channels, level), common.integer(levels.pixels, level)
    column = tl.arange(0, SHAPE.PARTS)[:, None] * SHAPE.WIDTH + tl.arange(0, SHAPE.WIDTH)[None, :]
    if SHAPE.INTERLEAVED:
        channels = common.aligned(channels, SHAPE.ALIGN)
        first, last, columns = start, tl.minimum(start + STREAM_PIXELS, pixels), channels
        start = 0
    else:
        pixels = common.aligned(pixels, SHAPE.ALIGN)
        column += start
        first, last, columns = 0, channels, pixels
    exists = tl.full(column.shape, 1, tl.int1) if SHAPE.ALL_COLUMNS else column < columns
    partial = common.partial_row(tile, n, level, levels)
    return Walk(level, n, channels, pixels, partial, first, last, start, column, exists)


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
    INTERLEAVED: tl.constexpr = SHAPE.LAYOUTS[i]
    of = maps[i]
    pointer = common.pick(of.pointers, walk.level)
    WHOLE: tl.constexpr = SHAPE.ALL_ROWS and SHAPE.ALL_COLUMNS and SHAPE.INTERLEAVED == INTERLEAVED
    PAIR: tl.constexpr = 2 if WHOLE and pointer.dtype.element_ty == tl.bfloat16 else 1
    if PAIR == 2:
        pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    stride_n, stride = common.integer(of.strides.image, walk.level), common.integer(of.strides.rest, walk.level)
    return plane_at(pointer, stride_n, stride, walk, SHAPE, INTERLEAVED, PAIR)


@triton.jit
def destination(pointers, walk, SHAPE: tl.constexpr):
    """A dense map of the walk's level, laid out as it is walked, to be written."""
    stride = walk.channels if SHAPE.INTERLEAVED else walk.pixels
    stride_n = walk.channels.to(tl.int64) * walk.pixels
    return plane_at(common.pick(pointers, walk.level), stride_n, stride, walk, SHAPE, SHAPE.INTERLEAVED, 1)


@triton.jit
def plane_at(pointer, stride_n, stride, walk, SHAPE: tl.constexpr, INTERLEAVED: tl.constexpr, PAIR: tl.constexpr):
    """A map with these strides, of images and of the axis that is not dense."""
    ALIGN: tl.constexpr = SHAPE.ALIGN // PAIR
    WIDTH: tl.constexpr = SHAPE.WIDTH // PAIR
    pointer += walk.n * common.aligned(stride_n // PAIR, ALIGN)
    stride = common.aligned(stride // PAIR, ALIGN).to(tl.int64)
    row = tl.arange(0, SHAPE.ROWS)[:, None, None]
    column = tl.arange(0, SHAPE.PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    column = (column + common.aligned(walk.start // PAIR, ALIGN))[None, :, :]
    if SHAPE.INTERLEAVED == INTERLEAVED:
        plane = Plane(pointer + row * stride, column, stride)
    else:
        plane = Plane(pointer + row, column * stride, tl.full([], 1, tl.int64))
    return plane


@triton.jit
def read_step(plane, step):
    """A step's elements in float32, of a source; 0 where there are none."""
    at = plane.pointer + step.first * plane.stride + plane.columns
    if plane.pointer.dtype.element_ty == tl.int32:
        value = common.unpaired(tl.load(at))
    else:
        value = common.read(at, step.valid)
    return value


@triton.jit
def write_step(plane, step, value):
    """A step's elements, in the dtype of the memory."""
    at = plane.pointer + step.first * plane.stride + plane.columns
    tl.store(at, value.to(plane.pointer.dtype.element_ty), mask=step.valid)


# ---- Lines: what pixels or channels have one of ------------------------------------------------
# Of columns: pointers, [PARTS, WIDTH]. Of rows: a pointer to the first row's.


@triton.jit
def per_pixel(pointers, walk, SHAPE: tl.constexpr):
    """A number of each pixel of the walk's level: tuple of [N, P]."""
    return line_at(common.pick(pointers, walk.level) + walk.n * walk.pixels, walk, SHAPE.INTERLEAVED)


@triton.jit
def per_channel(pointers, walk, SHAPE: tl.constexpr):
    """A number of each channel of the walk's level: tuple of [N, C]."""
    return line_at(common.pick(pointers, walk.level) + walk.n * walk.channels, walk, not SHAPE.INTERLEAVED)


@triton.jit
def partial_per_channel(partials, row_size, walk, SHAPE: tl.constexpr):
    """A number of each channel, of this program: [N * tiles, row_size]."""
    return line_at(partials + walk.partial * row_size, walk, not SHAPE.INTERLEAVED)


@triton.jit
def line_at(pointer, walk, OF_ROWS: tl.constexpr):
    return pointer if OF_ROWS else pointer + walk.column


@triton.jit
def read_columns(line, walk):
    """What is read before the walk, for ``read_line``: of columns their numbers, [1, PARTS, WIDTH]."""
    return common.read(line, walk.exists)[None, :, :] if len(line.shape) > 0 else 0.0


@triton.jit
def read_line(line, columns, step):
    """The numbers of a step's elements, to be broadcast."""
    return columns if len(line.shape) > 0 else common.read(line + step.row, step.exists)[:, None, None]


@triton.jit
def accumulator(SHAPE: tl.constexpr):
    """Zeros, [ROWS, PARTS, WIDTH]."""
    return tl.full([SHAPE.ROWS, SHAPE.PARTS, SHAPE.WIDTH], 0.0, tl.float32)


@triton.jit
def add(line, total, value, weight, step):
    """Sums of a step: those of rows are stored, times ``weight``; those of columns are added to the total."""
    if len(line.shape) > 0:
        total += value
    else:  # of a lane, then within a warp
        sums = tl.sum(tl.reshape(value, [value.shape[0], value.shape[1] * value.shape[2]]), 1)
        tl.store(line + step.row, sums * weight, mask=step.exists)
    return total


@triton.jit
def finish(line, total, weight, walk):
    """After the walk, sums of columns are stored, times ``weight``."""
    if len(line.shape) > 0:
        tl.store(line, tl.sum(total, 0) * weight, mask=walk.exists)


# ---- Launchers ---------------------------------------------------------------------------------


class Run(NamedTuple):
    """Levels that one launch handles, and the maps that are read."""

    part: slice  # of all levels
    images: int
    levels: common.Levels
    maps: tuple[Map, ...]
    shapes: Shapes

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Those of these levels."""
        return tuple(tensors[self.part])

    def partials(self, row_size: int) -> Tensor:
        """Memory for one row of partial sums per tile and image."""
        return common.new_partials(self.levels, self.images, row_size, self.maps[0].pointers[0])

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Unless there is nothing to walk."""
        grid = sum(self.levels.tiles), self.images
        if 0 not in grid:
            options = {"num_warps": STREAM_WARPS, "maxnreg": self.shapes.REGISTERS} | constants
            launch(kernel, grid, self.maps, self.levels.encoded(), *arguments, SHAPES=self.shapes, **options)


def runs_of(*maps: Sequence[Tensor], sums_rows: bool = False) -> Iterator[Run]:
    """All levels of these maps, which are walked as the first is laid out."""
    levels_of_maps = [tuple(map(layout.dense_view, level)) for level in zip(*maps, strict=True)]
    for part, run in common.runs(levels_of_maps):
        levels, own = common.as_levels(run, STREAM_PIXELS.value), list(zip(*run, strict=True))
        as_passed = tuple(Map(common.pointers(m), common.strides_of(m)) for m in own)
        element_size = max(m[0].tensor.element_size() for m in own)
        shapes = shapes_of(levels.channels, element_size, [m[0].interleaved for m in own], sums_rows)
        yield Run(part, maps[0][0].shape[0], levels, as_passed, shapes)


def shapes_of(channels: Sequence[int], element_size: int, layouts: Sequence[bool], sums_rows: bool) -> Shapes:
    """Few lanes along a row, where sums of rows are wanted: they are added up across lanes at every step."""
    interleaved, vector = layouts[0], 16 // element_size
    if interleaved:
        columns = max(channels)
        lanes = 16 if columns <= 64 * vector else 32
    else:
        columns = STREAM_PIXELS.value
        lanes = 2 * element_size if sums_rows else 8
    width = min(lanes * vector, max(triton.next_power_of_2(columns), NARROW_WIDTH))
    parts = triton.next_power_of_2(triton.cdiv(columns, width))
    # All elements of a step are there, and each map's lie together.
    even = all(c % (parts * width if interleaved else FEW_ELEMENTS) == 0 for c in channels)
    whole = even and len(set(layouts)) == 1
    elements = min(THREAD_BYTES // (element_size * len(layouts)), THREAD_ELEMENTS) if whole else FEW_ELEMENTS
    rows = max(elements * 32 * STREAM_WARPS // (parts * width), STREAM_WARPS)
    if even and not interleaved:
        rows = math.gcd(rows, *channels)
    wide = Shape(
        PARTS=parts,
        ROWS=rows,
        WIDTH=width,
        ALIGN=common.WIDE.value,
        INTERLEAVED=interleaved,
        LAYOUTS=tuple(layouts),
        ALL_ROWS=interleaved or even,
        ALL_COLUMNS=even or not interleaved,
    )
    narrow = wide._replace(
        PARTS=parts * width // NARROW_WIDTH,
        ROWS=max(rows // 2, STREAM_WARPS),
        WIDTH=NARROW_WIDTH,
        ALIGN=1,
        ALL_ROWS=even and not interleaved,
        ALL_COLUMNS=even and interleaved,
    )
    return Shapes(wide, narrow, REGISTERS if whole and parts * width <= LONG_ROW else None)
