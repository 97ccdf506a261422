"""Triton kernels of ``receptive_stats``.

Forward equation, gradients and traffic: csrc/receptive_stats.h and reference.py. One program takes a tile of pixels of
one image on one level and walks its channels, ``GROUPS x CHANNELS`` of them at a step: those of a group lie within a
thread, so that sums over channels stay in registers, pixel by pixel, until the walk ends; only then are groups, of
other lanes and warps, added up. So few tokens are served by plain multiply-adds; many take tensor cores, with
float32's accuracy by three TF32 products each (``tf32x3``).

Sums over a channel's pixels are those of whole tiles; what taps of the weighting's convolution miss, the borders of
the image, programs of their own add up. Each program writes its own partial sums and a second kernel adds them in a
fixed order, so that results are bitwise repeatable. Float32 arithmetic. Offsets are 64-bit. No autotuning, and nothing
recompiles when image sizes change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.reference import ReceptiveStats
from maskd_kernels.triton.common import (
    WIDE,
    Maps,
    aligned,
    as_levels,
    condition,
    decode,
    encode,
    feature_offsets,
    integer,
    level_of,
    new_partials,
    of_run,
    offsets,
    partial_row,
    pick,
    pointers,
    reduce_shape,
    reduce_tiles,
    runs,
    strides_of,
)
from maskd_kernels.triton.launch import empty, launch, recalled
from maskd_kernels.triton.streams import is_wide, read

PRECISION = tl.constexpr("tf32x3")
LINES = tl.constexpr(8)  # of an image's border: first row, last row, first column, last column; their corners


class Step(NamedTuple):
    """Of the walk over channels, as constants of a kernel."""

    GROUPS: int  # of channels, each walked by lanes or warps of its own; 0: by tensor cores
    CHANNELS: int  # of a group
    TOKENS: int  # of these: whose tokens are in registers at a time
    PIXELS: int  # of a tile
    WIDTH: int  # of these: what lanes have between them, one vector each
    WARPS: int
    NARROW: bool  # rows are not whole vectors, or pixels are missing
    INTERLEAVED: bool  # the teacher's layout
    EVEN: bool  # channels fill whole steps, and need no mask
    ALL: int  # the channels of every level; 0: they differ
    DENSE: bool  # rows of channels follow each other


class Features(NamedTuple):
    """What the kernels read, of each level."""

    teacher: Any  # [N, C, P]
    student: Any  # [N, C, P]
    tokens: Any  # [K, C]
    teacher_strides: Any
    student_strides: Any


class Results(NamedTuple):
    """Of the forward pass."""

    masks: Any  # [N, K, total P]; logits, until they are complete
    teacher_masks: Any  # [N, K, total P]
    distance: Any  # [N, total P]
    borders: Any  # [N, LINES, total C]
    partials: Any  # [N * tiles, row_size]: mass, error, gram, and from SUMS_AT on channel sums


class Places(NamedTuple):
    """Where levels lie in tensors that they share, encoded."""

    widths: Any  # 0: not an image
    pixel_offsets: Any
    channel_offsets: Any
    total_pixels: Any
    total_channels: Any
    row_size: Any  # of partial sums


class Tile(NamedTuple):
    """A program's share of a level."""

    level: Any
    n: Any  # int64
    first: Any  # pixel
    channels: Any  # a constant, where all levels have as many
    end: Any  # their number, which is none: short loops are not unrolled
    pixels: Any
    column: Any  # of the first pixel, where levels share a tensor
    group: Any  # [GROUPS, 1, 1] first channels of the first step
    pixel: Any  # [1, PARTS, WIDTH] of the tile
    exists: Any  # likewise


class Plane(NamedTuple):
    """A map of a level, where a program's walk begins."""

    at: Any  # pointers: [GROUPS, PARTS, WIDTH], or with all channels of a thread [GROUPS, 1, PIXELS, CHANNELS]
    rest: Any  # from a channel to the next
    step: Any  # from one step's to the next's


