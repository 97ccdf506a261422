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

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.reference import ReceptiveStats
from maskd_kernels.triton import blocks, common
from maskd_kernels.triton.blocks import Step, Steps
from maskd_kernels.triton.common import aligned, decode, encode, integer, is_wide, of_run, pick, read
from maskd_kernels.triton.launch import empty, launch, recalled

PRECISION = tl.constexpr("tf32x3")
LINES = tl.constexpr(8)  # of an image's border: first row, last row, first column, last column; their corners
EDGES = tl.constexpr(16)  # what a pixel may lie on: first row (1), last row (2), first column (4), last column (8)
SLOPES_P = 128  # pixels of a program of slopes_kernel, at most
BORDER_C = tl.constexpr(128)  # channels of a program that adds up a line


class Case(NamedTuple):
    """What is asked for, as constants of a kernel."""

    K: int
    K_PAD: int
    STUDENT: bool  # there is one
    CUSTOMIZE: bool
    SUMS: bool  # are wanted, or their gradients are given
    T_INTERLEAVED: bool
    S_INTERLEAVED: bool
    SUMS_AT: int = 0  # the column of the partial sums where those of channels begin


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


@triton.jit
def walk(features, sums_to, tile, CASE: tl.constexpr, STEP: tl.constexpr):
    """Sums over each lane's channels, a tuple of vectors of pixels: distance, logits, the student's logits."""
    CHANNELS: tl.constexpr = STEP.CHANNELS
    K: tl.constexpr = CASE.K
    t = blocks.source(features.teacher, features.teacher_strides, tile, STEP, CASE.T_INTERLEAVED)
    s = blocks.source(features.student, features.student_strides, tile, STEP, CASE.S_INTERLEAVED)
    t_at, s_at, e_at = t.at, s.at, pick(features.tokens, tile.level) + tile.channel
    channels, sums = blocks.channels_of(STEP), ()
    for _ in tl.static_range(1 + K + K * CASE.CUSTOMIZE):
        sums = sums + (blocks.zeros(STEP.VECTOR, STEP),)
    for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
        x = blocks.read_block(t_at, t, tile, start, STEP)
        y = x
        if CASE.STUDENT:
            y = blocks.read_block(s_at, s, tile, start, STEP)
        totals = ()
        for j in tl.static_range(CHANNELS):
            if j % STEP.TOKENS == 0:
                tokens = ()
                for k in tl.static_range(K):
                    tokens = tokens + blocks.read_channels(e_at + k * tile.channels, j, STEP.TOKENS, tile, start, STEP)
            new = (sums[0] + (y[j] - x[j]) * (y[j] - x[j]),)
            for m in tl.static_range(1, len(sums)):
                new = new + (sums[m] + tokens[(m - 1) % K * STEP.TOKENS + j % STEP.TOKENS] * (y if m > K else x)[j],)
            sums = new
            if CASE.SUMS:
                totals = totals + (blocks.over_pixels(x[j], STEP),)
        if CASE.SUMS:
            blocks.write_channels(sums_to + channels, totals, start + channels, tile, STEP)
        sums_to += STEP.GROUPS * STEP.CHANNELS
        e_at += STEP.GROUPS * STEP.CHANNELS
        t_at += t.next_channels
        s_at += s.next_channels
    return sums


@triton.jit
def walk_by_dot(features, sums_to, tile, CASE: tl.constexpr, STEP: tl.constexpr):
    """The same for many tokens: [PIXELS] distance, [K_PAD, PIXELS] logits, the student's likewise."""
    k, p = tl.arange(0, CASE.K_PAD), tl.arange(0, STEP.SPAN)
    t_at, t_step = dot_plane(features.teacher, features.teacher_strides, tile, STEP, CASE.T_INTERLEAVED)
    s_at, s_step = dot_plane(features.student, features.student_strides, tile, STEP, CASE.S_INTERLEAVED)
    tokens = pick(features.tokens, tile.level)
    logits = tl.full([CASE.K_PAD, STEP.SPAN], 0.0, tl.float32)
    student_logits = logits
    d = tl.full([STEP.CHANNELS, STEP.SPAN], 0.0, tl.float32)
    for start in range(0, tile.end, STEP.CHANNELS):
        c = start + tl.arange(0, STEP.CHANNELS)
        valid = (c < tile.channels)[:, None] & (tile.first + p < tile.pixels)[None, :]
        x = read(t_at, valid)  # [CHANNELS, PIXELS]
        e_at = k[:, None] * tile.channels + c[None, :]
        e = read(tokens + e_at, (k < CASE.K)[:, None] & (c < tile.channels)[None, :])
        logits = tl.dot(e, x, logits, input_precision=PRECISION)
        if CASE.STUDENT:
            y = read(s_at, valid)
            d += (y - x) * (y - x)
            if CASE.CUSTOMIZE:
                student_logits = tl.dot(e, y, student_logits, input_precision=PRECISION)
        if CASE.SUMS:
            tl.store(sums_to + c, tl.sum(x, 1), mask=c < tile.channels)
        t_at += t_step
        s_at += s_step
    return tl.sum(d, 0), logits, student_logits


