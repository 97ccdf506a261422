"""Triton kernels of ``receptive_stats``.

Forward equation, gradients and traffic: csrc/receptive_stats.h and reference.py. How lanes share the features:
blocks.py. Few tokens are served by plain multiply-adds; many take tensor cores, with float32's accuracy by three TF32
products each (``tf32x3``).

Forward, and backward where the student's gradient alone is wanted, a program takes a tile of pixels of one image on one
level and walks its channels. Backward otherwise, it takes some channels and walks pixels, so that sums over pixels,
the tokens' gradients, stay in registers; a kernel before has worked out what is multiplied at each pixel.

Sums over a channel's pixels are those of whole tiles; what taps of the weighting's convolution miss, the borders of
the image, programs of their own add up. Each program writes its own partial sums and a second kernel adds them in a
fixed order, so that results are bitwise repeatable. Float32 arithmetic. Offsets are 64-bit. No autotuning, and nothing
recompiles when image sizes change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.reference import ReceptiveStats
from maskd_kernels.triton import blocks, common
from maskd_kernels.triton.blocks import Step
from maskd_kernels.triton.common import aligned, decode, encode, integer, is_wide, of_run, pick, read
from maskd_kernels.triton.launch import empty, launch, recalled

PRECISION = tl.constexpr("tf32x3")
LINES = tl.constexpr(8)  # of an image's border: first row, last row, first column, last column; their corners
EDGES = tl.constexpr(16)  # what a pixel may lie on: first row (1), last row (2), first column (4), last column (8)
SLOPES_P = 128  # pixels of a program of slopes_kernel, at most
BORDER_C = tl.constexpr(128)  # channels of a program that adds up a line


class Case(NamedTuple):
    """Constants of a kernel."""

    K: int
    K_PAD: int
    DOT: bool  # tensor cores serve so many tokens
    SUMS_AT: int  # the column of the partial sums where those of channels begin


class Results(NamedTuple):
    """Of the forward pass."""

    masks: Any  # [N, K, total P]; logits, until they are complete
    teacher_masks: Any  # [N, K, total P]; None: not customized
    distance: Any  # [N, total P]; None: no student
    borders: Any  # [N, LINES, total C]; None: no sums
    partials: Any  # [N * tiles, row_size]: mass, error, gram, and from SUMS_AT on channel sums


class Places(NamedTuple):
    """Where levels lie in tensors that they share, encoded."""

    widths: Any  # 0: not an image
    pixel_offsets: Any
    channel_offsets: Any
    total_pixels: Any
    total_channels: Any
    row_size: Any  # of partial sums


@triton.jit
def walk(maps, tokens, out, sums_to, tile, CASE: tl.constexpr, STEP: tl.constexpr):
    """Sums over each lane's channels, a tuple of vectors of pixels: distance, logits, the student's logits."""
    CHANNELS: tl.constexpr = STEP.CHANNELS
    K: tl.constexpr = CASE.K
    t, s = blocks.source(maps, 0, tile, STEP), blocks.source(maps, len(maps) - 1, tile, STEP)
    e_at, sums = 0, ()
    if K > 0:
        e_at = pick(tokens, tile.level) + tile.channel
    for _ in tl.static_range(1 + K if out.teacher_masks is None else 1 + 2 * K):
        sums = sums + (blocks.zeros(STEP.VECTOR, STEP),)
    for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
        x = blocks.read_block(t, tile, start, 0, STEP)
        y = x
        if len(maps) > 1:
            y = blocks.read_block(s, tile, start, 0, STEP)
        totals = ()
        for j in tl.static_range(CHANNELS):
            if j % STEP.TOKENS == 0:
                own = ()
                for k in tl.static_range(K):
                    own = own + blocks.read_channels(e_at + k * tile.channels, j, STEP.TOKENS, tile, start, STEP)
            new = (sums[0] + (y[j] - x[j]) * (y[j] - x[j]),)
            for m in tl.static_range(1, len(sums)):
                new = new + (sums[m] + own[(m - 1) % K * STEP.TOKENS + j % STEP.TOKENS] * (y if m > K else x)[j],)
            sums = new
            if out.borders is not None:
                totals = totals + (blocks.over_pixels(x[j], STEP),)
        if out.borders is not None:
            blocks.write_channels(sums_to, totals, tile, start, STEP)
        sums_to += STEP.GROUPS * STEP.CHANNELS
        e_at += STEP.GROUPS * STEP.CHANNELS
        t, s = blocks.next_channels(t), blocks.next_channels(s)
    return sums


@triton.jit
def walk_by_dot(maps, tokens, out, sums_to, tile, CASE: tl.constexpr, STEP: tl.constexpr):
    """The same for many tokens: [PIXELS] distance, [K_PAD, PIXELS] logits, the student's likewise."""
    t, s = blocks.source(maps, 0, tile, STEP), blocks.source(maps, len(maps) - 1, tile, STEP)
    k, e_first = tl.arange(0, CASE.K_PAD), pick(tokens, tile.level)
    logits = tl.full([CASE.K_PAD, STEP.SPAN], 0.0, tl.float32)
    student_logits = logits
    d = tl.full([STEP.GROUPS, STEP.SPAN], 0.0, tl.float32)
    for start in range(0, tile.end, STEP.GROUPS):
        c = start + tl.arange(0, STEP.GROUPS)
        x = matrix(blocks.read_block(t, tile, start, 0, STEP), STEP)
        e_at = k[:, None] * tile.channels + c[None, :]
        e = read(e_first + e_at, (k < CASE.K)[:, None] & (c < tile.channels)[None, :])
        logits = tl.dot(e, x, logits, input_precision=PRECISION)
        if len(maps) > 1:
            y = matrix(blocks.read_block(s, tile, start, 0, STEP), STEP)
            d += (y - x) * (y - x)
            if out.teacher_masks is not None:
                student_logits = tl.dot(e, y, student_logits, input_precision=PRECISION)
        if out.borders is not None:
            tl.store(sums_to + c, tl.sum(x, 1), mask=c < tile.channels)
        t, s = blocks.next_channels(t), blocks.next_channels(s)
    return tl.sum(d, 0), logits, student_logits


