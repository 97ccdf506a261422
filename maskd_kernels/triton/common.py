"""What the Triton kernels and their launchers share: levels of a pyramid, offsets, sums over tiles.

One launch takes all levels of a pyramid: its grid is (tiles of all levels, images), and what belongs to a level is
passed as a tuple with one entry per level, of which ``pick`` and ``integer`` take the program's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops.layout import Feature
from maskd_kernels.triton.launch import empty, launch

WIDE = tl.constexpr(8)  # elements of a 128-bit load of half types


class Levels(NamedTuple):
    """The levels of one launch, an entry per level in each field; kernels take them ``encoded``."""

    first_tile: tuple[int, ...]
    tiles: tuple[int, ...]  # of one image
    channels: tuple[int, ...]
    pixels: tuple[int, ...]
    wide: tuple[int, ...]  # 1 where rows start and end on multiples of 8 elements, in memory that begins on 16 bytes

    def encoded(self) -> Levels:
        return Levels(*map(encode, self))


class Strides(NamedTuple):
    """Of one map on each level, in elements."""

    image: tuple[int, ...]
    rest: tuple[int, ...]  # of the axis that is not dense


def encode(values: Sequence[int]) -> tuple[int, ...]:
    """Integers of the levels as kernels take them, to be read by ``integer``.

    Triton compiles anew for integers in tuples that are 1 or multiples of 16, even where told not to. These, odd and
    greater than 1, are neither: image sizes may change at every step.
    """
    return tuple(2 * value + 3 for value in values)


@triton.jit
def decode(value):
    """What was encoded."""
    return (value - 3) // 2


@triton.jit
def pick(values, level):
    """The entry of this level, of pointers."""
    result = values[0]
    for i in tl.static_range(1, len(values)):
        result = tl.where(level == i, values[i], result)
    return result


@triton.jit
def integer(values, level):
    """The entry of this level, of encoded integers."""
    return decode(pick(values, level))


@triton.jit
def level_of(tile, levels):
    """The level that this tile of the grid belongs to."""
    level = 0
    for i in tl.static_range(1, len(levels.first_tile)):
        level += (tile >= decode(levels.first_tile[i])).to(tl.int32)
    return level


@triton.jit
def partial_row(tile, n, level, levels):
    """Where this program puts its partial sums: rows of one level, then of one image, lie together."""
    first = integer(levels.first_tile, level)
    return n * integer(levels.tiles, level) + (tl.num_programs(1) - 1) * first + tile


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """The same value, which is a multiple of ALIGN: thus the compiler learns how wide it may load."""
    return value // ALIGN * ALIGN


@triton.jit
def condition(value):
    """A scalar that may be joined with masks: of a bare comparison, Triton 3.9's interpreter makes integers there."""
    return tl.full([], 1, tl.int1) & value


@triton.jit
def is_wide(tile, levels, PIXELS: tl.constexpr):
    """Whether this tile's rows are whole vectors and all of its pixels are there: 1 or 0."""
    level = level_of(tile, levels)
    end = (tile - integer(levels.first_tile, level) + 1) * PIXELS
    return integer(levels.wide, level) & (end <= integer(levels.pixels, level)).to(tl.int32)


@triton.jit
def read(pointers, valid):
    """Elements in float32; 0 where there are none."""
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def unpaired(both):
    """Float32 of pairs of bfloat16 in int32, twice as many along the last axis.

    The compiler's own way of widening two elements that lie together takes three instructions.
    """
    both = tl.join(both << 16, both & -65536).to(tl.float32, bitcast=True)
    if len(both.shape) == 4:
        value = tl.reshape(both, [both.shape[0], both.shape[1], 2 * both.shape[2]])
    else:
        value = tl.reshape(both, [both.shape[0], 2 * both.shape[1]])
    return value