@triton.jit
def dot_plane(pointers, strides, tile, STEP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Pointers to a map of the tile's level, [CHANNELS, PIXELS], and from one step's to the next's."""
    stride_n, stride = integer(strides.image, tile.level), integer(strides.rest, tile.level)
    if not STEP.NARROW:
        stride_n, stride = aligned(stride_n, common.WIDE), aligned(stride, common.WIDE)
    c, p = tl.arange(0, STEP.CHANNELS), tile.first + tl.arange(0, STEP.SPAN)
    at = pick(pointers, tile.level) + common.feature_offsets(tile.n, c, p, stride_n, stride, INTERLEAVED)
    step = STEP.CHANNELS
    if not INTERLEAVED:
        step = STEP.CHANNELS * stride.to(tl.int64)
    return at, step


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
    if CASE.CUSTOMIZE:
        teacher = tl.load(out.teacher_masks + at, mask=real, other=0.0)
    tl.debug_barrier()
    m = tl.where(real, tl.sigmoid(m), 0.0)  # [K_PAD, PIXELS / 32, 32]
    if CASE.CUSTOMIZE:
        teacher = tl.where(real, tl.sigmoid(teacher), 0.0)
        tl.store(out.teacher_masks + at, teacher, mask=real)
        m = tl.where(tl.load(customize) != 0, teacher * m, teacher)
    tl.store(out.masks + at, m, mask=real)
    k = tl.arange(0, K_PAD)
    tl.store(partial + k, tl.sum(tl.sum(m, 1), 1), mask=k < K)
    if CASE.STUDENT:
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
def border(features, borders, levels, places, index, CASE: tl.constexpr):
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
    stride_p, stride_c = tl.full([], 1, tl.int64), integer(features.teacher_strides.rest, level).to(tl.int64)
    if CASE.T_INTERLEAVED:
        stride_p, stride_c = stride_c, stride_p
    at = pick(features.teacher, level) + n * integer(features.teacher_strides.image, level)
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
    features,  # Features
    out,  # Results
    customize,  # [] bool
    levels,
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
                forward_tile(index, features, out, customize, levels, places, CASE, STEP)
    elif CASE.SUMS:
        border(features, out.borders, levels, places, index - tiles, CASE)


@triton.jit
def forward_tile(index, features, out, customize, levels, places, CASE: tl.constexpr, STEP: tl.constexpr):
    K: tl.constexpr = CASE.K
    tile = blocks.tile_of(index, levels, 0, STEP)
    column, total_pixels = integer(places.pixel_offsets, tile.level) + tile.first, decode(places.total_pixels)
    partial = out.partials + common.partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
    d_at = out.distance + tile.n * total_pixels + column
    if STEP.GROUPS > 0:
        sums = walk(features, partial + CASE.SUMS_AT, tile, CASE, STEP)
        pixel = blocks.pixels_of(STEP.VECTOR, STEP)
        exists = tile.first + pixel < tile.pixels
        for m in tl.static_range(K + K * CASE.CUSTOMIZE):
            masks = out.teacher_masks if CASE.CUSTOMIZE and m < K else out.masks
            to = masks + (tile.n * K + m % K) * total_pixels + column
            tl.store(to + pixel, blocks.over_groups(sums[1 + m], STEP), mask=exists)
        if CASE.STUDENT:
            tl.store(d_at + pixel, blocks.over_groups(sums[0], STEP), mask=exists)
    else:
        d, logits, student_logits = walk_by_dot(features, partial + CASE.SUMS_AT, tile, CASE, STEP)
        k, p = tl.arange(0, CASE.K_PAD), tl.arange(0, STEP.SPAN)
        inside = tile.first + p < tile.pixels
        to = (tile.n * K + k[:, None]) * total_pixels + (column + p)[None, :]
        real = (k < K)[:, None] & inside[None, :]
        if CASE.CUSTOMIZE:
            tl.store(out.teacher_masks + to, logits, mask=real)
            logits = student_logits
        tl.store(out.masks + to, logits, mask=real)
        if CASE.STUDENT:
            tl.store(d_at + p, d, mask=inside)
    if K > 0:
        statistics(out, customize, tile, column, partial, total_pixels, CASE, STEP)


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
    if not CASE.STUDENT:
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
            if CASE.STUDENT:
                tl.store(out.error + at * K + (i - K), total, mask=(i >= K) & (i < 2 * K))
            tl.store(out.gram + at * (K * K) + (i - 2 * K), total, mask=(i >= 2 * K) & (i < 2 * K + K * K))
    else:
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
    """Gradients of the results."""

    masks: Any  # [N, K, total P]
    distance: Any  # [N, total P]
    mass: Any  # [levels, N, K]
    error: Any  # [levels, N, K]
    gram: Any  # [levels, N, K, K]
    edges: Any  # [N, EDGES, total C] of edges_kernel


class Gradients(NamedTuple):
    """What the backward pass writes; maps are dense, laid out like the student where there is one."""

    teacher: Any  # tuple: [N, C, P]
    student: Any  # tuple: [N, C, P]
    slopes: Any  # [N, tiles, K + 2, SPAN]: of logits, of the difference of the two maps, and which edges pixels are on
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
    saved,  # Results of the forward pass
    grad,  # Upstream
    out,  # Gradients
    levels,
    places,  # Places
    CASE: tl.constexpr,
    GIVEN: tl.constexpr,
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
    if GIVEN.distance:
        difference += read(grad.distance + n * total_pixels + column, inside)
    if K > 0:
        real = (k < K)[:, None] & inside[None, :]
        at = (n * K + k[:, None]) * total_pixels + column[None, :]
        m = read(saved.masks + at, real)  # [K_PAD, PIXELS]
        inner = tl.full([K_PAD, BLOCK], 0.0, tl.float32)
        if GIVEN.mass:
            inner += read(grad.mass + at_level * K + k, k < K)[:, None]
        if GIVEN.error:
            d = read(saved.distance + n * total_pixels + column, inside)
            error = read(grad.error + at_level * K + k, k < K)[:, None] * m
            inner += 2 * error * d[None, :]
            difference += tl.sum(error * m, 0)
        if GIVEN.gram:
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
        if GIVEN.masks:
            inner += read(grad.masks + at, real)
        factor = m
        if CASE.CUSTOMIZE:
            factor = read(saved.teacher_masks + at, real)
        tl.store(to[None, :] + k[:, None] * SPAN, inner * m * (1 - factor), mask=(k < K)[:, None])
    tl.store(to + K * SPAN, 2 * difference)
    if GIVEN.sums:
        p, image_width = first + p, integer(places.widths, level)
        x, image = p % tl.maximum(image_width, 1), common.condition(image_width > 0)
        rows = (p < image_width).to(tl.int32) + 2 * (image & (p >= pixels - image_width)).to(tl.int32)
        columns = 4 * (image & (x == 0)).to(tl.int32) + 8 * (image & (x == image_width - 1)).to(tl.int32)
        tl.store(to + (K + 1) * SPAN, (rows + columns).to(tl.float32, bitcast=True))


@triton.jit
def pixel_factor(saved, grad, tile, places, CASE: tl.constexpr, GIVEN: tl.constexpr):
    """What the difference of the two maps is multiplied by, of each lane's pixels."""
    K: tl.constexpr = CASE.K
    total_pixels = decode(places.total_pixels)
    exists, factor = tile.first + tile.pixel < tile.pixels, tl.full(tile.pixel.shape, 0.0, tl.float32)
    at = tile.n * total_pixels + integer(places.pixel_offsets, tile.level) + tile.first + tile.pixel
    if GIVEN.distance:
        factor += read(grad.distance + at, exists)
    if GIVEN.error:
        g = grad.error + (tile.level * tl.num_programs(1) + tile.n) * K
        for k in tl.static_range(K):
            m = read(saved.masks + at + (tile.n * (K - 1) + k) * total_pixels, exists)
            factor += tl.load(g + k) * m * m
    return 2 * factor


@triton.jit
def student_kernel(
    features,  # Features
    saved,  # Results of the forward pass
    grad,  # Upstream
    out,  # Gradients
    levels,
    places,  # Places
    CASE: tl.constexpr,
    GIVEN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The student's gradient alone: channel by channel."""
    # From the last tile on: the forward pass left it in the cache.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    for narrow in tl.static_range(2):
        if is_wide(index, levels, STEPS.WIDE.SPAN) != narrow:
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            tile = blocks.tile_of(index, levels, 0, STEP)
            factor = pixel_factor(saved, grad, tile, places, CASE, GIVEN)
            t = blocks.source(features.teacher, features.teacher_strides, tile, STEP, CASE.T_INTERLEAVED)
            s = blocks.source(features.student, features.student_strides, tile, STEP, CASE.S_INTERLEAVED)
            to = blocks.destination(out.student, tile, STEP)
            t_at, s_at, to_at = t.at, s.at, to.at
            for start in range(0, tile.end, STEP.GROUPS * STEP.CHANNELS):
                x, d = blocks.read_block(t_at, t, tile, start, STEP), ()
                y = blocks.read_block(s_at, s, tile, start, STEP)
                for m in tl.static_range(len(x)):
                    d = d + (factor * (y[m] - x[m]),)
                blocks.write_block(to_at, to, d, tile, start, STEP)
                t_at += t.next_channels
                s_at += s.next_channels
                to_at += to.next_channels


@triton.jit
def backward_kernel(
    features,  # Features
    grad,  # Upstream
    out,  # Gradients
    levels,
    places,  # Places
    CASE: tl.constexpr,
    WANTED: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradients of the maps and the tokens."""
    # From the last tile on: the forward pass left it in the cache.
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    channels = integer(levels.channels, common.level_of(index, levels))
    some = tl.program_id(2) * (STEPS.WIDE.GROUPS * STEPS.WIDE.CHANNELS) < channels  # other levels may have more
    for narrow in tl.static_range(2):
        if some & (is_wide(index, levels, STEPS.WIDE.SPAN) != narrow):
            STEP: tl.constexpr = STEPS.NARROW if narrow else STEPS.WIDE
            if STEP.GROUPS > 0:
                backward_tile(index, features, grad, out, levels, places, CASE, WANTED, STEP)
            else:
                backward_by_dot(index, features, grad, out, levels, places, CASE, WANTED, STEP)


@triton.jit
def backward_tile(
    index, features, grad, out, levels, places, CASE: tl.constexpr, WANTED: tl.constexpr, STEP: tl.constexpr
):
    """For few tokens, pixel by pixel."""
    K: tl.constexpr = CASE.K
    OWN: tl.constexpr = STEP.CHANNELS
    PARTS: tl.constexpr = STEP.PARTS
    first_channel = tl.program_id(2) * (STEP.GROUPS * OWN)
    tile, total_channels = blocks.tile_of(index, levels, first_channel, STEP), decode(places.total_channels)
    t = blocks.source(features.teacher, features.teacher_strides, tile, STEP, CASE.T_INTERLEAVED)
    s = blocks.source(features.student, features.student_strides, tile, STEP, CASE.S_INTERLEAVED)
    to_t, to_s = blocks.destination(out.teacher, tile, STEP), blocks.destination(out.student, tile, STEP)
    t_at, s_at, to_t_at, to_s_at = t.at, s.at, to_t.at, to_s.at
    slopes_at = out.slopes + (tile.n * tl.num_programs(0) + index) * ((K + 2) * STEP.SPAN)
    channel_offset = integer(places.channel_offsets, tile.level)
    if STEP.EVEN:
        total_channels, channel_offset = aligned(total_channels, OWN), aligned(channel_offset, OWN)
    edges = grad.edges + tile.n * EDGES * total_channels + channel_offset
    e_at, tokens, sums = pick(features.tokens, tile.level) + tile.channel, (), ()
    for k in tl.static_range(K):
        tokens = tokens + blocks.read_channels(e_at + k * tile.channels, 0, OWN, tile, 0, STEP)
        for _ in tl.static_range(OWN):
            sums = sums + (blocks.zeros(1, STEP),)
    for start in range(0, tl.minimum(tile.pixels - tile.first, STEP.SPAN), STEP.COLUMNS * STEP.VECTOR * STEP.PARTS):
        here, x, y = blocks.further(tile, start), (), ()
        if CASE.STUDENT or WANTED.tokens:
            x = blocks.read_block(t_at, t, here, 0, STEP)
        if CASE.STUDENT:
            y = blocks.read_block(s_at, s, here, 0, STEP)
        teacher, student = (), ()
        for part in tl.static_range(PARTS):
            slopes, new = (), ()
            for k in tl.static_range(K + CASE.STUDENT):
                slopes = slopes + (blocks.read_pixels(slopes_at + k * STEP.SPAN, part, STEP),)
            if WANTED.teacher and CASE.SUMS:
                edge = blocks.read_pixels(slopes_at + (K + 1) * STEP.SPAN, part, STEP).to(tl.int32, bitcast=True)
                of_edge = read_edges(edges, edge, total_channels, here, STEP)
            for j in tl.static_range(OWN):
                gradient = blocks.zeros(STEP.VECTOR, STEP)
                if WANTED.teacher and CASE.SUMS:
                    gradient = of_edge[j]
                if CASE.STUDENT:
                    d = slopes[K] * (y[part * OWN + j] - x[part * OWN + j])
                    gradient -= d
                    student = student + (d,)
                if WANTED.teacher:
                    for k in tl.static_range(K):
                        gradient += tokens[k * OWN + j] * slopes[k]
                    teacher = teacher + (gradient,)
            if WANTED.tokens:
                for m in tl.static_range(len(sums)):
                    new = new + (sums[m] + tl.sum(slopes[m // OWN] * x[part * OWN + m % OWN], 2, keep_dims=True),)
                sums = new
        if WANTED.student:
            blocks.write_block(to_s_at, to_s, student, here, 0, STEP)
        if WANTED.teacher:
            blocks.write_block(to_t_at, to_t, teacher, here, 0, STEP)
        slopes_at += STEP.COLUMNS * STEP.VECTOR * STEP.PARTS
        t_at += t.next_pixels
        s_at += s.next_pixels
        to_t_at += to_t.next_pixels
        to_s_at += to_s.next_pixels
    if WANTED.tokens:
        to = out.tokens + common.partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
        c = first_channel + blocks.channels_of(STEP)
        for k in tl.static_range(K):
            totals = ()
            for j in tl.static_range(OWN):
                totals = totals + (blocks.over_pixels(sums[k * OWN + j], STEP),)
            blocks.write_channels(to + k * tile.channels + c, totals, c, tile, STEP)


@triton.jit
def read_edges(edges, edge, total_channels, tile, STEP: tl.constexpr):
    """Of each channel and pixel, by what edges the pixel lies on: a tuple of each lane's channels."""
    CHANNELS: tl.constexpr = STEP.CHANNELS
    VECTOR: tl.constexpr = STEP.VECTOR
    pixels, found, result = blocks.entries(edge), (), ()
    for i in tl.static_range(VECTOR):
        at = edges + pixels[i] * total_channels + tile.channel
        found = found + blocks.read_channels(at, 0, CHANNELS, tile, 0, STEP)
    for j in tl.static_range(CHANNELS):
        result = result + (blocks.stacked(found[j::CHANNELS]),)
    return result


@triton.jit
def backward_by_dot(
    index, features, grad, out, levels, places, CASE: tl.constexpr, WANTED: tl.constexpr, STEP: tl.constexpr
):
    """For many tokens, channel by channel."""
    K: tl.constexpr = CASE.K
    tile = blocks.tile_of(index, levels, 0, STEP)
    k, p = tl.arange(0, CASE.K_PAD), tl.arange(0, STEP.SPAN)
    t_at, t_step = dot_plane(features.teacher, features.teacher_strides, tile, STEP, CASE.T_INTERLEAVED)
    s_at, s_step = dot_plane(features.student, features.student_strides, tile, STEP, CASE.S_INTERLEAVED)
    tokens, total_channels = pick(features.tokens, tile.level), decode(places.total_channels)
    tokens_to = out.tokens + common.partial_row(index, tile.n, tile.level, levels) * decode(places.row_size)
    image = tile.n * (tile.pixels.to(tl.int64) * tile.channels)
    to_t, to_s = pick(out.teacher, tile.level) + image, pick(out.student, tile.level) + image
    stride = tile.channels if CASE.S_INTERLEAVED else tile.pixels
    slope_at = out.slopes + (tile.n * tl.num_programs(0) + index) * ((K + 2) * STEP.SPAN) + p
    slopes = read(slope_at[None, :] + k[:, None] * STEP.SPAN, (k < K)[:, None])
    if CASE.STUDENT:
        factor = tl.load(slope_at + K * STEP.SPAN)
    if WANTED.teacher and CASE.SUMS:
        edge = tl.load(slope_at + (K + 1) * STEP.SPAN).to(tl.int32, bitcast=True)
        edge_at = grad.edges + tile.n * EDGES * total_channels + integer(places.channel_offsets, tile.level)
        edge_at += edge[None, :] * total_channels
    for start in range(0, tile.end, STEP.CHANNELS):
        c = start + tl.arange(0, STEP.CHANNELS)
        valid = (c < tile.channels)[:, None] & (tile.first + p < tile.pixels)[None, :]
        to = common.feature_offsets(0, c, tile.first + p, 0, stride, CASE.S_INTERLEAVED)
        x = read(t_at, valid)  # [CHANNELS, PIXELS]
        gradient = tl.full([STEP.CHANNELS, STEP.SPAN], 0.0, tl.float32)
        if CASE.STUDENT:
            d = factor[None, :] * (read(s_at, valid) - x)
            gradient -= d
            if WANTED.student:
                tl.store(to_s + to, d.to(to_s.dtype.element_ty), mask=valid)
        if WANTED.tokens:
            d_tokens = tl.dot(slopes, tl.trans(x), input_precision=PRECISION)  # [K_PAD, CHANNELS]
            at = k[:, None] * tile.channels + c[None, :]
            tl.store(tokens_to + at, d_tokens, mask=(k < K)[:, None] & (c < tile.channels)[None, :])
        if WANTED.teacher:
            e = read(tokens + k[None, :] * tile.channels + c[:, None], (k < K)[None, :] & (c < tile.channels)[:, None])
            gradient = tl.dot(e, slopes, gradient, input_precision=PRECISION)
            if CASE.SUMS:
                gradient += read(edge_at + c[:, None], valid)
            tl.store(to_t + to, gradient.to(to_t.dtype.element_ty), mask=valid)
        t_at += t_step
        s_at += s_step


# ---- Launchers ---------------------------------------------------------------------------------

FEW_LOGITS = 16  # of a pixel, that multiply-adds serve forward: more of them, and tensor cores do
PIXEL_LOGITS = 8  # likewise backward; forward, threads have eight pixels of half types up to here, else four
WARPS = 4


def forward_step(maps: common.Maps, logits: int) -> Step:
    """A thread reads 128 bits at a time, where it can; as many warps as may be, so none has more than 128 registers."""
    half, interleaved, few = _element_size(maps) == 2, maps[0][0].interleaved, 2 if logits > 6 else 4
    if logits > FEW_LOGITS:
        return _dot_step(maps, 32 if half else 16, 64, interleaved)
    if interleaved:
        return _step(maps, 4, 8 if half else 4, 128, 1, tokens=few)
    if half and logits <= PIXEL_LOGITS:
        return _step(maps, 8, 4, 16, 8, tokens=1)
    return _step(maps, 4, 8, 32, 4, tokens=few)


def student_step(maps: common.Maps) -> Step:
    """Likewise; laid out as the gradient is."""
    half, interleaved = _element_size(maps) == 2, maps[0][-1].interleaved
    if interleaved:
        return _step(maps, 8, 8 if half else 4, 64, 1)
    return _step(maps, 8 if half else 4, 4, 16 if half else 32, 8 if half else 4)


def backward_step(maps: common.Maps, all_maps: common.Maps, logits: int) -> Step:
    """Likewise; lanes along channels, where these are neighbours, and otherwise few along pixels."""
    half, interleaved = _element_size(maps) == 2, maps[0][-1].interleaved
    if logits > PIXEL_LOGITS:
        return _dot_step(maps, 32, 32 if half else 64, interleaved)
    if interleaved:
        own = 8 if half else 4
        groups = min(32, triton.next_power_of_2(triton.cdiv(max(level[0].shape[1] for level in maps), own)))
        step = _step(maps, groups, own, 128 // groups, 1, parts=2)
    else:
        step = _step(maps, 16, 2, 8, 8 if half else 4, parts=2)
    # Few channels, many tiles.
    programs = min(triton.cdiv(max(level[0].shape[1] for level in maps), step.GROUPS * step.CHANNELS), 4)
    # Where edges of a level begin depends on the channels of all levels, also of those that other launches take.
    even = step.EVEN and all(level[0].shape[1] % step.CHANNELS == 0 for level in all_maps)
    return step._replace(SPAN=max(step.SPAN, 128 * programs), EVEN=even)


def _dot_step(maps: common.Maps, channels: int, pixels: int, interleaved: bool) -> Step:
    """[channels, pixels] at a time."""
    return _step(maps, 0, channels, pixels, 1)._replace(INTERLEAVED=interleaved)


def _step(maps: common.Maps, groups: int, own: int, columns: int, vector: int, tokens: int = 0, parts: int = 1) -> Step:
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
        WARPS=WARPS,
        INTERLEAVED=vector == 1,
        NARROW=False,
        NEXT_CHANNEL=1,
        EVEN=all(c % (max(groups, 1) * own) == 0 for c in channels),
        ALL=channels[0] if alike else 0,
        DENSE=alike and dense,
    )


def steps_of(step: Step, channels: int = 0) -> Steps:
    """Element by element, which takes more registers, a lane has few pixels, and may have fewer channels."""
    narrow = step._replace(NARROW=True, CHANNELS=channels or step.CHANNELS)
    if step.VECTOR == 8:
        narrow = narrow._replace(PARTS=1)
    between = step.GROUPS if step.INTERLEAVED else 1
    return Steps(step, narrow._replace(TOKENS=min(step.TOKENS, narrow.CHANNELS), NEXT_CHANNEL=between))


def _element_size(maps: common.Maps) -> int:
    return max(m.tensor.element_size() for m in maps[0])


def pad_tokens(num_tokens: int) -> int:
    """Rows of the tiles that hold tokens: tl.dot's 16 at least."""
    return max(16, int(triton.next_power_of_2(num_tokens)))


def _dense(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> common.Maps:
    """Per level its teacher, and its student where there is one. Their layouts may differ."""
    levels = zip(teacher, student, strict=True) if student else zip(teacher, strict=True)
    return [tuple(layout.dense_view(x) for x in level) for level in levels]


def _features(maps: common.Maps, tokens: Sequence[Tensor]) -> Features:
    """Of a run of levels."""
    t, s = [level[0] for level in maps], [level[-1] for level in maps]
    embeddings = tuple(e.contiguous() for e in tokens) if tokens else common.pointers(t)
    return Features(common.pointers(t), common.pointers(s), embeddings, common.strides_of(t), common.strides_of(s))


def _places(teacher: Sequence[Tensor], maps: common.Maps, run: slice, total_pixels: int, row_size: int) -> Places:
    channels = [level[0].shape[1] for level in maps]
    return Places(
        encode([x.shape[3] if x.dim() == 4 else 0 for x in teacher[run]]),
        encode(common.offsets([level[0].shape[2] for level in maps])[run]),
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
    maps, n = _dense(teacher, student), teacher[0].shape[0]
    k, wants_sums = tokens[0].shape[0] if tokens else 0, out.sums.numel() > 0
    customized = customize is not None and k > 0 and len(student) > 0
    logits = k * (1 + customized)  # of a pixel
    for run, run_maps in common.runs(maps):
        # The sums start on a whole block of the second kernel.
        sums_at = triton.cdiv(2 * k + k * k, 64) * 64
        case = _case(run_maps, k, student, customized, wants_sums)._replace(SUMS_AT=sums_at)
        step = forward_step(run_maps, logits)
        levels, channels = common.as_levels(run_maps, step.SPAN), max(level[0].shape[1] for level in run_maps)
        row_size = sums_at + (channels if wants_sums else 0)
        partials = common.new_partials(levels, n, row_size, teacher[0])
        borders = empty(partials, n, LINES.value, sum(x.shape[1] for x in teacher) if wants_sums else 0)
        places = _places(teacher, maps, run, out.masks.shape[2], row_size)
        lines = LINES.value * len(run_maps) * triton.cdiv(channels, BORDER_C.value) if wants_sums else 0
        if n and sum(levels.tiles) + lines:
            launch(
                forward_kernel,
                (sum(levels.tiles) + lines, n),
                _features(run_maps, tokens[run]),
                Results(out.masks, out.teacher_masks, out.distance, borders, partials),
                out.mass if customize is None else customize,
                levels.encoded(),
                places,
                CASE=case,
                STEPS=steps_of(step, 0 if step.INTERLEAVED or not step.GROUPS else 2),
                num_warps=WARPS,
                maxnreg=None if logits > FEW_LOGITS else 128 if logits <= PIXEL_LOGITS else 168,
            )
        if n and row_size:
            block, rows = common.reduce_shape(row_size)
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
                CASE=case,
                ROWS=rows,
                BLOCK=block,
                num_warps=4,
            )


def _case(maps: common.Maps, tokens: int, student: Sequence[Tensor], customized: bool, sums: bool) -> Case:
    pad = 8 if tokens <= 8 else pad_tokens(tokens)
    return Case(tokens, pad, len(student) > 0, customized, sums, maps[0][0].interleaved, maps[0][-1].interleaved)


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
    maps, n, nothing = _dense(teacher, student), teacher[0].shape[0], saved.masks
    k, total_channels = tokens[0].shape[0] if tokens else 0, sum(x.shape[1] for x in teacher)
    wanted = Wanted(bool(grad_teacher), bool(grad_tokens), bool(grad_student))
    only_student = not (wanted.teacher or wanted.tokens)
    has = Given(
        masks=grad_masks is not None,
        distance=grad_distance is not None,
        mass=grad_mass is not None,
        error=grad_error is not None and len(student) > 0,
        gram=grad_gram is not None,
        sums=grad_sums is not None and wanted.teacher,
    )
    edges = nothing
    if grad_sums is not None and has.sums and n:
        edges = empty(grad_sums, n, EDGES.value, total_channels)
        grid = triton.cdiv(total_channels, BORDER_C.value), n
        launch(edges_kernel, grid, grad_sums, edges, total_channels, BLOCK=BORDER_C.value)

    def given(x: Tensor | None, run: slice) -> Tensor:
        return nothing if x is None else of_run(x, run)

    for run, run_maps in common.runs(maps):
        step = student_step(run_maps) if only_student else backward_step(run_maps, maps, k)
        case = _case(run_maps, k, student, saved.teacher_masks.numel() > 0, has.sums)
        levels, own = common.as_levels(run_maps, step.SPAN), common.pointers([level[0] for level in run_maps])
        row_size = k * max(levels.channels) if grad_tokens else 0
        partials = common.new_partials(levels, n, row_size, teacher[0])
        places = _places(teacher, maps, run, saved.masks.shape[2], row_size)
        features, tiles = _features(run_maps, tokens[run]), sum(levels.tiles)
        of_forward = Results(saved.masks, saved.teacher_masks, saved.distance, nothing, nothing)
        upstream = Upstream(
            nothing if grad_masks is None else grad_masks,
            nothing if grad_distance is None else grad_distance,
            given(grad_mass, run),
            given(grad_error, run),
            given(grad_gram, run),
            edges,
        )
        out = Gradients(
            tuple(grad_teacher[run]) if grad_teacher else own,
            tuple(grad_student[run]) if grad_student else own,
            nothing if only_student else empty(nothing, n, tiles, k + 2, step.SPAN),
            partials,
        )
        shared = upstream, out, levels.encoded(), places
        if n and tiles and only_student:
            launch(
                student_kernel,
                (tiles, n),
                features,
                of_forward,
                *shared,
                CASE=case,
                GIVEN=has,
                STEPS=steps_of(step, 2),
                num_warps=WARPS,
                maxnreg=128,
            )
        elif n and tiles:
            block = min(step.SPAN, SLOPES_P)
            launch(
                slopes_kernel,
                (tiles * (step.SPAN // block), n),
                of_forward,
                *shared,
                CASE=case,
                GIVEN=has,
                SPAN=step.SPAN,
                BLOCK=block,
                num_warps=4,
            )
            launch(
                backward_kernel,
                (tiles, n, triton.cdiv(max(levels.channels), step.GROUPS * step.CHANNELS) if step.GROUPS else 1),
                features,
                *shared,
                CASE=case,
                WANTED=wanted,
                STEPS=steps_of(step),
                num_warps=WARPS,
            )
        if grad_tokens:
            common.reduce_tiles(
                partials, grad_tokens[run], levels, [k * c for c in levels.channels], n, per_image=False
            )
