"""How kernels walk feature maps: each lane has a block of channels and pixels of its own at a step.

So what is summed over a lane's channels or pixels stays in registers, and what belongs to a channel or to a pixel is
read once for the whole block. A block is a tuple, part by part and channel by channel, of tensors with a vector of
pixels of each lane: [COLUMNS, GROUPS, VECTOR].

A program takes a tile of pixels of one image on one level, and walks its channels or, a few channels at a time, its
pixels. Every kernel takes ``maps``, ``levels``, its own arguments and ``STEPS``, as ``Run.launch`` passes them, and has
two loops: vector by vector where rows are whole vectors, element by element elsewhere. 64-bit offsets; float32
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.triton import common
from maskd_kernels.triton.common import WIDE, aligned, integer, level_of, pick, read, unpaired
from maskd_kernels.triton.launch import launch

WARPS = tl.constexpr(4)
REGISTERS = 128  # of a thread, so that 16 warps are resident


class Step(NamedTuple):
    """Of the walk, as constants of a kernel: ``GROUPS * CHANNELS`` channels, ``COLUMNS * VECTOR * PARTS`` pixels."""

    GROUPS: int  # lanes along channels
    CHANNELS: int  # of a lane
    COLUMNS: int  # lanes along pixels
    VECTOR: int  # neighbouring pixels of a lane
    PARTS: int  # vectors of a lane
    TOKENS: int  # of the channels: whose tokens are read at a time
    SPAN: int  # pixels of a program
    INTERLEAVED: bool  # the walk, and what it writes: as the last map is
    LAYOUTS: tuple[bool, ...]  # which maps are interleaved
    NARROW: bool  # element by element: rows are not whole vectors, or pixels are missing
    NEXT_CHANNEL: int  # from one of a lane's channels to the next
    EVEN: bool  # channels fill whole steps, and need no mask
    ALL: int  # the channels of every level; 0: they differ
    DENSE: bool  # rows of channels follow each other


class Steps(NamedTuple):
    WIDE: Step  # where rows are whole vectors and pixels fill the program's span
    NARROW: Step


class Map(NamedTuple):
    """A map on each level, as kernels take it."""

    pointers: Any
    strides: Any  # common.Strides


class Tile(NamedTuple):
    """A program's share of a level."""

    level: Any
    n: Any  # int64
    first: Any  # pixel
    channels: Any  # a constant, where all levels have as many
    end: Any  # their number, which is none: short loops are not unrolled
    pixels: Any
    first_channel: Any
    channel: Any  # the first of each lane, as lanes lie
    pixel: Any  # of each lane's vectors, likewise, from the first on


class Plane(NamedTuple):
    """A map of the tile's level, as it lies in memory: which axis has neighbours then tells the compiler of lanes."""

    at: Any  # pointers: [GROUPS, pixels], if interleaved [COLUMNS, channels]; as lanes lie, if element by element
    c: Any  # which channels these are, to be broadcast
    channel: Any  # from one of a lane's channels to the next
    part: Any  # from one of a lane's parts to the next
    next_channels: Any  # from a step's channels to the next step's
    next_pixels: Any  # from a step's pixels to the next step's


@triton.jit
def zeros(VECTOR: tl.constexpr, STEP: tl.constexpr):
    """Of each lane so many."""
    return tl.full([STEP.COLUMNS, STEP.GROUPS, VECTOR], 0.0, tl.float32)


@triton.jit
def channels_of(STEP: tl.constexpr):
    """[GROUPS, CHANNELS] of a step."""
    group = tl.arange(0, STEP.GROUPS)[:, None]
    if STEP.NEXT_CHANNEL == 1:
        group *= STEP.CHANNELS
    return group + tl.arange(0, STEP.CHANNELS)[None, :] * STEP.NEXT_CHANNEL


@triton.jit
def pixels_of(VECTOR: tl.constexpr, STEP: tl.constexpr):
    """[COLUMNS, VECTOR] of a part, in vectors of this length; element by element, neighbours are of different lanes."""
    column, entry = tl.arange(0, STEP.COLUMNS)[:, None], tl.arange(0, VECTOR)[None, :]
    if STEP.NARROW:
        pixel = column + entry * STEP.COLUMNS
    else:
        pixel = column * VECTOR + entry
    return pixel