@triton.jit
def matrix(block, STEP: tl.constexpr):
    """[CHANNELS, PIXELS] of a block with one element of each lane, as tensor cores take it."""
    return tl.trans(tl.reshape(block[0], [STEP.SPAN, STEP.GROUPS]))


@triton.jit
def lanes(x):
    """The reverse."""
    return (tl.expand_dims(tl.trans(x), 2),)


@triton.jit
def statistics(out, customize, tile, column, partial, total_pixels, CASE: tl.constexpr, STEP: tl.constexpr):
    """Masks of the tile's logits, which lie where masks go, and sums over them. Threads divide them up anew."""
    K: tl.constexpr = CASE.K
    K_PAD: tl.constexpr = CASE.K_PAD
    tl.debug_barrier()
    # Warps lie along the masks, so that sums over pixels stay within a warp.
    k, p = tl.arange(0, K_PAD)[:, None, None], tl.arange(0, STEP.SPAN // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    if STEP.NARROW:
        inside = tile.first + p < tile.pixels
    else:
        inside = tl.full(p.shape, 1, tl.int1)
    real = (k < K) & inside[None, :, :]
    at = (tile.n * K + k) * total_pixels + (column + p)[None, :, :]
    m = tl.load(out.masks + at, mask=real, other=0.0)
    if out.teacher_masks is not None:
        teacher = tl.load(out.teacher_masks + at, mask=real, other=0.0)
    tl.debug_barrier()
    m = tl.where(real, tl.sigmoid(m), 0.0)  # [K_PAD, PIXELS / 32, 32]
    if out.teacher_masks is not None:
        teacher = tl.where(real, tl.sigmoid(teacher), 0.0)
        tl.store(out.teacher_masks + at, teacher, mask=real)
        m = tl.where(tl.load(customize) != 0, teacher * m, teacher)
    tl.store(out.masks + at, m, mask=real)
    k = tl.arange(0, K_PAD)
    tl.store(partial + k, tl.sum(tl.sum(m, 1), 1), mask=k < K)
    if out.distance is not None:
        d = tl.load(out.distance + tile.n * total_pixels + (column + p), mask=inside, other=0.0)
        tl.store(partial + K + k, tl.sum(tl.sum(m * m * d[None, :, :], 1), 1), mask=k < K)
    partial += 2 * K
    if K_PAD < 16:
        tl.debug_barrier()
        for j in tl.static_range(K):
            other = tl.load(out.masks + (tile.n * K + j) * total_pixels + (column + p), mask=inside, other=0.0)
            tl.store(partial + k * K + j, tl.sum(tl.sum(m * other[None, :, :], 1), 1), mask=k < K)
    else:
        m = tl.reshape(m, [K_PAD, STEP.SPAN])
        gram = tl.dot(m, tl.trans(m), input_precision=PRECISION)
        tl.store(partial + k[:, None] * K + k[None, :], gram, mask=(k < K)[:, None] & (k < K)[None, :])


@triton.jit
def border(maps, levels, borders, places, index, INTERLEAVED: tl.constexpr):
    """Sums over one of the lines of an image's border, of some channels."""
    n = tl.program_id(1).to(tl.int64)
    line = index % LINES
    level = index // LINES % len(levels.channels)
    c = index // (LINES * len(levels.channels)) * BORDER_C + tl.arange(0, BORDER_C)
    width, pixels = integer(places.widths, level), integer(levels.pixels, level)
    last = tl.where((line == 1) | (line >= 6), pixels - width, 0)  # the row; columns begin in the first
    first = last + tl.where((line == 3) | (line == 5) | (line == 7), width - 1, 0)
    size = tl.where(line < 2, width, tl.where(line < 4, pixels // tl.maximum(width, 1), 1))
    size = tl.where((width > 0) & (pixels > 0), size, 0)
    stride_p, stride_c = tl.full([], 1, tl.int64), integer(maps[0].strides.rest, level).to(tl.int64)
    if INTERLEAVED:
        stride_p, stride_c = stride_c, stride_p
    at = pick(maps[0].pointers, level) + n * integer(maps[0].strides.image, level)
    at += first * stride_p + c * stride_c
    stride_p *= tl.where(line < 2, 1, width)
    channels = integer(levels.channels, level)
    total = tl.zeros([8, BORDER_C], tl.float32)
    for start in range(0, size, 8):
        i = start + tl.arange(0, 8)
        valid = (i < size)[:, None] & (c < channels)[None, :]
        total += tl.load(at[None, :] + i[:, None] * stride_p, mask=valid, other=0.0).to(tl.float32)
    total = tl.sum(total, 0)
    to = (n * LINES + line) * decode(places.total_channels) + integer(places.channel_offsets, level) + c
    tl.store(borders + to, total, mask=c < channels)


@triton.jit
def forward_kernel(
    maps,  # teacher and student, or teacher
    levels,
    tokens,  # tuple: [K, C]
    out,  # Results
    customize,  # [] bool; None: never
    places,  # Places
    CASE: tl.constexpr,
    STEPS: tl.constexpr,
):
    index = tl.program_id(0)
    tiles = decode(levels.first_tile[len(levels.tiles) - 1]) + decode(levels.tiles[len(levels.tiles) - 1])
    if index < tiles:
        for narrow in tl.static_range(2):
            if is_wide(index, levels, STEPS.WIDE.SPAN) != narrow:
                STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
                forward_tile(index, tl.program_id(1), maps, levels, tokens, out, customize, places, CASE, STEP)
    elif out.borders is not None:
        border(maps, levels, out.borders, places, index - tiles, STEPS.WIDE.LAYOUTS[0])


@triton.jit
def forward_tile(index, n, maps, levels, tokens, out, customize, places, CASE: tl.constexpr, STEP: tl.constexpr):
    K: tl.constexpr = CASE.K
    tile = blocks.tile_of(index, n, levels, 0, STEP)
    column, total_pixels = integer(places.pixel_offsets, tile.level) + tile.first, decode(places.total_pixels)
    partial = out.partials + common.partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
    if out.distance is not None:
        d_at = out.distance + tile.n * total_pixels + column
    if not CASE.DOT:
        sums = walk(maps, tokens, out, partial + CASE.SUMS_AT, tile, CASE, STEP)
        pixel = blocks.pixels_of(STEP.VECTOR, STEP)
        exists = tile.first + pixel < tile.pixels
        for m in tl.static_range(len(sums) - 1):
            masks = out.masks if m + K >= len(sums) - 1 else out.teacher_masks
            to = masks + (tile.n * K + m % K) * total_pixels + column
            tl.store(to + pixel, blocks.over_groups(sums[1 + m]), mask=exists)
        if out.distance is not None:
            tl.store(d_at + pixel, blocks.over_groups(sums[0]), mask=exists)
    else:
        d, logits, student_logits = walk_by_dot(maps, tokens, out, partial + CASE.SUMS_AT, tile, CASE, STEP)
        k, p = tl.arange(0, CASE.K_PAD), tl.arange(0, STEP.SPAN)
        inside = tile.first + p < tile.pixels
        to = (tile.n * K + k[:, None]) * total_pixels + (column + p)[None, :]
        real = (k < K)[:, None] & inside[None, :]
        if out.teacher_masks is not None:
            tl.store(out.teacher_masks + to, logits, mask=real)
            logits = student_logits
        tl.store(out.masks + to, logits, mask=real)
        if out.distance is not None:
            tl.store(d_at + p, d, mask=inside)
    if K > 0:
        statistics(out, customize, tile, column, partial, total_pixels, CASE, STEP)


class Reduced(NamedTuple):
    """Sums over all tiles of an image."""

    mass: Any  # [levels, N, K]
    error: Any  # [levels, N, K]; None: no student
    gram: Any  # [levels, N, K, K]
    sums: Any  # [N, 9, total C]


@triton.jit
def reduce_stats_kernel(
    partials,  # [N * tiles, row_size] of forward_kernel
    borders,  # [N, LINES, total C]; None: no sums
    out,  # Reduced
    levels,
    places,
    CASE: tl.constexpr,  # SUMS_AT is a multiple of BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    K: tl.constexpr = CASE.K
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1).to(tl.int64)
    level = tl.program_id(2)
    tiles, channels = integer(levels.tiles, level), integer(levels.channels, level)
    row = tl.num_programs(1) * integer(levels.first_tile, level) + n * tiles
    statistic = tl.program_id(0) * BLOCK < CASE.SUMS_AT
    written = i < tl.where(statistic, 2 * K + K * K, CASE.SUMS_AT + channels)  # the rest is padding
    if out.error is None:
        written = written & ((i < K) | (i >= 2 * K))  # no error
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
            if out.error is not None:
                tl.store(out.error + at * K + (i - K), total, mask=(i >= K) & (i < 2 * K))
            tl.store(out.gram + at * (K * K) + (i - 2 * K), total, mask=(i >= 2 * K) & (i < 2 * K + K * K))
    elif borders is not None:
        total_channels = decode(places.total_channels)
        c = integer(places.channel_offsets, level) + i - CASE.SUMS_AT
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
    """Gradients of the results, or None."""

    masks: Any  # [N, K, total P]
    distance: Any  # [N, total P]
    mass: Any  # [levels, N, K]
    error: Any  # [levels, N, K]
    gram: Any  # [levels, N, K, K]
    edges: Any  # [N, EDGES, total C] of edges_kernel


class Gradients(NamedTuple):
    """What the backward pass writes, or None; maps are dense, laid out like the student where there is one."""

    teacher: Any  # tuple: [N, C, P]
    student: Any  # tuple: [N, C, P]
    slopes: Any  # [N, tiles, K + 2, SPAN]: of logits, of the difference of the two maps, and which edges pixels are on
    tokens: Any  # [N * tiles, row_size], [K, C] in each row


@triton.jit(do_not_specialize=["total_channels"])
def edges_kernel(grad_sums, edges, total_channels, BLOCK: tl.constexpr):
    """What comes to a pixel from the gradients of the sums, by the edges of the image that it lies on."""
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for edge in tl.static_range(EDGES):
        total = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(9):
            # The tap above the centre misses the last row, the one left of it the last column.
            missed = (edge & (2, 0, 1)[tap // 3]) | (edge & (8, 0, 4)[tap % 3])
            if missed == 0:
                total += read(grad_sums + (n * 9 + tap) * total_channels + c, c < total_channels)
        tl.store(edges + (n * EDGES + edge) * total_channels + c, total, mask=c < total_channels)


@triton.jit
def slopes_kernel(
    levels,
    saved,  # Results of the forward pass
    grad,  # Upstream
    out,  # Gradients
    places,  # Places
    CASE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the logits, and what else the walk over pixels needs of each."""
    K: tl.constexpr = CASE.K
    K_PAD: tl.constexpr = CASE.K_PAD
    index, n = tl.program_id(0) // (SPAN // BLOCK), tl.program_id(1).to(tl.int64)
    level = common.level_of(index, levels)
    k, p = tl.arange(0, K_PAD), tl.arange(0, BLOCK)
    first = (index - integer(levels.first_tile, level)) * SPAN + tl.program_id(0) % (SPAN // BLOCK) * BLOCK
    pixels, total_pixels = integer(levels.pixels, level), decode(places.total_pixels)
    column = integer(places.pixel_offsets, level) + first + p
    inside = first + p < pixels
    at_level = level * tl.num_programs(1) + n
    tile = n * (tl.num_programs(0) // (SPAN // BLOCK)) + index
    to = out.slopes + tile * ((K + 2) * SPAN) + tl.program_id(0) % (SPAN // BLOCK) * BLOCK + p
    difference = tl.full([BLOCK], 0.0, tl.float32)
    if grad.distance is not None:
        difference += read(grad.distance + n * total_pixels + column, inside)
    if K > 0:
        real = (k < K)[:, None] & inside[None, :]
        at = (n * K + k[:, None]) * total_pixels + column[None, :]
        m = read(saved.masks + at, real)  # [K_PAD, PIXELS]
        inner = tl.full([K_PAD, BLOCK], 0.0, tl.float32)
        if grad.mass is not None:
            inner += read(grad.mass + at_level * K + k, k < K)[:, None]
        if grad.error is not None:
            d = read(saved.distance + n * total_pixels + column, inside)
            error = read(grad.error + at_level * K + k, k < K)[:, None] * m
            inner += 2 * error * d[None, :]
            difference += tl.sum(error * m, 0)
        if grad.gram is not None:
            gram = grad.gram + at_level * K * K
            if K_PAD < 16:
                for j in tl.static_range(K):
                    other = read(saved.masks + (n * K + j) * total_pixels + column, inside)
                    both = read(gram + k * K + j, k < K) + read(gram + j * K + k, k < K)
                    inner += both[:, None] * other[None, :]
            else:
                both = (k < K)[:, None] & (k < K)[None, :]
                g = read(gram + k[:, None] * K + k[None, :], both) + read(gram + k[None, :] * K + k[:, None], both)
                inner = tl.dot(g, m, inner, input_precision=PRECISION)
        if grad.masks is not None:
            inner += read(grad.masks + at, real)
        factor = m
        if saved.teacher_masks is not None:
            factor = read(saved.teacher_masks + at, real)
        tl.store(to[None, :] + k[:, None] * SPAN, inner * m * (1 - factor), mask=(k < K)[:, None])
    tl.store(to + K * SPAN, 2 * difference)
    if grad.edges is not None:
        p, image_width = first + p, integer(places.widths, level)
        x, image = p % tl.maximum(image_width, 1), common.condition(image_width > 0)
        rows = (p < image_width).to(tl.int32) + 2 * (image & (p >= pixels - image_width)).to(tl.int32)
        columns = 4 * (image & (x == 0)).to(tl.int32) + 8 * (image & (x == image_width - 1)).to(tl.int32)
        tl.store(to + (K + 1) * SPAN, (rows + columns).to(tl.float32, bitcast=True))


@triton.jit
def pixel_factor(saved, grad, tile, places, CASE: tl.constexpr):
    """What the difference of the two maps is multiplied by, of each lane's pixels."""
    K: tl.constexpr = CASE.K
    total_pixels = decode(places.total_pixels)
    exists, factor = tile.first + tile.pixel < tile.pixels, tl.full(tile.pixel.shape, 0.0, tl.float32)
    at = tile.n * total_pixels + integer(places.pixel_offsets, tile.level) + tile.first + tile.pixel
    if grad.distance is not None:
        factor += read(grad.distance + at, exists)
    if grad.error is not None:
        g = grad.error + (tile.level * tl.num_programs(1) + tile.n) * K
        for k in tl.static_range(K):
            m = read(saved.masks + at + (tile.n * (K - 1) + k) * total_pixels, exists)
            factor += tl.load(g + k) * m * m
    return 2 * factor


@triton.jit
def student_kernel(
    maps,  # teacher, student
    levels,
    saved,  # Results of the forward pass
    grad,  # Upstream
    out,  # Gradients
    places,  # Places
    CASE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The student's gradient alone: channel by channel."""
    index, n = blocks.from_last()
    for narrow in tl.static_range(2):
        if is_wide(index, levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            tile = blocks.tile_of(index, n, levels, 0, STEP)
            factor = pixel_factor(saved, grad, tile, places, CASE)
            t, s = blocks.source(maps, 0, tile, STEP), blocks.source(maps, 1, tile, STEP)
            to = blocks.destination(out.student, tile, STEP)
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                x, d = blocks.read_block(t, tile, start, 0, STEP), ()
                y = blocks.read_block(s, tile, start, 0, STEP)
                for m in tl.static_range(len(x)):
                    d = d + (factor * (y[m] - x[m]),)
                blocks.write_block(to, d, tile, start, 0, STEP)
                t, s, to = blocks.next_channels(t), blocks.next_channels(s), blocks.next_channels(to)


@triton.jit
def backward_kernel(
    maps,  # teacher and student, or teacher
    levels,
    tokens,  # tuple: [K, C]
    grad,  # Upstream
    out,  # Gradients
    places,  # Places
    CASE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradients of the maps and the tokens."""
    index, n = blocks.from_last()
    first_channel, some = blocks.channels_from(index, levels, STEPS)
    for narrow in tl.static_range(2):
        if some & (is_wide(index, levels, STEPS.WIDE.SPAN) != narrow):
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            if not CASE.DOT:
                backward_tile(index, n, first_channel, maps, levels, tokens, grad, out, places, CASE, STEP)
            else:
                backward_by_dot(index, n, maps, levels, tokens, grad, out, places, CASE, STEP)


@triton.jit
def backward_tile(
    index, n, first_channel, maps, levels, tokens, grad, out, places, CASE: tl.constexpr, STEP: tl.constexpr
):
    """For few tokens, pixel by pixel."""
    K: tl.constexpr = CASE.K
    OWN: tl.constexpr = STEP.CHANNELS
    PARTS: tl.constexpr = STEP.PARTS
    tile, total_channels = blocks.tile_of(index, n, levels, first_channel, STEP), decode(places.total_channels)
    t, s = blocks.source(maps, 0, tile, STEP), blocks.source(maps, len(maps) - 1, tile, STEP)
    if out.teacher is not None:
        to_t = blocks.destination(out.teacher, tile, STEP)
    if out.student is not None:
        to_s = blocks.destination(out.student, tile, STEP)
    slopes_at = out.slopes + (tile.n * tl.num_programs(0) + index) * ((K + 2) * STEP.SPAN)
    channel_offset = integer(places.channel_offsets, tile.level)
    if STEP.EVEN:
        total_channels, channel_offset = aligned(total_channels, OWN), aligned(channel_offset, OWN)
    if grad.edges is not None:
        edges = grad.edges + tile.n * EDGES * total_channels + channel_offset
    own, sums = (), ()
    for k in tl.static_range(K):
        e_at = pick(tokens, tile.level) + tile.channel
        own = own + blocks.read_channels(e_at + k * tile.channels, 0, OWN, tile, 0, STEP)
        for _ in tl.static_range(OWN):
            sums = sums + (blocks.zeros(1, STEP),)
    for start in range(0, tl.minimum(tile.pixels - tile.first, STEP.SPAN), STEP.COLUMNS * STEP.VECTOR * STEP.PARTS):
        x, y = (), ()
        if len(maps) > 1 or out.tokens is not None:
            x = blocks.read_block(t, tile, 0, start, STEP)
        if len(maps) > 1:
            y = blocks.read_block(s, tile, 0, start, STEP)
        teacher, student = (), ()
        for part in tl.static_range(PARTS):
            slopes, new = (), ()
            for k in tl.static_range(K + len(maps) - 1):
                slopes = slopes + (read_slopes(slopes_at + k * STEP.SPAN, part, STEP),)
            if grad.edges is not None:
                edge = read_slopes(slopes_at + (K + 1) * STEP.SPAN, part, STEP).to(tl.int32, bitcast=True)
                of_edge = read_edges(edges, edge, total_channels, tile, STEP)
            for j in tl.static_range(OWN):
                gradient = blocks.zeros(STEP.VECTOR, STEP)
                if grad.edges is not None:
                    gradient = of_edge[j]
                if len(maps) > 1:
                    d = slopes[K] * (y[part * OWN + j] - x[part * OWN + j])
                    gradient -= d
                    student = student + (d,)
                if out.teacher is not None:
                    for k in tl.static_range(K):
                        gradient += own[k * OWN + j] * slopes[k]
                    teacher = teacher + (gradient,)
            if out.tokens is not None:
                for m in tl.static_range(len(sums)):
                    new = new + (sums[m] + tl.sum(slopes[m // OWN] * x[part * OWN + m % OWN], 2, keep_dims=True),)
                sums = new
        if out.student is not None:
            blocks.write_block(to_s, student, tile, 0, start, STEP)
            to_s = blocks.next_pixels(to_s)
        if out.teacher is not None:
            blocks.write_block(to_t, teacher, tile, 0, start, STEP)
            to_t = blocks.next_pixels(to_t)
        slopes_at += STEP.COLUMNS * STEP.VECTOR * STEP.PARTS
        t, s = blocks.next_pixels(t), blocks.next_pixels(s)
    if out.tokens is not None:
        to = out.tokens + common.partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
        for k in tl.static_range(K):
            totals = ()
            for j in tl.static_range(OWN):
                totals = totals + (blocks.over_pixels(sums[k * OWN + j], STEP),)
            blocks.write_channels(to + k * tile.channels, totals, tile, 0, STEP)


@triton.jit
def read_slopes(at, part: tl.constexpr, STEP: tl.constexpr):
    """A part of a row of slopes_kernel's, as lanes lie; ``at`` points to the step's first."""
    at += part * (STEP.COLUMNS * STEP.VECTOR)
    if STEP.VECTOR == 8 and not STEP.NARROW:
        # Two loads of 128 bits, and lanes have the eight pixels that they have of half types.
        at += tl.arange(0, STEP.COLUMNS)[:, None, None] * 8 + tl.arange(0, 4)[None, None, :]
        both = tl.permute(tl.join(tl.load(at), tl.load(at + 4)), [0, 1, 3, 2])
        value = tl.reshape(both, [both.shape[0], both.shape[1], 8])
    else:
        value = tl.load(at + blocks.pixels_of(STEP.VECTOR, STEP)[:, None, :])
    return value


@triton.jit
def read_edges(edges, edge, total_channels, tile, STEP: tl.constexpr):
    """Of each channel and pixel, by what edges the pixel lies on: a tuple of each lane's channels."""
    CHANNELS: tl.constexpr = STEP.CHANNELS
    VECTOR: tl.constexpr = STEP.VECTOR
    if STEP.INTERLEAVED and not STEP.NARROW:  # as the map lies, so that nothing moves
        c = (tile.first_channel + tl.arange(0, STEP.GROUPS * CHANNELS))[None, :]
        at = edges + tl.reshape(edge, [STEP.COLUMNS, 1]) * total_channels + c
        valid = tl.full(c.shape, 1, tl.int1) if STEP.EVEN else c < tile.channels
        result = blocks.entries(blocks.widened(at, valid, STEP))
    else:
        pixels, found, result = blocks.entries(edge), (), ()
        for i in tl.static_range(VECTOR):
            at = edges + pixels[i] * total_channels + tile.channel
            found += blocks.read_channels(at, 0, CHANNELS, tile, 0, STEP)
        for j in tl.static_range(CHANNELS):
            result += (blocks.stacked(found[j::CHANNELS]),)
    return result


@triton.jit
def backward_by_dot(index, n, maps, levels, tokens, grad, out, places, CASE: tl.constexpr, STEP: tl.constexpr):
    """For many tokens, channel by channel."""
    K: tl.constexpr = CASE.K
    tile = blocks.tile_of(index, n, levels, 0, STEP)
    k, p = tl.arange(0, CASE.K_PAD), tl.arange(0, STEP.SPAN)
    t, s = blocks.source(maps, 0, tile, STEP), blocks.source(maps, len(maps) - 1, tile, STEP)
    if out.teacher is not None:
        to_t = blocks.destination(out.teacher, tile, STEP)
    if out.student is not None:
        to_s = blocks.destination(out.student, tile, STEP)
    e_first, total_channels = pick(tokens, tile.level), decode(places.total_channels)
    row = common.partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
    slope_at = out.slopes + (tile.n * tl.num_programs(0) + index) * ((K + 2) * STEP.SPAN) + p
    slopes = read(slope_at[None, :] + k[:, None] * STEP.SPAN, (k < K)[:, None])
    if len(maps) > 1:
        factor = tl.load(slope_at + K * STEP.SPAN)
    if grad.edges is not None:
        edge = tl.load(slope_at + (K + 1) * STEP.SPAN).to(tl.int32, bitcast=True)
        edge_at = grad.edges + tile.n * EDGES * total_channels + integer(places.channel_offsets, tile.level)
        edge_at += edge[None, :] * total_channels
    for start in range(0, tile.end, STEP.GROUPS):
        c = start + tl.arange(0, STEP.GROUPS)
        x = matrix(blocks.read_block(t, tile, start, 0, STEP), STEP)
        gradient = tl.full([STEP.GROUPS, STEP.SPAN], 0.0, tl.float32)
        if len(maps) > 1:
            d = factor[None, :] * (matrix(blocks.read_block(s, tile, start, 0, STEP), STEP) - x)
            gradient -= d
            if out.student is not None:
                blocks.write_block(to_s, lanes(d), tile, start, 0, STEP)
                to_s = blocks.next_channels(to_s)
        if out.tokens is not None:
            d_tokens = tl.dot(slopes, tl.trans(x), input_precision=PRECISION)  # [K_PAD, CHANNELS]
            at = k[:, None] * tile.channels + c[None, :]
            tl.store(out.tokens + row + at, d_tokens, mask=(k < K)[:, None] & (c < tile.channels)[None, :])
        if out.teacher is not None:
            e = read(e_first + k[None, :] * tile.channels + c[:, None], (k < K)[None, :] & (c < tile.channels)[:, None])
            gradient = tl.dot(e, slopes, gradient, input_precision=PRECISION)
            if grad.edges is not None:
                gradient += read(edge_at + c[:, None], (c < tile.channels)[:, None])
            blocks.write_block(to_t, lanes(gradient), tile, start, 0, STEP)
            to_t = blocks.next_channels(to_t)
        t, s = blocks.next_channels(t), blocks.next_channels(s)


# ---- Launchers ---------------------------------------------------------------------------------

FEW_LOGITS = 16  # of a pixel, that multiply-adds serve forward: more of them, and tensor cores do
PIXEL_LOGITS = 8  # likewise backward; forward, threads have eight pixels of half types up to here, else four


def forward_step(maps: common.Maps, logits: int) -> Step:
    """A thread reads 128 bits at a time, where it can; as many warps as may be, so none has more than 128 registers."""
    half, interleaved, few = blocks.element_size(maps) == 2, maps[0][-1].interleaved, 2 if logits > 6 else 4
    if logits > FEW_LOGITS:
        return blocks.step_of(maps, 32 if half else 16, 1, 64, 1)
    if interleaved:
        return blocks.step_of(maps, 4, 8 if half else 4, 128, 1, tokens=few)
    if half and logits <= PIXEL_LOGITS:
        return blocks.step_of(maps, 8, 4, 16, 8, tokens=1)
    return blocks.step_of(maps, 4, 8, 32, 4, tokens=few)


def backward_step(maps: common.Maps, logits: int, channels: Sequence[int]) -> Step:
    """Likewise; lanes along channels, where these are neighbours, and otherwise few along pixels."""
    if logits > PIXEL_LOGITS:
        return blocks.step_of(maps, 32, 1, 32 if blocks.element_size(maps) == 2 else 64, 1)
    step = blocks.pixel_step(maps)._replace(PARTS=2)  # tokens take registers too
    # Where edges of a level begin depends on the channels of all levels, also of those that other launches take.
    even = step.EVEN and all(c % step.CHANNELS == 0 for c in channels)
    return step._replace(EVEN=even)


def pad_tokens(num_tokens: int) -> int:
    """Rows of the tiles that hold tokens: tl.dot's 16 at least."""
    return max(16, int(triton.next_power_of_2(num_tokens)))


def _case(tokens: int, dot: bool) -> Case:
    # The sums start on a whole block of the second kernel.
    sums_at = triton.cdiv(2 * tokens + tokens * tokens, 64) * 64
    return Case(tokens, 8 if tokens <= 8 else pad_tokens(tokens), dot, sums_at)


def _places(teacher: Sequence[Tensor], run: slice, total_pixels: int, row_size: int) -> Places:
    channels, pixels = [x.shape[1] for x in teacher], [math.prod(x.shape[2:]) for x in teacher]
    return Places(
        encode([x.shape[3] if x.dim() == 4 else 0 for x in teacher[run]]),
        encode(common.offsets(pixels)[run]),
        encode(common.offsets(channels)[run]),
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
    n, k, wants_sums = teacher[0].shape[0], tokens[0].shape[0] if tokens else 0, out.sums.numel() > 0
    customized = customize is not None and k > 0
    logits = k * (1 + customized)  # of a pixel
    case = _case(k, logits > FEW_LOGITS)
    for run in blocks.runs_of(*filter(None, (teacher, student)), step=functools.partial(forward_step, logits=logits)):
        levels, channels = run.levels, max(run.levels.channels)
        row_size = case.SUMS_AT + (channels if wants_sums else 0)
        partials = run.partials(row_size)
        borders = empty(partials, n, LINES.value, sum(x.shape[1] for x in teacher)) if wants_sums else None
        places = _places(teacher, run.part, out.masks.shape[2], row_size)
        lines = LINES.value * len(levels.tiles) * triton.cdiv(channels, BORDER_C.value) if wants_sums else 0
        run.launch(
            forward_kernel,
            _embeddings(tokens, run),
            Results(
                out.masks,
                out.teacher_masks if customized else None,
                out.distance if student else None,
                borders,
                partials,
            ),
            customize,
            places,
            CASE=case,
            grid=(sum(levels.tiles) + lines, n),
            channels=0 if case.DOT or run.step.INTERLEAVED else 2,
            maxnreg=None if case.DOT else blocks.REGISTERS if logits <= PIXEL_LOGITS else 168,
        )
        if n and row_size:
            block, rows = common.reduce_shape(row_size)
            launch(
                reduce_stats_kernel,
                (triton.cdiv(row_size, block), n, len(levels.tiles)),
                partials,
                borders,
                Reduced(
                    of_run(out.mass, run.part),
                    of_run(out.error, run.part) if student else None,
                    of_run(out.gram, run.part),
                    out.sums,
                ),
                levels.encoded(),
                places,
                CASE=case,
                ROWS=rows,
                BLOCK=block,
                num_warps=4,
            )


def _embeddings(tokens: Sequence[Tensor], run: blocks.Run) -> tuple[Tensor, ...] | None:
    """A run's tokens as kernels take them."""
    return run.of([e.contiguous() for e in tokens])


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
    n, k, channels = teacher[0].shape[0], tokens[0].shape[0] if tokens else 0, [x.shape[1] for x in teacher]
    case, only_student, edges = _case(k, k > PIXEL_LOGITS), not grad_teacher and not grad_tokens, None
    if grad_sums is not None and grad_teacher and n:
        edges = empty(grad_sums, n, EDGES.value, sum(channels))
        grid = triton.cdiv(sum(channels), BORDER_C.value), n
        launch(edges_kernel, grid, grad_sums, edges, sum(channels), BLOCK=BORDER_C.value)

    def given(x: Tensor | None, part: slice) -> Tensor | None:
        return None if x is None else of_run(x, part)

    teacher_masks = saved.teacher_masks if saved.teacher_masks.numel() > 0 else None
    of_forward = Results(saved.masks, teacher_masks, saved.distance if student else None, None, None)
    step: Callable[[common.Maps], Step] = blocks.channel_step
    if not only_student:
        step = functools.partial(backward_step, logits=k, channels=channels)
    for run in blocks.runs_of(*filter(None, (teacher, student)), step=step):
        part, levels, span, tiles = run.part, run.levels, run.step.SPAN, sum(run.levels.tiles)
        row_size = k * max(levels.channels)
        partials = run.partials(row_size) if grad_tokens else None
        slopes = None if only_student else empty(saved.masks, n, tiles, k + 2, span)
        places = _places(teacher, part, saved.masks.shape[2], row_size)
        error = given(grad_error, part) if student else None
        of_images = given(grad_mass, part), error, given(grad_gram, part)
        upstream = Upstream(grad_masks, grad_distance, *of_images, edges)
        out = Gradients(run.of(grad_teacher), run.of(grad_student), slopes, partials)
        if only_student:
            run.launch(student_kernel, of_forward, upstream, out, places, CASE=case, channels=2)
        elif n and tiles:
            block = min(span, SLOPES_P)
            launch(
                slopes_kernel,
                (tiles * (span // block), n),
                levels.encoded(),
                of_forward,
                upstream,
                out,
                places,
                CASE=case,
                SPAN=span,
                BLOCK=block,
                num_warps=4,
            )
            run.launch(
                backward_kernel,
                _embeddings(tokens, run),
                upstream,
                out,
                places,
                CASE=case,
                grid=run.grid(channels=not case.DOT),
                maxnreg=255 if run.step.CHANNELS == 8 else None,  # else the assembler spills some bytes there
            )
        if partials is not None:
            widths = [k * c for c in levels.channels]
            common.reduce_tiles(partials, grad_tokens[part], levels, widths, n, per_image=False)