@triton.jit(do_not_specialize=["images", "row_size"])
def reduce_kernel(
    partials,  # [images * tiles of all levels, row_size]
    out,  # tuple: [images or 1, width]
    levels,
    widths,  # tuple
    images,  # that are added up
    row_size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the tiles of each image where ``images`` is 1, of all images where it is their number, in order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1).to(tl.int64)
    level = tl.program_id(2)
    tiles, width = integer(levels.tiles, level), integer(widths, level)
    row = tl.num_programs(1) * images * integer(levels.first_tile, level) + n * tiles
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, tiles * images, ROWS):
        r = start + tl.arange(0, ROWS)
        at = (row + r[:, None]) * row_size + i[None, :]
        total += tl.load(partials + at, mask=(r < tiles * images)[:, None] & (i < width)[None, :], other=0.0)
    tl.store(pick(out, level) + n * width + i, tl.sum(total, 0), mask=i < width)


# ---- Launchers ---------------------------------------------------------------------------------


Maps = Sequence[tuple[Feature, ...]]  # of each level


def runs(maps: Maps) -> Iterator[tuple[slice, Maps]]:
    """Consecutive levels whose maps have the same dtypes and layouts: what one launch can handle. Mostly all."""
    alike: list[tuple[Feature, ...]] = []
    for level in maps:
        if alike and level[0].shape[2] == 1:  # of either layout
            level = tuple(m._replace(interleaved=b.interleaved) for m, b in zip(level, alike[-1], strict=True))
        alike.append(level)
    start = 0
    for _, group in groupby(alike, lambda level: [(m.tensor.dtype, m.interleaved) for m in level]):
        run = list(group)
        yield slice(start, start + len(run)), run
        start += len(run)


def of_run(x: Tensor, run: slice) -> Tensor:  # [L, ...]
    """The rows of a run of levels; the tensor itself where these are all, which a ``recalled`` launcher knows."""
    return x if run.stop - run.start == len(x) else x[run]


def as_levels(maps: Maps, block: int) -> Levels:
    """Levels in tiles of ``block`` pixels; the first map of each gives the size, all of them what divides it."""
    sizes = [level[0].shape for level in maps]
    tiles = [triton.cdiv(pixels, block) for _, _, pixels in sizes]
    wide = []
    for level in maps:
        strides = [s for m in level for s in (m.stride[0], m.rest_stride)]
        dense = [m.shape[1 if m.interleaved else 2] for m in level]
        # Memory too must begin on whole vectors: bfloat16 is read in pairs.
        begins = all(m.tensor.data_ptr() % 16 == 0 for m in level)
        wide.append(int(begins and math.gcd(WIDE.value, *strides, *dense) == WIDE.value))
    return Levels(
        first_tile=offsets(tiles),
        tiles=tuple(tiles),
        channels=tuple(channels for _, channels, _ in sizes),
        pixels=tuple(pixels for _, _, pixels in sizes),
        wide=tuple(wide),
    )


def offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each level begins along an axis that all levels share."""
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


def channel_alignment(channels: Sequence[int]) -> int:
    """What divides the channels of all levels, which do not change with image sizes: the kernels' ``C_ALIGN``."""
    return math.gcd(WIDE.value, *channels)


def strides_of(maps: Sequence[Feature]) -> Strides:
    """Strides of one map on all levels, encoded."""
    return Strides(encode([m.stride[0] for m in maps]), encode([m.rest_stride for m in maps]))


def pointers(maps: Sequence[Feature]) -> tuple[Tensor, ...]:
    """The memory of one map on all levels."""
    return tuple(m.tensor for m in maps)


def new_partials(levels: Levels, images: int, row_size: int, like: Tensor) -> Tensor:
    """Memory for one row of partial sums per tile and image."""
    return empty(like, images * sum(levels.tiles), row_size, dtype=torch.float32)


def reduce_shape(width: int) -> tuple[int, int]:
    """Columns per program, and rows per step."""
    block = min(64, triton.next_power_of_2(max(width, 1)))
    return block, 2048 // block


def reduce_tiles(
    partials: Tensor, out: Sequence[Tensor], levels: Levels, widths: Sequence[int], images: int, per_image: bool = True
) -> None:
    """Per level, out [images, width] (or [width]: all images together) = partial rows summed."""
    block, rows = reduce_shape(max(widths))
    grid = (triton.cdiv(max(widths), block), images if per_image else 1, len(out))
    if 0 in grid:
        return
    launch(
        reduce_kernel,
        grid,
        partials,
        tuple(out),
        levels.encoded(),
        encode(widths),
        1 if per_image else images,
        partials.shape[1],
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