@triton.jit
def tile_of(index, n, levels, first_channel, STEP: tl.constexpr):
    """This tile of the grid, of this image, from this channel on."""
    level = level_of(index, levels)
    channels, pixels = integer(levels.channels, level), integer(levels.pixels, level)
    end = channels
    if STEP.ALL:
        channels = STEP.ALL
    elif STEP.INTERLEAVED and not STEP.NARROW:
        channels = aligned(channels, WIDE)
    first = (index - integer(levels.first_tile, level)) * STEP.SPAN
    group = tl.arange(0, STEP.GROUPS)
    if STEP.NEXT_CHANNEL == 1:
        group *= STEP.CHANNELS
    channel, pixel = (first_channel + group)[None, :, None], pixels_of(STEP.VECTOR, STEP)[:, None, :]
    return Tile(level, n.to(tl.int64), first, channels, end, pixels, first_channel, channel, pixel)


@triton.jit
def channels_from(index, levels, STEPS: tl.constexpr):
    """The first channel of a program that walks pixels, and whether this tile has it: other levels may have more."""
    first = tl.program_id(2) * (STEPS.WIDE.GROUPS * STEPS.WIDE.CHANNELS)
    return first, first < integer(levels.channels, level_of(index, levels))


@triton.jit
def from_last():
    """The tile and image of a program of a backward pass: the forward pass left the last ones in the cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def next_channels(plane):
    """The plane at the next step of a walk along channels."""
    at = plane.at + plane.next_channels
    return Plane(at, plane.c, plane.channel, plane.part, plane.next_channels, plane.next_pixels)


@triton.jit
def next_pixels(plane):
    """The plane at the next step of a walk along pixels."""
    at = plane.at + plane.next_pixels
    return Plane(at, plane.c, plane.channel, plane.part, plane.next_channels, plane.next_pixels)


@triton.jit
def source(maps, i: tl.constexpr, tile, STEP: tl.constexpr):
    """One of the maps, to be read: element by element where it is not laid out as it is walked; bfloat16 in pairs."""
    INTERLEAVED: tl.constexpr = STEP.LAYOUTS[i]
    pointer = pick(maps[i].pointers, tile.level)
    stride_n, stride = integer(maps[i].strides.image, tile.level), integer(maps[i].strides.rest, tile.level)
    if STEP.NARROW or INTERLEAVED != STEP.INTERLEAVED:
        plane = elements(pointer + tile.n * stride_n, stride.to(tl.int64), tile, STEP, INTERLEAVED)
    else:
        PAIR: tl.constexpr = 2 if pointer.dtype.element_ty == tl.bfloat16 else 1
        if PAIR == 2:
            pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
        pointer += tile.n * aligned(stride_n // PAIR, WIDE // PAIR)
        if INTERLEAVED and STEP.DENSE:
            stride = STEP.ALL // PAIR
        else:
            stride = aligned(stride // PAIR, WIDE // PAIR).to(tl.int64)
        plane = vectors(pointer, stride, tile, STEP, PAIR)
    return plane


@triton.jit
def destination(pointers, tile, STEP: tl.constexpr):
    """A dense map, laid out as it is walked, to be written."""
    channels, stride = tile.channels, tile.pixels.to(tl.int64)
    if STEP.NARROW:
        channels = tile.end  # which is no constant: the compiler would see pairs in some rows, and lay these out anew
    pointer = pick(pointers, tile.level) + tile.n * (stride * channels)
    if STEP.INTERLEAVED:
        stride = tile.channels
    if STEP.NARROW:
        plane = elements(pointer, stride, tile, STEP, STEP.INTERLEAVED)
    else:
        if not STEP.INTERLEAVED:
            stride = aligned(stride, WIDE)
        plane = vectors(pointer, stride, tile, STEP, 1)
    return plane


@triton.jit
def elements(pointer, stride, tile, STEP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A plane to be walked element by element."""
    C: tl.constexpr = STEP.GROUPS * STEP.CHANNELS
    P: tl.constexpr = STEP.COLUMNS * STEP.VECTOR
    NEXT: tl.constexpr = STEP.NEXT_CHANNEL
    if INTERLEAVED:
        at = pointer + tile.first.to(tl.int64) * stride + (tile.channel + tile.pixel * stride)
        plane = Plane(at, tile.channel, NEXT, P * stride, C, STEP.PARTS * P * stride)
    else:
        at = pointer + tile.first + (tile.channel * stride + tile.pixel)
        plane = Plane(at, tile.channel, NEXT * stride, P, C * stride, STEP.PARTS * P)
    return plane