@triton.jit
def tile_of(tile, levels, places, STEP: tl.constexpr):
    """This tile of the grid."""
    level = level_of(tile, levels)
    first = (tile - integer(levels.first_tile, level)) * STEP.PIXELS
    channels, pixels = integer(levels.channels, level), integer(levels.pixels, level)
    end = channels
    if STEP.ALL:
        channels = STEP.ALL
    elif STEP.INTERLEAVED and not STEP.NARROW:
        channels = aligned(channels, WIDE)
    pixel = tl.arange(0, STEP.PIXELS // STEP.WIDTH)[:, None] * STEP.WIDTH + tl.arange(0, STEP.WIDTH)[None, :]
    group = tl.arange(0, STEP.GROUPS) * STEP.CHANNELS
    column = integer(places.pixel_offsets, level) + first
    if STEP.NARROW:
        exists = first + pixel < pixels
    else:
        exists = tl.full(pixel.shape, 1, tl.int1)
    n = tl.program_id(1).to(tl.int64)
    return Tile(
        level, n, first, channels, end, pixels, column, group[:, None, None], pixel[None, :, :], exists[None, :, :]
    )


@triton.jit
def plane_of(pointers, strides, tile, STEP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A map of the tile's level: element by element, where it is not laid out as the tile is walked."""
    pointer, stride_n = pick(pointers, tile.level), integer(strides.image, tile.level)
    stride = integer(strides.rest, tile.level)
    if STEP.NARROW or INTERLEAVED != STEP.INTERLEAVED:
        stride = stride.to(tl.int64)
        if INTERLEAVED:
            at = pointer + (tile.n * stride_n + tile.first * stride) + (tile.group + tile.pixel * stride)
            plane = Plane(at, 1, STEP.GROUPS * STEP.CHANNELS)
        else:
            at = pointer + (tile.n * stride_n + tile.first) + (tile.group * stride + tile.pixel)
            plane = Plane(at, stride, STEP.GROUPS * STEP.CHANNELS * stride)
    else:
        # Bfloat16 in pairs, as the compiler's own way of widening two elements takes three instructions.
        PAIR: tl.constexpr = 2 if pointer.dtype.element_ty == tl.bfloat16 else 1
        ALIGN: tl.constexpr = WIDE // PAIR
        if PAIR == 2:
            pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
        pointer += tile.n * aligned(stride_n // PAIR, ALIGN)
        if INTERLEAVED:
            if STEP.DENSE:
                stride = STEP.ALL // PAIR
            else:
                stride = aligned(stride // PAIR, ALIGN).to(tl.int64)
            SIZE: tl.constexpr = STEP.CHANNELS // PAIR
            pixel = tl.arange(0, STEP.PIXELS)[None, None, :, None] * stride
            channel = tl.arange(0, STEP.GROUPS)[:, None, None, None] * SIZE + tl.arange(0, SIZE)[None, None, None, :]
            at = pointer + tile.first.to(tl.int64) * stride + (pixel + channel)
            plane = Plane(at, 1, STEP.GROUPS * SIZE)
        else:
            stride = aligned(stride // PAIR, ALIGN).to(tl.int64)
            WIDTH: tl.constexpr = STEP.WIDTH // PAIR
            pixel = tl.arange(0, STEP.PIXELS // STEP.WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            at = pointer + tile.first // PAIR + (tile.group * stride + pixel[None, :, :])
            plane = Plane(at, stride, STEP.GROUPS * STEP.CHANNELS * stride)
    return plane


@triton.jit
def widened(at, valid):
    """What is there, in float32; of pairs of bfloat16, twice as many along the last axis."""
    if at.dtype.element_ty == tl.int32:
        both = tl.load(at, mask=valid, other=0)
        both = tl.join(both << 16, both & -65536).to(tl.float32, bitcast=True)
        if len(at.shape) == 4:
            value = tl.reshape(both, [at.shape[0], at.shape[1], at.shape[2], 2 * at.shape[3]])
        else:
            value = tl.reshape(both, [at.shape[0], at.shape[1], 2 * at.shape[2]])
    else:
        value = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    return value


@triton.jit
def entries(x):
    """A tuple of what lies along the last axis, which is within a thread: nothing moves."""
    if x.shape[len(x.shape) - 1] == 1:
        result = (tl.sum(x, len(x.shape) - 1),)
    else:
        HALF: tl.constexpr = x.shape[len(x.shape) - 1] // 2
        if len(x.shape) == 4:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], HALF, 2]))
        else:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
        even, odd = entries(even), entries(odd)
        result = ()
        for i in tl.static_range(HALF):
            result = result + (even[i], odd[i])
    return result


@triton.jit
def stacked(x, FIRST: tl.constexpr, STRIDE: tl.constexpr):
    """What ``entries`` takes apart: of a tuple's entries, from the first on, by this stride, along a new last axis."""
    if len(x) <= FIRST + STRIDE:
        result = tl.expand_dims(x[FIRST], -1)
    else:
        both = tl.join(stacked(x, FIRST, 2 * STRIDE), stacked(x, FIRST + STRIDE, 2 * STRIDE))
        if len(both.shape) == 5:
            result = tl.reshape(both, [both.shape[0], both.shape[1], both.shape[2], 2 * both.shape[3]])
        elif len(both.shape) == 4:
            result = tl.reshape(both, [both.shape[0], both.shape[1], 2 * both.shape[2]])
        else:
            result = tl.reshape(both, [both.shape[0], 2 * both.shape[1]])
    return result


@triton.jit
def present(start, tile, STEP: tl.constexpr):
    """Which elements there are of each group's channel ``start`` on, [GROUPS, 1 or PARTS, 1 or WIDTH]."""
    if STEP.EVEN:
        valid = tl.full(tile.group.shape, 1, tl.int1)
    else:
        valid = start + tile.group < tile.channels
    if STEP.NARROW:
        valid = valid & tile.exists
    return valid


@triton.jit
def element(vectors, plane, at, j: tl.constexpr, valid):
    """A step's channel j of each group."""
    if len(at.shape) == 4:
        value = vectors[j]
    else:
        value = widened(at + j * plane.rest, valid)
    return value


@triton.jit
def vectors_at(at, valid):
    """A step's channels, where a thread reads all of its own at once."""
    if len(at.shape) == 4:
        value = entries(widened(at, valid[:, :, :, None]))
    else:
        value = ()
    return value


@triton.jit
def read_tokens(at, start, channels, K: tl.constexpr, STEP: tl.constexpr):
    """K tuples of each token's next ``TOKENS`` entries, [GROUPS] each."""
    result = ()
    for k in tl.static_range(K):
        if STEP.EVEN:
            e = tl.load(at + k * channels)
        else:
            c = start + tl.arange(0, STEP.GROUPS)[:, None] * STEP.CHANNELS + tl.arange(0, STEP.TOKENS)[None, :]
            e = tl.load(at + k * channels, mask=c < channels, other=0.0)
        result = result + (entries(e),)
    return result


@triton.jit
def over_pixels(x, STEP: tl.constexpr):
    """Sums of [GROUPS, PARTS, WIDTH] over pixels, [GROUPS]; [GROUPS, WARPS] where warps lie along pixels."""
    if STEP.INTERLEAVED:
        LANES: tl.constexpr = 32 // STEP.GROUPS
        x = tl.reshape(x, [STEP.GROUPS, STEP.PIXELS // (LANES * STEP.WARPS), STEP.WARPS, LANES])
        total = tl.sum(tl.sum(x, 1), 2)
    else:
        total = tl.sum(tl.sum(x, 1), 1)
    return total


@triton.jit
def over_warps(x):
    """Sums of many channels over what ``over_pixels`` left."""
    if len(x.shape) == 3:
        x = tl.sum(x, 1)
    return x


@triton.jit
def walk(
    features,
    sums_to,
    tile,
    K: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums over a group's channels, [GROUPS, PARTS, WIDTH] each: distance, logits, the student's if customized."""
    t = plane_of(features.teacher, features.teacher_strides, tile, STEP, STEP.INTERLEAVED)
    s = plane_of(features.student, features.student_strides, tile, STEP, STUDENT_INTERLEAVED)
    t_at, s_at = t.at, s.at
    channel = tl.arange(0, STEP.GROUPS)[:, None] * STEP.CHANNELS + tl.arange(0, STEP.TOKENS)[None, :]
    e_at = pick(features.tokens, tile.level) + channel
    CHANNELS: tl.constexpr = STEP.CHANNELS
    to = tl.arange(0, STEP.GROUPS)[:, None] * STEP.CHANNELS + tl.arange(0, STEP.CHANNELS)[None, :]
    sums_to += to
    sums = ()
    for _ in tl.static_range(K + K * CUSTOMIZE + 1):
        sums = sums + (tl.full([STEP.GROUPS, tile.pixel.shape[1], tile.pixel.shape[2]], 0.0, tl.float32),)
    for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
        valid = present(start, tile, STEP)
        ts = vectors_at(t_at, valid)
        if HAS_STUDENT:
            ss = vectors_at(s_at, valid)
        totals = ()
        for j in tl.static_range(CHANNELS):
            if j % STEP.TOKENS == 0:
                tokens = read_tokens(e_at + j, start + j, tile.channels, K, STEP)
            valid = present(start + j, tile, STEP)
            x = element(ts, t, t_at, j, valid)
            distance = sums[0]
            if HAS_STUDENT:
                y = element(ss, s, s_at, j, valid)
                distance += (y - x) * (y - x)
            new = (distance,)
            for k in tl.static_range(K):
                new = new + (sums[1 + k] + tokens[k][j % STEP.TOKENS][:, None, None] * x,)
            if CUSTOMIZE:
                for k in tl.static_range(K):
                    new = new + (sums[1 + K + k] + tokens[k][j % STEP.TOKENS][:, None, None] * y,)
            if SUMS:
                totals = totals + (over_pixels(x, STEP),)
            sums = new
        if SUMS:
            if STEP.EVEN:
                tl.store(sums_to, over_warps(stacked(totals, 0, 1)))
            else:
                left = tile.channels - start - tl.arange(0, STEP.GROUPS)[:, None] * STEP.CHANNELS
                real = tl.arange(0, STEP.CHANNELS)[None, :] < left
                tl.store(sums_to, over_warps(stacked(totals, 0, 1)), mask=real)
        sums_to += STEP.GROUPS * STEP.CHANNELS
        e_at += STEP.GROUPS * STEP.CHANNELS
        t_at += t.step
        s_at += s.step
    return sums


@triton.jit
def walk_by_dot(
    features,
    sums_to,
    tile,
    K_PAD: tl.constexpr,
    K: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
):
    """The same for many tokens: [K_PAD, PIXELS] logits, the student's likewise, [PIXELS] distance."""
    k, p = tl.arange(0, K_PAD), tl.arange(0, STEP.PIXELS)
    t = dot_plane(features.teacher, features.teacher_strides, tile, STEP, STEP.INTERLEAVED)
    s = dot_plane(features.student, features.student_strides, tile, STEP, STUDENT_INTERLEAVED)
    tokens = pick(features.tokens, tile.level)
    logits = tl.full([K_PAD, STEP.PIXELS], 0.0, tl.float32)
    student_logits = logits
    d = tl.full([STEP.CHANNELS, STEP.PIXELS], 0.0, tl.float32)
    t_at, s_at = t.at, s.at
    for start in range(0, tile.end, STEP.CHANNELS):
        c = start + tl.arange(0, STEP.CHANNELS)
        valid = (c < tile.channels)[:, None] & (tile.first + p < tile.pixels)[None, :]
        x = tl.load(t_at, mask=valid, other=0.0).to(tl.float32)  # [CHANNELS, PIXELS]
        e_at = k[:, None] * tile.channels + c[None, :]
        e = tl.load(tokens + e_at, mask=(k < K)[:, None] & (c < tile.channels)[None, :], other=0.0)
        logits = tl.dot(e, x, logits, input_precision=PRECISION)
        if HAS_STUDENT:
            y = tl.load(s_at, mask=valid, other=0.0).to(tl.float32)
            d += (y - x) * (y - x)
            if CUSTOMIZE:
                student_logits = tl.dot(e, y, student_logits, input_precision=PRECISION)
        if SUMS:
            tl.store(sums_to + c, tl.sum(x, 1), mask=c < tile.channels)
        t_at += t.step
        s_at += s.step
    return logits, student_logits, tl.sum(d, 0)


@triton.jit
def dot_plane(pointers, strides, tile, STEP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A map of the tile's level, [CHANNELS, PIXELS] at a time."""
    stride_n, stride = integer(strides.image, tile.level), integer(strides.rest, tile.level)
    if not STEP.NARROW:
        stride_n, stride = aligned(stride_n, WIDE), aligned(stride, WIDE)
    c, p = tl.arange(0, STEP.CHANNELS), tile.first + tl.arange(0, STEP.PIXELS)
    at = pick(pointers, tile.level) + feature_offsets(tile.n, c, p, stride_n, stride, INTERLEAVED)
    step = STEP.CHANNELS
    if not INTERLEAVED:
        step = STEP.CHANNELS * stride.to(tl.int64)
    return Plane(at, stride, step)


@triton.jit
def statistics(
    out,
    customize,
    tile,
    partial,
    total_pixels,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Masks of the tile's logits, which lie where masks go, and sums over them. Threads divide them up anew."""
    tl.debug_barrier()
    # Warps lie along the masks, so that sums over pixels stay within a warp.
    k, p = tl.arange(0, K_PAD)[:, None, None], tl.arange(0, STEP.PIXELS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    if STEP.NARROW:
        inside = tile.first + p < tile.pixels
    else:
        inside = tl.full(p.shape, 1, tl.int1)
    real = (k < K) & inside[None, :, :]
    at = (tile.n * K + k) * total_pixels + (tile.column + p)[None, :, :]
    m = tl.load(out.masks + at, mask=real, other=0.0)
    if CUSTOMIZE:
        teacher = tl.load(out.teacher_masks + at, mask=real, other=0.0)
    tl.debug_barrier()
    m = tl.where(real, tl.sigmoid(m), 0.0)  # [K_PAD, PIXELS / 32, 32]
    if CUSTOMIZE:
        teacher = tl.where(real, tl.sigmoid(teacher), 0.0)
        tl.store(out.teacher_masks + at, teacher, mask=real)
        m = tl.where(tl.load(customize) != 0, teacher * m, teacher)
    tl.store(out.masks + at, m, mask=real)
    k = tl.arange(0, K_PAD)
    tl.store(partial + k, tl.sum(tl.sum(m, 1), 1), mask=k < K)
    if HAS_STUDENT:
        d = tl.load(out.distance + tile.n * total_pixels + (tile.column + p), mask=inside, other=0.0)
        tl.store(partial + K + k, tl.sum(tl.sum(m * m * d[None, :, :], 1), 1), mask=k < K)
    partial += 2 * K
    if K_PAD < 16:
        tl.debug_barrier()
        for j in tl.static_range(K):
            other = tl.load(out.masks + (tile.n * K + j) * total_pixels + (tile.column + p), mask=inside, other=0.0)
            tl.store(partial + k * K + j, tl.sum(tl.sum(m * other[None, :, :], 1), 1), mask=k < K)
    else:
        m = tl.reshape(m, [K_PAD, STEP.PIXELS])
        gram = tl.dot(m, tl.trans(m), input_precision=PRECISION)
        tl.store(partial + k[:, None] * K + k[None, :], gram, mask=(k < K)[:, None] & (k < K)[None, :])


@triton.jit
def border(pointers, strides, borders, levels, places, index, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Sums over one of the lines of an image's border, of some channels."""
    n = tl.program_id(1).to(tl.int64)
    line = index % LINES
    level = index // LINES % len(levels.channels)
    c = index // (LINES * len(levels.channels)) * BLOCK + tl.arange(0, BLOCK)
    width, pixels = integer(places.widths, level), integer(levels.pixels, level)
    last = tl.where((line == 1) | (line >= 6), pixels - width, 0)  # the row; columns begin in the first
    first = last + tl.where((line == 3) | (line == 5) | (line == 7), width - 1, 0)
    size = tl.where(line < 2, width, tl.where(line < 4, pixels // tl.maximum(width, 1), 1))
    size = tl.where((width > 0) & (pixels > 0), size, 0)
    stride_p, stride_c = tl.full([], 1, tl.int64), integer(strides.rest, level).to(tl.int64)
    if INTERLEAVED:
        stride_p, stride_c = stride_c, stride_p
    at = pick(pointers, level) + n * integer(strides.image, level) + first * stride_p + c * stride_c
    stride_p *= tl.where(line < 2, 1, width)
    channels = integer(levels.channels, level)
    total = tl.zeros([8, BLOCK], tl.float32)
    for start in range(0, size, 8):
        i = start + tl.arange(0, 8)
        valid = (i < size)[:, None] & (c < channels)[None, :]
        total += tl.load(at[None, :] + i[:, None] * stride_p, mask=valid, other=0.0).to(tl.float32)
    total = tl.sum(total, 0)
    to = (n * LINES + line) * decode(places.total_channels) + integer(places.channel_offsets, level) + c
    tl.store(borders + to, total, mask=c < channels)


@triton.jit
def forward_tile(
    features,
    out,
    customize,
    levels,
    places,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_AT: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = tile_of(tl.program_id(0), levels, places, STEP)
    partial = out.partials + partial_row(tl.program_id(0), tile.n, tile.level, levels) * decode(places.row_size)
    total_pixels = decode(places.total_pixels)
    d_at = out.distance + tile.n * total_pixels + tile.column
    if STEP.TOKENS > 0:
        sums = walk(
            features,
            partial + SUMS_AT,
            tile,
            K,
            HAS_STUDENT,
            CUSTOMIZE,
            SUMS,
            STUDENT_INTERLEAVED,
            STEP,
        )
        pixel, exists = tl.sum(tile.pixel, 0), tl.sum(tile.exists.to(tl.int32), 0) > 0
        for k in tl.static_range(K + K * CUSTOMIZE):
            masks = out.teacher_masks if CUSTOMIZE and k < K else out.masks
            to = masks + (tile.n * K + k % K) * total_pixels + tile.column
            tl.store(to + pixel, tl.sum(sums[1 + k], 0), mask=exists)
        if HAS_STUDENT:
            tl.store(d_at + pixel, tl.sum(sums[0], 0), mask=exists)
    else:
        logits, student_logits, d = walk_by_dot(
            features,
            partial + SUMS_AT,
            tile,
            K_PAD,
            K,
            HAS_STUDENT,
            CUSTOMIZE,
            SUMS,
            STUDENT_INTERLEAVED,
            STEP,
        )
        k, p = tl.arange(0, K_PAD), tl.arange(0, STEP.PIXELS)
        inside = tile.first + p < tile.pixels
        to = (tile.n * K + k[:, None]) * total_pixels + (tile.column + p)[None, :]
        real = (k < K)[:, None] & inside[None, :]
        if CUSTOMIZE:
            tl.store(out.teacher_masks + to, logits, mask=real)
            tl.store(out.masks + to, student_logits, mask=real)
        else:
            tl.store(out.masks + to, logits, mask=real)
        if HAS_STUDENT:
            tl.store(d_at + p, d, mask=inside)
    if K > 0:
        statistics(out, customize, tile, partial, total_pixels, K, K_PAD, HAS_STUDENT, CUSTOMIZE, STEP)


@triton.jit
def forward_kernel(
    features,  # Features
    out,  # Results
    customize,  # [] bool
    levels,
    places,  # Places
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_AT: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
    NARROW_STEP: tl.constexpr,  # where rows are not whole vectors, or pixels are missing
    BORDER_C: tl.constexpr,
):
    tiles = decode(levels.first_tile[len(levels.tiles) - 1]) + decode(levels.tiles[len(levels.tiles) - 1])
    if tl.program_id(0) < tiles:
        for narrow in tl.static_range(2):
            if is_wide(tl.program_id(0), levels, STEP.PIXELS) != narrow:
                forward_tile(
                    features,
                    out,
                    customize,
                    levels,
                    places,
                    K,
                    K_PAD,
                    HAS_STUDENT,
                    CUSTOMIZE,
                    SUMS,
                    SUMS_AT,
                    STUDENT_INTERLEAVED,
                    NARROW_STEP if narrow else STEP,
                )
    elif SUMS:
        index = tl.program_id(0) - tiles
        border(
            features.teacher,
            features.teacher_strides,
            out.borders,
            levels,
            places,
            index,
            BORDER_C,
            STEP.INTERLEAVED,
        )


class Reduced(NamedTuple):
    """Sums over all tiles of an image."""

    mass: Any  # [levels, N, K]
    error: Any  # [levels, N, K]
    gram: Any  # [levels, N, K, K]
    sums: Any  # [N, 9, total C]


@triton.jit
def reduce_stats_kernel(
    partials,  # [N * tiles, row_size] of forward_kernel
    borders,  # [N, LINES, total C]
    out,  # Reduced
    levels,
    places,
    K: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    SUMS_AT: tl.constexpr,  # a multiple of BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    level = tl.program_id(2)
    tiles, channels = integer(levels.tiles, level), integer(levels.channels, level)
    row = (tl.num_programs(1) * integer(levels.first_tile, level) + n * tiles).to(tl.int64)
    statistic = tl.program_id(0) * BLOCK < SUMS_AT
    written = i < tl.where(statistic, 2 * K + K * K, SUMS_AT + channels)  # the rest is padding
    partial = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, tiles, ROWS):
        r = start + tl.arange(0, ROWS)
        at = (row + r[:, None]) * decode(places.row_size) + i[None, :]
        partial += tl.load(partials + at, mask=(r < tiles)[:, None] & written[None, :], other=0.0)
    total = tl.sum(partial, 0)
    at = level * tl.num_programs(1) + n
    if statistic:
        if K > 0:
            tl.store(out.mass + at * K + i, total, mask=i < K)
            if HAS_STUDENT:
                tl.store(out.error + at * K + (i - K), total, mask=(i >= K) & (i < 2 * K))
            tl.store(out.gram + at * (K * K) + (i - 2 * K), total, mask=(i >= 2 * K) & (i < 2 * K + K * K))
    else:
        total_channels = decode(places.total_channels)
        c = integer(places.channel_offsets, level) + i - SUMS_AT
        lines = borders + n * LINES * total_channels + c
        for tap in tl.static_range(9):
            # The tap above the centre misses the last row, the one left of it the last column.
            MISSED_ROW = (1, -1, 0)[tap // 3]
            MISSED_COLUMN = (3, -1, 2)[tap % 3]
            value = total
            if MISSED_ROW >= 0:
                value -= tl.load(lines + MISSED_ROW * total_channels, mask=written, other=0.0)
            if MISSED_COLUMN >= 0:
                value -= tl.load(lines + MISSED_COLUMN * total_channels, mask=written, other=0.0)
            if MISSED_ROW >= 0 and MISSED_COLUMN >= 0:
                CORNER = 4 + 2 * MISSED_ROW + (MISSED_COLUMN - 2)
                value += tl.load(lines + CORNER * total_channels, mask=written, other=0.0)
            tl.store(out.sums + (n * 9 + tap) * total_channels + c, value, mask=written)


class Upstream(NamedTuple):
    """Gradients of the results."""

    masks: Any  # [N, K, total P]
    distance: Any  # [N, total P]
    mass: Any  # [levels, N, K]
    error: Any  # [levels, N, K]
    gram: Any  # [levels, N, K, K]
    lines: Any  # [N, 1 + LINES, total C]: of lines_kernel


class Gradients(NamedTuple):
    """What the backward pass writes; maps are dense, laid out like the student where there is one."""

    teacher: Any  # tuple: [N, C, P]
    student: Any  # tuple: [N, C, P]
    logits: Any  # [N, K + 1, total P]: of logits, and the factor of the difference of the two maps
    tokens: Any  # [N * tiles, row_size], [K, C] in each row


class Given(NamedTuple):
    """Which gradients of the results there are."""

    masks: bool
    distance: bool
    mass: bool
    error: bool
    gram: bool
    sums: bool


class Wanted(NamedTuple):
    teacher: bool
    tokens: bool
    student: bool


@triton.jit(do_not_specialize=["total_channels"])
def lines_kernel(grad_sums, lines, total_channels, BLOCK: tl.constexpr):
    """The gradient of each pixel, ``lines[n, 0]``, and what comes to it on each of the image's border lines."""
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    taps = ()
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(9):
        taps = taps + (read(grad_sums + (n * 9 + tap) * total_channels + c, c < total_channels),)
        total += taps[tap]
    # The tap above the centre misses the last row, the one left of it the last column.
    lost = (
        total,
        -(taps[6] + taps[7] + taps[8]),
        -(taps[0] + taps[1] + taps[2]),
        -(taps[2] + taps[5] + taps[8]),
        -(taps[0] + taps[3] + taps[6]),
        taps[8],
        taps[6],
        taps[2],
        taps[0],
    )
    for line in tl.static_range(9):
        tl.store(lines + (n * 9 + line) * total_channels + c, lost[line], mask=c < total_channels)


@triton.jit
def logit_gradients(
    saved,
    grad,
    to,
    tile,
    total_pixels,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    STEP: tl.constexpr,
):
    """The tile's gradients of the logits and, as one more, ``pixel_factor``, put where all threads find them."""
    k, p = tl.arange(0, K_PAD), tl.arange(0, STEP.PIXELS)
    at_level = tile.level * tl.num_programs(1) + tile.n
    column = tile.column + p
    inside = tile.first + p < tile.pixels
    real = (k < K)[:, None] & inside[None, :]
    at = (tile.n * K + k[:, None]) * total_pixels + column[None, :]
    m = read(saved.masks + at, real)  # [K_PAD, PIXELS]
    inner = tl.full([K_PAD, STEP.PIXELS], 0.0, tl.float32)
    difference = tl.full([STEP.PIXELS], 0.0, tl.float32)
    if GIVEN.distance:
        difference += read(grad.distance + tile.n * total_pixels + column, inside)
    if GIVEN.mass:
        inner += read(grad.mass + at_level * K + k, k < K)[:, None]
    if GIVEN.error:
        d = read(saved.distance + tile.n * total_pixels + column, inside)
        error = read(grad.error + at_level * K + k, k < K)[:, None] * m
        inner += 2 * error * d[None, :]
        difference += tl.sum(error * m, 0)
    if GIVEN.gram:
        gram = grad.gram + at_level * K * K
        if K_PAD < 16:
            for j in tl.static_range(K):
                other = read(saved.masks + (tile.n * K + j) * total_pixels + column, inside)
                inner += (read(gram + k * K + j, k < K) + read(gram + j * K + k, k < K))[:, None] * other[None, :]
        else:
            both = (k < K)[:, None] & (k < K)[None, :]
            g = read(gram + k[:, None] * K + k[None, :], both) + read(gram + k[None, :] * K + k[:, None], both)
            inner = tl.dot(g, m, inner, input_precision=PRECISION)
    if GIVEN.masks:
        inner += read(grad.masks + at, real)
    factor = m
    if CUSTOMIZE:
        factor = read(saved.teacher_masks + at, real)
    to += tile.n * (K + 1) * total_pixels
    tl.store(to + k[:, None] * total_pixels + column[None, :], inner * m * (1 - factor), mask=real)
    tl.store(to + K * total_pixels + column, 2 * difference, mask=inside)
    tl.debug_barrier()


@triton.jit
def pixel_factor(saved, grad, tile, total_pixels, K: tl.constexpr, GIVEN: tl.constexpr):
    """What the difference of the two maps is multiplied by, [1, PARTS, WIDTH]."""
    factor = tl.full(tile.pixel.shape, 0.0, tl.float32)
    column = tile.column + tile.pixel
    if GIVEN.distance:
        factor += read(grad.distance + tile.n * total_pixels + column, tile.exists)
    if GIVEN.error:
        g = grad.error + (tile.level * tl.num_programs(1) + tile.n) * K
        for k in tl.static_range(K):
            m = read(saved.masks + (tile.n * K + k) * total_pixels + column, tile.exists)
            factor += tl.load(g + k) * m * m
    return 2 * factor


@triton.jit
def on_lines(tile, places, STEP: tl.constexpr):
    """Which of the tile's pixels lie on which line of the image's border, 1 or 0; rows where the tile is narrow."""
    width = integer(places.widths, tile.level)
    p = tile.first + tile.pixel
    x, image = p % tl.maximum(width, 1), condition(width > 0)
    left, right = (image & (x == 0)).to(tl.float32), (image & (x == width - 1)).to(tl.float32)
    if STEP.NARROW:
        top, bottom = (p < width).to(tl.float32), (image & (p >= tile.pixels - width)).to(tl.float32)
        result = (top, bottom, left, right, top * left, top * right, bottom * left, bottom * right)
    else:
        result = (left, right)
    return result


@triton.jit
def write_channel(at, rest, value, j: tl.constexpr, valid):
    """A step's channel j of each group, in the dtype of the memory."""
    tl.store(at + j * rest, value.to(at.dtype.element_ty), mask=valid)


@triton.jit
def result_plane(pointers, tile, STEP: tl.constexpr):
    """A dense map of the tile's level, laid out as the tile is walked, to be written."""
    pixels = tile.pixels
    if not (STEP.NARROW or STEP.INTERLEAVED):
        pixels = aligned(pixels, WIDE)
    pointer = pick(pointers, tile.level) + tile.n * (tile.pixels.to(tl.int64) * tile.channels)
    if STEP.INTERLEAVED and not STEP.NARROW:
        pixel = (tile.first + tl.arange(0, STEP.PIXELS)[None, None, :, None]).to(tl.int64) * tile.channels
        channel = tl.arange(0, STEP.GROUPS)[:, None, None, None] * STEP.CHANNELS
        plane = Plane(pointer + (pixel + channel + tl.arange(0, STEP.CHANNELS)[None, None, None, :]), 1, 0)
    elif STEP.INTERLEAVED:
        plane = Plane(pointer + ((tile.first + tile.pixel).to(tl.int64) * tile.channels + tile.group), 1, 0)
    else:
        rest = pixels.to(tl.int64)
        plane = Plane(pointer + tile.first + (tile.group * rest + tile.pixel), rest, 0)
    step = STEP.GROUPS * STEP.CHANNELS * plane.rest
    return Plane(plane.at, plane.rest, step)


class Targets(NamedTuple):
    """Gradients of the maps, and what their walk needs to know of ``Upstream.lines``."""

    teacher: Any
    student: Any
    line_step: Any


@triton.jit
def is_edge(index, levels, places, PIXELS: tl.constexpr):
    """Whether a tile touches the first or last row of an image: 1 or 0."""
    level = level_of(index, levels)
    first, width = (index - integer(levels.first_tile, level)) * PIXELS, integer(places.widths, level)
    return ((first < width) | (first + PIXELS > integer(levels.pixels, level) - width)).to(tl.int32)


@triton.jit
def walk_back(
    features,
    out,
    lines,
    tile,
    factor,
    slopes,
    borders,
    tokens_to,
    K: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    WANTED: tl.constexpr,
    T_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of the maps and, of few tokens, of these: ``slopes`` are those of the logits, a tuple."""
    LOGITS: tl.constexpr = K if WANTED.teacher or WANTED.tokens else 0
    LINE: tl.constexpr = 1 if STEP.NARROW else 3
    CHANNELS: tl.constexpr = STEP.CHANNELS
    t = plane_of(features.teacher, features.teacher_strides, tile, STEP, T_INTERLEAVED)
    s = plane_of(features.student, features.student_strides, tile, STEP, STEP.INTERLEAVED)
    to_t, to_s = result_plane(out.teacher, tile, STEP), result_plane(out.student, tile, STEP)
    t_at, s_at, to_t_at, to_s_at = t.at, s.at, to_t.at, to_s.at
    channel = tl.arange(0, STEP.GROUPS)[:, None] * STEP.CHANNELS + tl.arange(0, STEP.TOKENS)[None, :]
    e_at = pick(features.tokens, tile.level) + channel
    group = tl.arange(0, STEP.GROUPS) * STEP.CHANNELS
    for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
        valid = present(start, tile, STEP)
        if HAS_STUDENT or WANTED.tokens:
            ts = vectors_at(t_at, valid)
        if HAS_STUDENT:
            ss = vectors_at(s_at, valid)
        all_t, all_s, sums = (), (), ()
        for j in tl.static_range(CHANNELS):
            if j % STEP.TOKENS == 0 and WANTED.teacher:
                tokens = read_tokens(e_at + j, start + j, tile.channels, LOGITS, STEP)
            valid = present(start + j, tile, STEP)
            if HAS_STUDENT or WANTED.tokens:
                x = element(ts, t, t_at, j, valid)
            if HAS_STUDENT:
                d = factor * (element(ss, s, s_at, j, valid) - x)
                if WANTED.student:
                    if len(to_s_at.shape) == 4:
                        all_s = all_s + (d,)
                    else:
                        write_channel(to_s_at, to_s.rest, d, j, valid)
            if WANTED.teacher:
                if HAS_STUDENT:
                    gradient = -d
                else:
                    gradient = tl.full([STEP.GROUPS, tile.pixel.shape[1], tile.pixel.shape[2]], 0.0, tl.float32)
                if len(borders) > 0:
                    c = start + j + group
                    gradient += read(lines + c, c < tile.channels)[:, None, None]
                    for i in tl.static_range(len(borders)):
                        at = lines + (LINE + i) * out.line_step + c
                        gradient += read(at, c < tile.channels)[:, None, None] * borders[i]
                for k in tl.static_range(LOGITS):
                    gradient += tokens[k][j % STEP.TOKENS][:, None, None] * slopes[k]
                if len(to_t_at.shape) == 4:
                    all_t = all_t + (gradient,)
                else:
                    write_channel(to_t_at, to_t.rest, gradient, j, valid)
            if WANTED.tokens:
                for k in tl.static_range(8):
                    if k < K:
                        total = over_pixels(slopes[k] * x, STEP)
                    sums = sums + (total,)
        if len(to_s_at.shape) == 4 and WANTED.student:
            write_channel(to_s_at, 0, stacked(all_s, 0, 1), 0, valid[:, :, :, None])
        if len(to_t_at.shape) == 4 and WANTED.teacher:
            write_channel(to_t_at, 0, stacked(all_t, 0, 1), 0, valid[:, :, :, None])
        if WANTED.tokens:
            i = tl.arange(0, 8 * CHANNELS)
            c, k = start + group[:, None] + (i // 8)[None, :], (i % 8)[None, :]
            to, real = k * tile.channels + c, (k < K) & (c < tile.channels)
            tl.store(tokens_to + to, over_warps(stacked(sums, 0, 1)), mask=real)
        e_at += STEP.GROUPS * STEP.CHANNELS
        t_at += t.step
        s_at += s.step
        to_t_at += to_t.step
        to_s_at += to_s.step


@triton.jit
def walk_back_by_dot(
    features,
    out,
    lines,
    tile,
    factor,
    slopes,
    borders,
    tokens_to,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    WANTED: tl.constexpr,
    T_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
):
    """The same for many tokens: ``slopes`` [K_PAD, PIXELS], ``factor`` and ``borders`` [PIXELS]."""
    k, p = tl.arange(0, K_PAD), tl.arange(0, STEP.PIXELS)
    t = dot_plane(features.teacher, features.teacher_strides, tile, STEP, T_INTERLEAVED)
    s = dot_plane(features.student, features.student_strides, tile, STEP, STEP.INTERLEAVED)
    t_at, s_at = t.at, s.at
    tokens = pick(features.tokens, tile.level)
    image = tile.n * (tile.pixels.to(tl.int64) * tile.channels)
    to_t, to_s = pick(out.teacher, tile.level) + image, pick(out.student, tile.level) + image
    stride = tile.pixels
    if STEP.INTERLEAVED:
        stride = tile.channels
    for start in range(0, tile.end, STEP.CHANNELS):
        c = start + tl.arange(0, STEP.CHANNELS)
        valid = (c < tile.channels)[:, None] & (tile.first + p < tile.pixels)[None, :]
        to = feature_offsets(0, c, tile.first + p, 0, stride, STEP.INTERLEAVED)
        x = read(t_at, valid)  # [CHANNELS, PIXELS]
        gradient = tl.full([STEP.CHANNELS, STEP.PIXELS], 0.0, tl.float32)
        if HAS_STUDENT:
            d = factor[None, :] * (read(s_at, valid) - x)
            gradient -= d
            if WANTED.student:
                tl.store(to_s + to, d.to(to_s.dtype.element_ty), mask=valid)
        if WANTED.tokens:
            d_tokens = tl.dot(slopes, tl.trans(x), input_precision=PRECISION)  # [K_PAD, CHANNELS]
            at = k[:, None] * tile.channels + c[None, :]
            tl.store(tokens_to + at, d_tokens, mask=(k < K)[:, None] & (c < tile.channels)[None, :])
        if WANTED.teacher:
            e_at = k[None, :] * tile.channels + c[:, None]
            e = read(tokens + e_at, (k < K)[None, :] & (c < tile.channels)[:, None])
            gradient = tl.dot(e, slopes, gradient, input_precision=PRECISION)
            if len(borders) > 0:
                gradient += read(lines + c, c < tile.channels)[:, None]
                for i in tl.static_range(len(borders)):
                    at = lines + (i + (1 if STEP.NARROW else 3)) * out.line_step + c
                    on = tl.reshape(borders[i], [STEP.PIXELS])
                    gradient += read(at, c < tile.channels)[:, None] * on[None, :]
            tl.store(to_t + to, gradient.to(to_t.dtype.element_ty), mask=valid)
        t_at += t.step
        s_at += s.step


@triton.jit
def backward_tile(
    features,
    saved,
    grad,
    out,
    levels,
    places,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    WANTED: tl.constexpr,
    T_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
):
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = tile_of(index, levels, places, STEP)
    total_pixels = decode(places.total_pixels)
    tokens_to = out.tokens + partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
    line_step = decode(places.total_channels)
    lines = grad.lines + tile.n * (9 * line_step) + integer(places.channel_offsets, tile.level)
    LOGITS: tl.constexpr = K > 0 and (WANTED.teacher or WANTED.tokens)
    targets = Targets(out.teacher, out.student, line_step)
    borders = ()
    if GIVEN.sums and WANTED.teacher:
        borders = on_lines(tile, places, STEP)
    if LOGITS:
        logit_gradients(saved, grad, out.logits, tile, total_pixels, K, K_PAD, CUSTOMIZE, GIVEN, STEP)
    slopes_at = out.logits + tile.n * (K + 1) * total_pixels + tile.column
    if STEP.TOKENS > 0:
        slopes = ()
        if LOGITS:
            for k in tl.static_range(K):
                slopes = slopes + (read(slopes_at + k * total_pixels + tile.pixel, tile.exists),)
            factor = read(slopes_at + K * total_pixels + tile.pixel, tile.exists)
        else:
            factor = pixel_factor(saved, grad, tile, total_pixels, K, GIVEN)
        walk_back(
            features,
            targets,
            lines,
            tile,
            factor,
            slopes,
            borders,
            tokens_to,
            K,
            HAS_STUDENT,
            WANTED,
            T_INTERLEAVED,
            STEP,
        )
    else:
        k, p = tl.arange(0, K_PAD), tl.arange(0, STEP.PIXELS)
        inside = tile.first + p < tile.pixels
        slopes = read(slopes_at + k[:, None] * total_pixels + p[None, :], (k < K)[:, None] & inside[None, :])
        factor = read(slopes_at + K * total_pixels + p, inside)
        walk_back_by_dot(
            features,
            targets,
            lines,
            tile,
            factor,
            slopes,
            borders,
            tokens_to,
            K,
            K_PAD,
            HAS_STUDENT,
            WANTED,
            T_INTERLEAVED,
            STEP,
        )


@triton.jit
def backward_kernel(
    features,  # Features
    saved,  # Results of the forward pass
    grad,  # Upstream
    out,  # Gradients
    levels,
    places,  # Places
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    WANTED: tl.constexpr,
    T_INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr,
    NARROW_STEP: tl.constexpr,
):
    # From the last tile on: the forward pass left it in the cache.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    wide = is_wide(index, levels, STEP.PIXELS)
    if GIVEN.sums and WANTED.teacher:
        wide &= 1 - is_edge(index, levels, places, STEP.PIXELS)
    for narrow in tl.static_range(2):
        if wide != narrow:
            backward_tile(
                features,
                saved,
                grad,
                out,
                levels,
                places,
                K,
                K_PAD,
                HAS_STUDENT,
                CUSTOMIZE,
                GIVEN,
                WANTED,
                T_INTERLEAVED,
                NARROW_STEP if narrow else STEP,
            )


# ---- Launchers ---------------------------------------------------------------------------------

FEW_LOGITS = 16  # of a pixel, that multiply-adds serve: more of them, and tensor cores do
PIXEL_LOGITS = 8  # up to as many, a thread has eight pixels: otherwise four, as registers are few
WARPS = 4
BORDER_C = 128  # channels of a program that adds up a line


def forward_step(maps: Maps, logits: int, narrow: bool) -> Step:
    """A thread reads 128 bits at a time, where it can; as many warps as may be, so none has more than 128 registers."""
    half, interleaved, many = _element_size(maps) == 2, maps[0][0].interleaved, logits > PIXEL_LOGITS
    if logits > FEW_LOGITS:
        shape = 1, 16 if narrow or not half else 32, 0, 64, 64
    elif interleaved:
        shape = 4, 4 if narrow or not half else 8, 2 if many else 4, 128, 128
    elif half and not narrow and not many:
        shape = 2 * WARPS, 2, 2, 128, 128
    else:
        shape = WARPS, 2 if narrow else 8, 2 if narrow or logits > 6 else 4, 128, 32 if narrow else 128
    return _step(maps, *shape, narrow, interleaved)


def backward_step(maps: Maps, logits: int, narrow: bool) -> Step:
    """Likewise; laid out as the gradients are. Where gradients of logits are wanted, few lanes share a channel."""
    half, interleaved = _element_size(maps) == 2, maps[0][-1].interleaved
    if logits > PIXEL_LOGITS:
        shape = 1, 32, 0, 32 if half else 64, 32 if half else 64
    elif interleaved:
        shape = 8, 2 if narrow else 8 if half else 4, 2, 64, 64
    elif logits:
        shape = (WARPS, 1, 1, 64, 32) if narrow else (4 * WARPS, 2, 2, 64, 64 if half else 32)
    else:
        shape = (2 if half else 1) * WARPS, 2 if narrow else 4, 2, 128, 32 if narrow else 128
    return _step(maps, *shape, narrow, interleaved)


def _step(
    maps: Maps, groups: int, own: int, tokens: int, pixels: int, width: int, narrow: bool, interleaved: bool
) -> Step:
    channels = [level[0].shape[1] for level in maps]
    alike, dense = len(set(channels)) == 1, all(m.rest_stride == m.shape[1] for level in maps for m in level)
    even = all(c % (groups * own) == 0 for c in channels)
    return Step(
        groups,
        own,
        tokens,
        pixels,
        width,
        WARPS,
        narrow,
        interleaved,
        even,
        channels[0] if alike else 0,
        alike and dense,
    )


def _element_size(maps: Maps) -> int:
    return max(m.tensor.element_size() for m in maps[0])


def pad_tokens(num_tokens: int) -> int:
    """Rows of the tiles that hold tokens: tl.dot's 16 at least."""
    return max(16, int(triton.next_power_of_2(num_tokens)))


def _dense(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Maps:
    """Per level its teacher, and its student where there is one. Their layouts may differ."""
    levels = zip(teacher, student, strict=True) if student else zip(teacher, strict=True)
    return [tuple(layout.dense_view(x) for x in level) for level in levels]


def _features(maps: Maps, tokens: Sequence[Tensor]) -> Features:
    """Of a run of levels."""
    t, s = [level[0] for level in maps], [level[-1] for level in maps]
    embeddings = tuple(e.contiguous() for e in tokens) if tokens else pointers(t)
    return Features(pointers(t), pointers(s), embeddings, strides_of(t), strides_of(s))


def _places(teacher: Sequence[Tensor], maps: Maps, run: slice, total_pixels: int, row_size: int) -> Places:
    channels = [level[0].shape[1] for level in maps]
    return Places(
        encode([x.shape[3] if x.dim() == 4 else 0 for x in teacher[run]]),
        encode(offsets([level[0].shape[2] for level in maps])[run]),
        encode(offsets(channels)[run]),
        *encode([total_pixels, sum(channels), row_size]),
    )


@recalled
def forward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    customize: Tensor | None,
    out: ReceptiveStats,
) -> None:
    maps, n = _dense(teacher, student), teacher[0].shape[0]
    k, wants_sums = tokens[0].shape[0] if tokens else 0, out.sums.numel() > 0
    customized = customize is not None and k > 0 and len(student) > 0
    logits = k * (1 + customized)  # of a pixel
    few = logits <= FEW_LOGITS
    for run, run_maps in runs(maps):
        step, narrow = (forward_step(run_maps, logits, narrow) for narrow in (False, True))
        levels, channels = as_levels(run_maps, step.PIXELS), max(level[0].shape[1] for level in run_maps)
        # The sums start on a whole block of the second kernel.
        sums_at = triton.cdiv(2 * k + k * k, 64) * 64
        row_size = sums_at + (channels if wants_sums else 0)
        partials = new_partials(levels, n, row_size, teacher[0])
        borders = empty(partials, n, LINES.value, sum(x.shape[1] for x in teacher) if wants_sums else 0)
        places = _places(teacher, maps, run, out.masks.shape[2], row_size)
        lines = LINES.value * len(run_maps) * triton.cdiv(channels, BORDER_C) if wants_sums else 0
        if n and sum(levels.tiles) + lines:
            launch(
                forward_kernel,
                (sum(levels.tiles) + lines, n),
                _features(run_maps, tokens[run]),
                Results(out.masks, out.teacher_masks, out.distance, borders, partials),
                out.mass if customize is None else customize,
                levels.encoded(),
                places,
                K=k,
                K_PAD=8 if k <= 8 else pad_tokens(k),
                HAS_STUDENT=len(student) > 0,
                CUSTOMIZE=customized,
                SUMS=wants_sums,
                SUMS_AT=sums_at,
                STUDENT_INTERLEAVED=run_maps[0][-1].interleaved,
                STEP=step,
                NARROW_STEP=narrow,
                BORDER_C=BORDER_C,
                num_warps=step.WARPS,
                maxnreg=(128 if logits <= PIXEL_LOGITS else 168) if few else None,
            )
        if n and row_size:
            block, rows = reduce_shape(row_size)
            launch(
                reduce_stats_kernel,
                (triton.cdiv(row_size, block), n, len(levels.tiles)),
                partials,
                borders,
                Reduced(
                    of_run(out.mass, run),
                    of_run(out.error, run) if student else out.mass,
                    of_run(out.gram, run),
                    out.sums,
                ),
                levels.encoded(),
                places,
                K=k,
                HAS_STUDENT=len(student) > 0,
                SUMS_AT=sums_at,
                ROWS=rows,
                BLOCK=block,
                num_warps=4,
            )


@recalled
def backward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    saved: ReceptiveStats,
    grad: Sequence[Tensor | None],
    results: tuple[list[Tensor], list[Tensor], list[Tensor]],
) -> None:
    grad_masks, _, grad_distance, grad_mass, grad_error, grad_gram, grad_sums = grad
    grad_teacher, grad_tokens, grad_student = results
    maps, n = _dense(teacher, student), teacher[0].shape[0]
    k, nothing, total_channels = tokens[0].shape[0] if tokens else 0, saved.masks, sum(x.shape[1] for x in teacher)
    wanted = Wanted(bool(grad_teacher), bool(grad_tokens), bool(grad_student))
    logits = k if wanted.teacher or wanted.tokens else 0
    has = Given(
        masks=grad_masks is not None,
        distance=grad_distance is not None,
        mass=grad_mass is not None,
        error=grad_error is not None and len(student) > 0,
        gram=grad_gram is not None,
        sums=grad_sums is not None,
    )
    slopes, lines = empty(nothing, n, k + 1, nothing.shape[2]) if logits else nothing, nothing
    if grad_sums is not None and wanted.teacher and n:
        lines = empty(grad_sums, n, 1 + LINES.value, total_channels)
        grid = triton.cdiv(total_channels, BORDER_C), n
        launch(lines_kernel, grid, grad_sums, lines, total_channels, BLOCK=BORDER_C)

    def given(x: Tensor | None, run: slice) -> Tensor:
        return nothing if x is None else of_run(x, run)

    for run, run_maps in runs(maps):
        step, narrow = (backward_step(run_maps, logits, narrow) for narrow in (False, True))
        levels, own = as_levels(run_maps, step.PIXELS), pointers([level[0] for level in run_maps])
        row_size = k * max(levels.channels) if grad_tokens else 0
        partials = new_partials(levels, n, row_size, teacher[0])
        places = _places(teacher, maps, run, saved.masks.shape[2], row_size)
        if n and sum(levels.tiles):
            launch(
                backward_kernel,
                (sum(levels.tiles), n),
                _features(run_maps, tokens[run]),
                Results(saved.masks, saved.teacher_masks, saved.distance, nothing, nothing),
                Upstream(
                    nothing if grad_masks is None else grad_masks,
                    nothing if grad_distance is None else grad_distance,
                    given(grad_mass, run),
                    given(grad_error, run),
                    given(grad_gram, run),
                    lines,
                ),
                Gradients(
                    tuple(grad_teacher[run]) if grad_teacher else own,
                    tuple(grad_student[run]) if grad_student else own,
                    slopes,
                    partials,
                ),
                levels.encoded(),
                places,
                K=k,
                K_PAD=8 if k <= 8 else pad_tokens(k),
                HAS_STUDENT=len(student) > 0,
                CUSTOMIZE=saved.teacher_masks.numel() > 0,
                GIVEN=has,
                WANTED=wanted,
                T_INTERLEAVED=run_maps[0][0].interleaved,
                STEP=step,
                NARROW_STEP=narrow,
                num_warps=WARPS,
                maxnreg=128 if step.TOKENS and not logits else None,
            )
        if grad_tokens:
            reduce_tiles(partials, grad_tokens[run], levels, [k * c for c in levels.channels], n, per_image=False)