@triton.jit
def vectors(pointer, stride, tile, STEP: tl.constexpr, PAIR: tl.constexpr):
    """A plane to be walked vector by vector, of single elements or of pairs."""
    C: tl.constexpr = STEP.GROUPS * STEP.CHANNELS
    P: tl.constexpr = STEP.COLUMNS * STEP.VECTOR
    if STEP.INTERLEAVED:
        c, p = tl.arange(0, C // PAIR)[None, :], tl.arange(0, P)[:, None]
        at = pointer + tile.first_channel // PAIR + tile.first.to(tl.int64) * stride + (p * stride + c)
        plane = Plane(at, tile.first_channel + PAIR * c, 1, P * stride, C // PAIR, STEP.PARTS * P * stride)
    else:
        c, p = tl.reshape(tile.channel, [STEP.GROUPS])[:, None], tl.arange(0, P // PAIR)[None, :]
        at = pointer + tile.first // PAIR + (c * stride + p)
        plane = Plane(at, c, stride, P // PAIR, C * stride, STEP.PARTS * P // PAIR)
    return plane


@triton.jit
def present(plane, tile, channel, pixel, STEP: tl.constexpr):
    """Whether there are a plane's elements, so many channels and pixels from the tile's first."""
    if STEP.EVEN:
        valid = tl.full(plane.c.shape, 1, tl.int1)
    else:
        valid = plane.c + channel < tile.channels
    if STEP.NARROW:
        valid = valid & (tile.first + pixel + tile.pixel < tile.pixels)
    return valid


@triton.jit
def widened(at, valid, STEP: tl.constexpr):
    """What is there, in float32 and as lanes lie: 0 where there is nothing. Pairs of bfloat16 become two elements."""
    if at.dtype.element_ty == tl.int32:
        value = unpaired(tl.load(at, mask=valid, other=0))
    else:
        value = read(at, valid)
    if len(at.shape) == 2:
        if STEP.INTERLEAVED:
            value = tl.reshape(value, [STEP.COLUMNS, STEP.GROUPS, value.shape[1] // STEP.GROUPS])
        else:
            value = tl.permute(tl.reshape(value, [STEP.GROUPS, STEP.COLUMNS, STEP.VECTOR]), [1, 0, 2])
    return value


@triton.jit
def write(at, value, valid, STEP: tl.constexpr):
    """The reverse, in the dtype of the memory."""
    if len(at.shape) == 2:
        if not STEP.INTERLEAVED:
            value = tl.permute(value, [1, 0, 2])
        value = tl.reshape(value, at.shape)
    tl.store(at, value.to(at.dtype.element_ty), mask=valid)


@triton.jit
def entries(x):
    """A tuple of the up to 8 along the last axis, which is within a thread, with axes of 1 there: nothing moves."""
    result = (x,)
    for _ in tl.static_range(3):  # Triton 3.4 knows no functions that call themselves
        if result[0].shape[2] > 1:
            result = halved(result)
    return result


@triton.jit
def halved(x):
    """Of tensors with every nth element twice as many with every 2nth."""
    HALF: tl.constexpr = x[0].shape[2] // 2
    even, odd = (), ()
    for i in tl.static_range(len(x)):
        first, second = tl.split(tl.reshape(x[i], [x[i].shape[0], x[i].shape[1], HALF, 2]))
        even, odd = even + (first,), odd + (second,)
    return even + odd


@triton.jit
def stacked(x):
    """The reverse: up to 8 tensors along a last axis, which vectors have already."""
    AXES: tl.constexpr = 3 if len(x[0].shape) > 1 else 2
    if len(x[0].shape) == 1 and len(x) == 1:
        result = tl.expand_dims(x[0], 1)
    else:
        for _ in tl.static_range(3):
            if len(x) > 1:
                x = joined(x, AXES)
        result = x[0]
    return result


@triton.jit
def joined(x, AXES: tl.constexpr):
    """Half as many tensors, with this many axes."""
    HALF: tl.constexpr = len(x) // 2
    result = ()
    for i in tl.static_range(HALF):
        both = tl.join(x[i], x[i + HALF])
        if len(both.shape) > AXES:
            if AXES == 3:
                both = tl.reshape(both, [both.shape[0], both.shape[1], 2 * both.shape[2]])
            else:
                both = tl.reshape(both, [both.shape[0], 2 * both.shape[1]])
        result = result + (both,)
    return result


@triton.jit
def read_block(plane, tile, channel, pixel, STEP: tl.constexpr):
    """Each lane's block of a step, so many channels and pixels from the tile's first; 0 where there is nothing."""
    PARTS: tl.constexpr = STEP.PARTS
    CHANNELS: tl.constexpr = STEP.CHANNELS
    result = ()
    for part in tl.static_range(PARTS):
        at, p = plane.at + part * plane.part, pixel + part * (STEP.COLUMNS * STEP.VECTOR)
        if STEP.INTERLEAVED and len(at.shape) == 2:
            result += entries(widened(at, present(plane, tile, channel, p, STEP), STEP))
        else:
            for j in tl.static_range(CHANNELS):
                valid = present(plane, tile, channel + j * STEP.NEXT_CHANNEL, p, STEP)
                result += (widened(at + j * plane.channel, valid, STEP),)
    return result


@triton.jit
def write_block(plane, values, tile, channel, pixel, STEP: tl.constexpr):
    """The reverse of ``read_block``."""
    PARTS: tl.constexpr = STEP.PARTS
    CHANNELS: tl.constexpr = STEP.CHANNELS
    for part in tl.static_range(PARTS):
        at, p = plane.at + part * plane.part, pixel + part * (STEP.COLUMNS * STEP.VECTOR)
        if STEP.INTERLEAVED and len(at.shape) == 2:
            value = stacked(values[part * CHANNELS : (part + 1) * CHANNELS])
            write(at, value, present(plane, tile, channel, p, STEP), STEP)
        else:
            for j in tl.static_range(CHANNELS):
                valid = present(plane, tile, channel + j * STEP.NEXT_CHANNEL, p, STEP)
                write(at + j * plane.channel, values[part * CHANNELS + j], valid, STEP)


@triton.jit
def read_channels(at, FIRST: tl.constexpr, COUNT: tl.constexpr, tile, channel, STEP: tl.constexpr):
    """A tuple of what some of each lane's channels have one float32 of; ``at`` points to each lane's first."""
    result = ()
    if STEP.EVEN and STEP.NEXT_CHANNEL == 1:
        SIZE: tl.constexpr = COUNT if COUNT < 4 else 4
        for first in tl.static_range(FIRST, FIRST + COUNT, SIZE):
            result += entries(tl.load(at + (first + tl.arange(0, SIZE))[None, None, :]))
    else:
        for j in tl.static_range(FIRST, FIRST + COUNT):
            valid = tile.channel + (channel + j * STEP.NEXT_CHANNEL) < tile.channels
            result += (tl.load(at + j * STEP.NEXT_CHANNEL, mask=valid, other=0.0),)
    return result


@triton.jit
def of_channels(pointers, tile):
    """Pointers for ``read_channels``, of a tuple of [N, C]."""
    return pick(pointers, tile.level) + tile.n * tile.channels + tile.channel


@triton.jit
def over_pixels(x, STEP: tl.constexpr):
    """Sums over pixels, as far as they are within a warp; ``write_channels`` adds up the rest."""
    x = tl.sum(x, 2)
    if STEP.INTERLEAVED:
        LANES: tl.constexpr = 32 // STEP.GROUPS
        x = tl.reshape(x, [STEP.COLUMNS // (LANES * WARPS), WARPS, LANES, STEP.GROUPS])
        total = tl.sum(tl.sum(x, 0), 1)
    else:
        total = tl.sum(x, 0)
    return total


@triton.jit
def write_channels(at, sums, tile, channel, STEP: tl.constexpr):
    """Sums of ``over_pixels``, one for each of a lane's channels; ``at`` points to the step's first channel."""
    total, c = stacked(sums), tile.first_channel + channels_of(STEP)
    if STEP.INTERLEAVED:
        total = tl.sum(total, 0)  # over warps
    if STEP.EVEN:
        tl.store(at + c, total)
    else:
        tl.store(at + c, total, mask=channel + c < tile.channels)


@triton.jit
def over_groups(x):
    """Sums over channels, [COLUMNS, VECTOR]."""
    return tl.sum(x, 1)


@triton.jit
def read_pixels(pointers, tile):
    """What each lane's pixels have one float32 of: of a tuple of [N, P]."""
    at = pick(pointers, tile.level) + tile.n * tile.pixels + tile.first + tile.pixel
    return read(at, tile.first + tile.pixel < tile.pixels)


@triton.jit
def write_pixels(pointers, sums, weight, tile, STEP: tl.constexpr):
    """The reverse, of sums over each lane's channels, all of them times ``weight``."""
    pixel = tile.first + pixels_of(STEP.VECTOR, STEP)
    at = pick(pointers, tile.level) + tile.n * tile.pixels + pixel
    tl.store(at, over_groups(sums) * weight, mask=pixel < tile.pixels)


# ---- Launchers ---------------------------------------------------------------------------------


def step_of(
    maps: common.Maps, groups: int, own: int, columns: int, vector: int, tokens: int = 0, parts: int = 1
) -> Step:
    """A step where rows are whole vectors."""
    channels = [level[0].shape[1] for level in maps]
    alike, dense = len(set(channels)) == 1, all(m.rest_stride == m.shape[1] for level in maps for m in level)
    return Step(
        groups,
        own,
        columns,
        vector,
        parts,
        tokens,
        SPAN=columns * vector * parts,
        INTERLEAVED=maps[0][-1].interleaved,
        LAYOUTS=tuple(m.interleaved for m in maps[0]),
        NARROW=False,
        NEXT_CHANNEL=1,
        EVEN=all(c % (groups * own) == 0 for c in channels),
        ALL=channels[0] if alike else 0,
        DENSE=alike and dense,
    )


def channel_step(maps: common.Maps) -> Step:
    """To walk channels. A thread reads 128 bits at a time, of all maps up to 128 bytes."""
    half, single = element_size(maps) == 2, len(maps[0]) == 1
    if maps[0][-1].interleaved:
        return step_of(maps, 8, 8 if half else 4, 128 if single and not half else 64, 1)
    if half:
        return step_of(maps, 8, 4, 16, 8)
    return step_of(maps, 4, 8 if single else 4, 32, 4)


def pixel_step(maps: common.Maps) -> Step:
    """To walk pixels: lanes along channels, where these are neighbours, and otherwise few along pixels."""
    half, most = element_size(maps) == 2, max(level[0].shape[1] for level in maps)
    if maps[0][-1].interleaved:
        own = 8 if half else 4
        groups = min(32, triton.next_power_of_2(triton.cdiv(most, own)))
        step = step_of(maps, groups, own, 128 // groups, 1, parts=4)
    else:
        step = step_of(maps, 16, 2, 8, 8 if half else 4, parts=2)
    programs = min(triton.cdiv(most, step.GROUPS * step.CHANNELS), 4)  # few channels, many tiles
    return step._replace(SPAN=max(step.SPAN, 128 * programs))


def steps_of(step: Step, channels: int = 0) -> Steps:
    """Element by element, which takes more registers, a lane has few pixels, and may have fewer channels."""
    narrow = step._replace(NARROW=True, CHANNELS=channels or step.CHANNELS)
    if step.VECTOR == 8:
        narrow = narrow._replace(PARTS=1)
    between = step.GROUPS if step.INTERLEAVED else 1
    return Steps(step, narrow._replace(TOKENS=min(step.TOKENS, narrow.CHANNELS), NEXT_CHANNEL=between))


def element_size(maps: common.Maps) -> int:
    """Bytes, of the largest of the maps."""
    return max(m.tensor.element_size() for m in maps[0])


class Run(NamedTuple):
    """Levels that one launch handles, and the maps that are read."""

    part: slice  # of all levels
    images: int
    features: common.Maps
    step: Step
    levels: common.Levels

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Those of these levels; None where there are none at all."""
        return tuple(tensors[self.part]) or None

    def partials(self, row_size: int) -> Tensor:
        """Memory for one row of partial sums per tile and image."""
        return common.new_partials(self.levels, self.images, row_size, self.features[0][0].tensor)

    def maps(self) -> tuple[Map, ...]:
        """As kernels take them."""
        return tuple(Map(common.pointers(m), common.strides_of(m)) for m in zip(*self.features, strict=True))

    def grid(self, channels: bool = False) -> tuple[int, int, int]:
        """A program for each tile and image, and each step's channels."""
        step, most = self.step, max(self.levels.channels)
        return sum(self.levels.tiles), self.images, triton.cdiv(most, step.GROUPS * step.CHANNELS) if channels else 1

    def launch(
        self, kernel: Any, *arguments: Any, channels: int = 0, grid: tuple[int, ...] = (), **constants: Any
    ) -> None:
        """Unless there is nothing to walk. Element by element, lanes have so many channels."""
        grid = grid or self.grid()
        if 0 not in grid:
            options = {"num_warps": WARPS.value, "maxnreg": REGISTERS} | constants
            steps = steps_of(self.step, channels)
            launch(kernel, grid, self.maps(), self.levels.encoded(), *arguments, STEPS=steps, **options)


def runs_of(*maps: Sequence[Tensor], step: Callable[[common.Maps], Step] = channel_step) -> Iterator[Run]:
    """All levels of these maps, and the steps that they are walked by."""
    features = [tuple(map(layout.dense_view, level)) for level in zip(*maps, strict=True)]
    for part, run in common.runs(features):
        its_step = step(run)
        yield Run(part, maps[0][0].shape[0], run, its_step, common.as_levels(run, its_step.SPAN))
