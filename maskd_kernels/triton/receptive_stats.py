"""Triton kernels of ``receptive_stats``.

Forward equation, gradients and traffic: csrc/receptive_stats.h and reference.py. One program takes a tile
of pixels of one image on one level and walks its channels; tokens are padded to
the 16 rows that ``tl.dot`` wants. Everything accumulates in float32, and products keep float32's accuracy on tensor
cores by three TF32 products each (``tf32x3``); one does only where it is exact. Each program writes its own partial
sums and a second kernel adds them in a fixed order, so that results are bitwise repeatable. Offsets are
64-bit. No autotuning, and nothing recompiles when image sizes change.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.reference import TAPS, ReceptiveStats
from maskd_kernels.triton.common import (
    NARROW_STREAM_C,
    STREAM_C,
    STREAM_P,
    STREAM_WARPS,
    WIDE,
    Maps,
    aligned,
    as_levels,
    channel_alignment,
    condition,
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
from maskd_kernels.triton.launch import launch, recalled

PRECISION = tl.constexpr("tf32x3")


@triton.jit
def tap_windows(p, pixels, width, ROWS: tl.constexpr):
    """[ROWS, BLOCK_P] float: row 3i + j is 1 where tap (i, j) reads a pixel (reference.tap_windows), else 0."""
    i, j = tl.arange(0, ROWS)[:, None] // 3, tl.arange(0, ROWS)[:, None] % 3
    x, image = p % tl.maximum(width, 1), condition(width > 0)
    first_row, last_row = image & (p < width), image & (p >= pixels - width)
    first_column, last_column = image & (x == 0), image & (x == width - 1)
    read = (p < pixels)[None, :] & (i < 3)
    read &= ((i != 0) | ~last_row[None, :]) & ((i != 2) | ~first_row[None, :])
    read &= ((j != 0) | ~last_column[None, :]) & ((j != 2) | ~first_column[None, :])
    return read.to(tl.float32)


@triton.jit
def is_edge(tile, pixels, width, BLOCK_P: tl.constexpr):
    """Whether a level's tile touches the image's first or last row. In others every tap reads all rows: of nine sums
    only the middle three, which differ by columns, are written and read back."""
    return condition((tile * BLOCK_P < width) | ((tile + 1) * BLOCK_P > pixels - width))


@triton.jit
def forward_tile(
    teacher,
    student,
    tokens,
    customize,
    masks,
    teacher_masks,
    distance,
    partials,
    n,
    row,
    tile,
    channels,
    pixels,
    width,
    total_pixels,
    pixel_offset,
    row_size,
    teacher_n,
    teacher_stride,
    student_n,
    student_stride,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TEACHER_INTERLEAVED: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_AT: tl.constexpr,
):
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, K_PAD)
    teacher_n, teacher_stride = aligned(teacher_n, ALIGN), aligned(teacher_stride, ALIGN)
    student_n, student_stride = aligned(student_n, ALIGN), aligned(student_stride, ALIGN)
    channels = aligned(channels, C_ALIGN)
    if TEACHER_INTERLEAVED or STUDENT_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    if not (TEACHER_INTERLEAVED and STUDENT_INTERLEAVED):
        pixels = aligned(pixels, ALIGN)
    inside = p < pixels
    logits = tl.zeros([K_PAD, BLOCK_P], tl.float32)
    student_logits = tl.zeros([K_PAD, BLOCK_P], tl.float32)
    d = tl.zeros([BLOCK_P], tl.float32)
    partial = partials + row * row_size
    if SUMS:
        windows = tap_windows(p, pixels, width, 16)
        r = tl.arange(0, 16)
        written = (r < 9) & ((r // 3 == 1) | is_edge(tile, pixels, width, BLOCK_P))

    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, teacher_n, teacher_stride, TEACHER_INTERLEAVED)
        t = tl.load(teacher + at, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
        if K > 0:
            e_at = k[:, None] * channels + c[None, :]
            e = tl.load(tokens + e_at, mask=(k < K)[:, None] & (c < channels)[None, :], other=0.0)  # [K_PAD, BLOCK_C]
            logits = tl.dot(e, t, logits, input_precision=PRECISION)
        if HAS_STUDENT:
            at = feature_offsets(n, c, p, student_n, student_stride, STUDENT_INTERLEAVED)
            s = tl.load(student + at, mask=valid, other=0.0).to(tl.float32)
            d += tl.sum((s - t) * (s - t), 0)
            if CUSTOMIZE:
                student_logits = tl.dot(e, s, student_logits, input_precision=PRECISION)
        if SUMS:
            # Ones, zeros and half types are exact in TF32.
            if teacher.dtype.element_ty.primitive_bitwidth == 16:
                sums_c = tl.dot(windows, tl.trans(t), input_precision="tf32")  # [16, BLOCK_C]
            else:
                sums_c = tl.dot(windows, tl.trans(t), input_precision=PRECISION)
            to = SUMS_AT + r[:, None] * channels + c[None, :]
            tl.store(partial + to, sums_c, mask=written[:, None] & (c < channels)[None, :])

    column = pixel_offset + p
    if HAS_STUDENT:
        tl.store(distance + n * total_pixels + column, d, mask=inside)
    if K > 0:
        real = (k < K)[:, None] & inside[None, :]
        m = tl.where(real, tl.sigmoid(logits), 0.0)  # [K_PAD, BLOCK_P]
        mask_at = (n * K + k[:, None]) * total_pixels + column[None, :]
        if CUSTOMIZE:
            tl.store(teacher_masks + mask_at, m, mask=real)
            m = tl.where(tl.load(customize) != 0, m * tl.sigmoid(student_logits), m)
        tl.store(masks + mask_at, m, mask=real)
        tl.store(partial + k, tl.sum(m, 1), mask=k < K)
        if HAS_STUDENT:
            tl.store(partial + K + k, tl.sum(m * m * d[None, :], 1), mask=k < K)
        gram = tl.dot(m, tl.trans(m), input_precision=PRECISION)  # [K_PAD, K_PAD]
        tl.store(partial + 2 * K + k[:, None] * K + k[None, :], gram, mask=(k < K)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["total_pixels", "row_size"])
def forward_kernel(
    teacher,  # tuple: [N, C, P]
    student,  # tuple: [N, C, P]
    tokens,  # tuple: [K, C]
    customize,  # [] bool
    masks,  # [N, K, total P]
    teacher_masks,  # [N, K, total P]
    distance,  # [N, total P]
    partials,  # [N * tiles, row_size]: mass, error, gram, and from SUMS_AT on [9, C]
    levels,
    widths,
    pixel_offsets,
    total_pixels,
    row_size,
    teacher_strides,
    student_strides,
    C_ALIGN: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TEACHER_INTERLEAVED: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_AT: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            forward_tile(
                pick(teacher, level),
                pick(student, level),
                pick(tokens, level),
                customize,
                masks,
                teacher_masks,
                distance,
                partials,
                n,
                partial_row(tile, n, level, levels),
                tile - integer(levels.first_tile, level),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(widths, level),
                total_pixels,
                integer(pixel_offsets, level),
                row_size,
                integer(teacher_strides.image, level),
                integer(teacher_strides.rest, level),
                integer(student_strides.image, level),
                integer(student_strides.rest, level),
                1 if narrow else WIDE,
                C_ALIGN,
                K,
                K_PAD,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                TEACHER_INTERLEAVED,
                STUDENT_INTERLEAVED,
                HAS_STUDENT,
                CUSTOMIZE,
                SUMS,
                SUMS_AT,
            )


@triton.jit(do_not_specialize=["total_channels", "row_size"])
def reduce_stats_kernel(
    partials,  # [N * tiles, row_size] of forward_kernel
    mass,  # [levels, N, K]
    error,  # [levels, N, K]
    gram,  # [levels, N, K, K]
    sums,  # [N, 9, total C]
    levels,
    widths,
    channel_offsets,
    total_channels,
    row_size,
    K: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_AT: tl.constexpr,
    BLOCK_P: tl.constexpr,  # of forward_kernel
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1)
    level = tl.program_id(2)
    tiles = integer(levels.tiles, level)
    channels = integer(levels.channels, level)
    column, tap = i, (i - SUMS_AT) // channels
    if SUMS:
        column = tl.where(i < SUMS_AT, i, i + (3 + tap % 3 - tap) * channels)  # where other tiles have it
    pixels, width = integer(levels.pixels, level), integer(widths, level)
    row = tl.num_programs(1) * integer(levels.first_tile, level) + n * tiles
    written = (i < 2 * K + K * K) | ((i >= SUMS_AT) & (i < SUMS_AT + 9 * channels * SUMS))  # the rest is padding
    partial = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        valid = (tile < tiles)[:, None] & written[None, :]
        at = tl.where(is_edge(tile, pixels, width, BLOCK_P)[:, None], i[None, :], column[None, :])
        at += (row + tile[:, None]).to(tl.int64) * row_size
        partial += tl.load(partials + at, mask=valid, other=0.0)
    total = tl.sum(partial, 0)
    at = level * tl.num_programs(1) + n
    if K > 0:
        tl.store(mass + at * K + i, total, mask=i < K)
        if HAS_STUDENT:
            tl.store(error + at * K + (i - K), total, mask=(i >= K) & (i < 2 * K))
        tl.store(gram + at * (K * K) + (i - 2 * K), total, mask=(i >= 2 * K) & (i < 2 * K + K * K))
    if SUMS:
        to = (n * 9 + tap) * total_channels + integer(channel_offsets, level) + (i - SUMS_AT) % channels
        tl.store(sums + to, total, mask=(i >= SUMS_AT) & (tap < 9))


@triton.jit
def backward_tile(
    teacher,
    student,
    tokens,
    masks,
    teacher_masks,
    distance,
    grad_masks,
    grad_distance,
    grad_mass,
    grad_error,
    grad_gram,
    grad_sums,
    grad_teacher,
    grad_student,
    partial,
    n,
    at_level,
    p,
    channels,
    pixels,
    width,
    total_pixels,
    pixel_offset,
    total_channels,
    channel_offset,
    teacher_n,
    teacher_stride,
    student_n,
    student_stride,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TEACHER_INTERLEAVED: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    GRAD_INTERLEAVED: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_DISTANCE: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    HAS_GRAM: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    WANT_TEACHER: tl.constexpr,
    WANT_TOKENS: tl.constexpr,
    WANT_STUDENT: tl.constexpr,
):
    k = tl.arange(0, K_PAD)
    teacher_n, teacher_stride = aligned(teacher_n, ALIGN), aligned(teacher_stride, ALIGN)
    student_n, student_stride = aligned(student_n, ALIGN), aligned(student_stride, ALIGN)
    channels = aligned(channels, C_ALIGN)
    if TEACHER_INTERLEAVED or STUDENT_INTERLEAVED:
        channels = aligned(channels, ALIGN)
    if not (TEACHER_INTERLEAVED and STUDENT_INTERLEAVED):
        pixels = aligned(pixels, ALIGN)
    grad_n, grad_stride = channels.to(tl.int64) * pixels, pixels
    if GRAD_INTERLEAVED:
        grad_stride = channels
    inside = p < pixels
    column = pixel_offset + p
    coefficient = tl.zeros([BLOCK_P], tl.float32)
    if HAS_DISTANCE:
        coefficient += tl.load(grad_distance + n * total_pixels + column, mask=inside, other=0.0)
    if K > 0:
        real = (k < K)[:, None] & inside[None, :]
        mask_at = (n * K + k[:, None]) * total_pixels + column[None, :]
        m = tl.load(masks + mask_at, mask=real, other=0.0)  # [K_PAD, BLOCK_P]
        if HAS_ERROR:
            g_error = tl.load(grad_error + at_level * K + k, mask=k < K, other=0.0)
            coefficient += tl.sum(g_error[:, None] * m * m, 0)
        if WANT_TOKENS or WANT_TEACHER:
            inner = tl.zeros([K_PAD, BLOCK_P], tl.float32)
            if HAS_MASS:
                inner += tl.load(grad_mass + at_level * K + k, mask=k < K, other=0.0)[:, None]
            if HAS_ERROR:
                d = tl.load(distance + n * total_pixels + column, mask=inside, other=0.0)
                inner += 2 * g_error[:, None] * m * d[None, :]
            if HAS_GRAM:
                both = (k < K)[:, None] & (k < K)[None, :]
                gram = tl.load(grad_gram + at_level * K * K + k[:, None] * K + k[None, :], mask=both, other=0.0)
                gram += tl.load(grad_gram + at_level * K * K + k[None, :] * K + k[:, None], mask=both, other=0.0)
                inner = tl.dot(gram, m, inner, input_precision=PRECISION)
            if HAS_MASKS:
                inner += tl.load(grad_masks + mask_at, mask=real, other=0.0)
            factor = m
            if CUSTOMIZE:
                factor = tl.load(teacher_masks + mask_at, mask=real, other=0.0)
            d_logits = tl.where(real, inner * m * (1 - factor), 0.0)  # [K_PAD, BLOCK_P]
    coefficient *= 2
    if HAS_SUMS and WANT_TEACHER:
        windows = tap_windows(p, pixels, width, 16)

    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, teacher_n, teacher_stride, TEACHER_INTERLEAVED)
        t = tl.load(teacher + at, mask=valid, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
        grad_at = feature_offsets(n, c, p, grad_n, grad_stride, GRAD_INTERLEAVED)
        d_teacher = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        if HAS_STUDENT:
            at = feature_offsets(n, c, p, student_n, student_stride, STUDENT_INTERLEAVED)
            s = tl.load(student + at, mask=valid, other=0.0).to(tl.float32)
            d_student = coefficient[None, :] * (s - t)
            d_teacher -= d_student
            if WANT_STUDENT:
                tl.store(grad_student + grad_at, d_student.to(grad_student.dtype.element_ty), mask=valid)
        if WANT_TOKENS:
            d_tokens = tl.dot(d_logits, tl.trans(t), input_precision=PRECISION)  # [K_PAD, BLOCK_C]
            to = k[:, None] * channels + c[None, :]
            tl.store(partial + to, d_tokens, mask=(k < K)[:, None] & (c < channels)[None, :])
        if WANT_TEACHER:
            if K > 0:
                e_at = k[None, :] * channels + c[:, None]
                e = tl.load(tokens + e_at, mask=(k < K)[None, :] & (c < channels)[:, None], other=0.0)
                d_teacher = tl.dot(e, d_logits, d_teacher, input_precision=PRECISION)
            if HAS_SUMS:
                r = tl.arange(0, 16)
                g_at = (n * 9 + r[None, :]) * total_channels + channel_offset + c[:, None]
                g = tl.load(grad_sums + g_at, mask=(r < 9)[None, :] & (c < channels)[:, None], other=0.0)
                d_teacher = tl.dot(g, windows, d_teacher, input_precision=PRECISION)
            tl.store(grad_teacher + grad_at, d_teacher.to(grad_teacher.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["total_pixels", "total_channels", "row_size"])
def backward_kernel(
    teacher,  # tuple: [N, C, P]
    student,  # tuple: [N, C, P]
    tokens,  # tuple: [K, C]
    masks,  # [N, K, total P]
    teacher_masks,  # [N, K, total P]
    distance,  # [N, total P]
    grad_masks,  # [N, K, total P]
    grad_distance,  # [N, total P]
    grad_mass,  # [levels, N, K]
    grad_error,  # [levels, N, K]
    grad_gram,  # [levels, N, K, K]
    grad_sums,  # [N, 9, total C]
    grad_teacher,  # tuple: [N, C, P], laid out like the student where there is one
    grad_student,  # tuple: [N, C, P]
    partials,  # [N * tiles, row_size] token gradients, [K, C] in each row
    levels,
    widths,
    pixel_offsets,
    total_pixels,
    channel_offsets,
    total_channels,
    row_size,
    teacher_strides,
    student_strides,
    C_ALIGN: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NARROW_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TEACHER_INTERLEAVED: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    GRAD_INTERLEAVED: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_DISTANCE: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    HAS_GRAM: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    WANT_TEACHER: tl.constexpr,
    WANT_TOKENS: tl.constexpr,
    WANT_STUDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    level = level_of(tile, levels)
    for narrow in tl.static_range(2):
        if integer(levels.wide, level) != narrow:
            backward_tile(
                pick(teacher, level),
                pick(student, level),
                pick(tokens, level),
                masks,
                teacher_masks,
                distance,
                grad_masks,
                grad_distance,
                grad_mass,
                grad_error,
                grad_gram,
                grad_sums,
                pick(grad_teacher, level),
                pick(grad_student, level),
                partials + partial_row(tile, n, level, levels) * row_size,
                n,
                level * tl.num_programs(1) + n,
                (tile - integer(levels.first_tile, level)) * BLOCK_P + tl.arange(0, BLOCK_P),
                integer(levels.channels, level),
                integer(levels.pixels, level),
                integer(widths, level),
                total_pixels,
                integer(pixel_offsets, level),
                total_channels,
                integer(channel_offsets, level),
                integer(teacher_strides.image, level),
                integer(teacher_strides.rest, level),
                integer(student_strides.image, level),
                integer(student_strides.rest, level),
                1 if narrow else WIDE,
                C_ALIGN,
                K,
                K_PAD,
                NARROW_C if narrow else BLOCK_C,
                BLOCK_P,
                TEACHER_INTERLEAVED,
                STUDENT_INTERLEAVED,
                GRAD_INTERLEAVED,
                HAS_STUDENT,
                CUSTOMIZE,
                HAS_MASKS,
                HAS_DISTANCE,
                HAS_MASS,
                HAS_ERROR,
                HAS_GRAM,
                HAS_SUMS,
                WANT_TEACHER,
                WANT_TOKENS,
                WANT_STUDENT,
            )


# ---- Launchers ---------------------------------------------------------------------------------


# Channels per step, where rows are whole vectors and where they are not; pixels; warps. Nothing spills, and a thread
# has 128 bits of a tile or more.


def forward_blocks(element_size: int) -> tuple[int, int, int, int]:
    return (32, 16, 64, 4) if element_size == 2 else (16, 16, 64, 4)


def backward_blocks(element_size: int, wants_logits: bool) -> tuple[int, int, int, int]:
    if not wants_logits:
        return STREAM_C, NARROW_STREAM_C, STREAM_P, STREAM_WARPS
    return (32, 16, 32, 4) if element_size == 2 else (32, 16, 64, 8)


def _element_size(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> int:
    return max(x.element_size() for x in (*teacher, *student))


def pad_tokens(num_tokens: int) -> int:
    """Rows of the tiles that hold tokens: tl.dot's 16 at least."""
    return max(16, int(triton.next_power_of_2(num_tokens)))


def _dense(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Maps:
    """Per level its teacher, and its student where there is one. Their layouts may differ."""
    levels = zip(teacher, student, strict=True) if student else zip(teacher, strict=True)
    return [tuple(layout.dense_view(x) for x in level) for level in levels]


def _features(maps: Maps) -> dict[str, object]:
    """The arguments that both kernels take of the two maps."""
    t, s = [level[0] for level in maps], [level[-1] for level in maps]
    return {
        "teacher": pointers(t),
        "student": pointers(s),
        "teacher_strides": strides_of(t),
        "student_strides": strides_of(s),
        "TEACHER_INTERLEAVED": t[0].interleaved,
        "STUDENT_INTERLEAVED": s[0].interleaved,
        "HAS_STUDENT": len(maps[0]) > 1,
    }


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
    widths = tuple(x.shape[3] if x.dim() == 4 else 0 for x in teacher)
    pixel_offsets = offsets([level[0].shape[2] for level in maps])
    channel_offsets = offsets([level[0].shape[1] for level in maps])
    block_c, narrow_c, block_p, warps = forward_blocks(_element_size(teacher, student))
    # The sums start on a multiple of 16 elements.
    sums_at = triton.cdiv(2 * k + k * k, 16) * 16
    for run, run_maps in runs(maps):
        levels = as_levels(run_maps, block_p)
        row_size = sums_at + (TAPS * max(levels.channels) if wants_sums else 0)
        partials = new_partials(levels, n, row_size, teacher[0])
        if n and sum(levels.tiles):
            launch(
                forward_kernel,
                (sum(levels.tiles), n),
                tokens=tuple(e.contiguous() for e in tokens[run]) if tokens else pointers([x[0] for x in run_maps]),
                customize=out.mass if customize is None else customize,
                masks=out.masks,
                teacher_masks=out.teacher_masks,
                distance=out.distance,
                partials=partials,
                levels=levels.encoded(),
                widths=encode(widths[run]),
                pixel_offsets=encode(pixel_offsets[run]),
                total_pixels=out.masks.shape[2],
                row_size=row_size,
                **_features(run_maps),
                C_ALIGN=channel_alignment(levels.channels),
                K=k,
                K_PAD=pad_tokens(k),
                BLOCK_C=block_c,
                NARROW_C=narrow_c,
                BLOCK_P=block_p,
                CUSTOMIZE=customize is not None and k > 0 and len(student) > 0,
                SUMS=wants_sums,
                SUMS_AT=sums_at,
                num_warps=warps,
            )
        if n and row_size:
            block, rows = reduce_shape(row_size)
            launch(
                reduce_stats_kernel,
                (triton.cdiv(row_size, block), n, len(levels.tiles)),
                partials,
                of_run(out.mass, run),
                of_run(out.error, run) if student else out.mass,
                of_run(out.gram, run),
                out.sums,
                levels.encoded(),
                encode(widths[run]),
                encode(channel_offsets[run]),
                sum(x.shape[1] for x in teacher),
                row_size,
                K=k,
                HAS_STUDENT=len(student) > 0,
                SUMS=wants_sums,
                SUMS_AT=sums_at,
                BLOCK_P=block_p,
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
    k, nothing = tokens[0].shape[0] if tokens else 0, saved.masks
    widths = tuple(x.shape[3] if x.dim() == 4 else 0 for x in teacher)
    pixel_offsets = offsets([level[0].shape[2] for level in maps])
    channel_offsets = offsets([level[0].shape[1] for level in maps])
    wants_logits = bool(grad_teacher or grad_tokens)
    block_c, narrow_c, block_p, warps = backward_blocks(_element_size(teacher, student), wants_logits)

    def given(x: Tensor | None, run: slice) -> Tensor:
        return nothing if x is None else of_run(x, run)

    for run, run_maps in runs(maps):
        levels = as_levels(run_maps, block_p)
        own = pointers([level[0] for level in run_maps])
        row_size = k * max(levels.channels) if grad_tokens else 0
        partials = new_partials(levels, n, row_size, teacher[0])
        if n and sum(levels.tiles):
            launch(
                backward_kernel,
                (sum(levels.tiles), n),
                tokens=tuple(e.contiguous() for e in tokens[run]) if tokens else own,
                masks=saved.masks,
                teacher_masks=saved.teacher_masks,
                distance=saved.distance,
                grad_masks=nothing if grad_masks is None else grad_masks,
                grad_distance=nothing if grad_distance is None else grad_distance,
                grad_mass=given(grad_mass, run),
                grad_error=given(grad_error, run),
                grad_gram=given(grad_gram, run),
                grad_sums=nothing if grad_sums is None else grad_sums,
                grad_teacher=tuple(grad_teacher[run]) if grad_teacher else own,
                grad_student=tuple(grad_student[run]) if grad_student else own,
                partials=partials,
                levels=levels.encoded(),
                widths=encode(widths[run]),
                pixel_offsets=encode(pixel_offsets[run]),
                total_pixels=saved.masks.shape[2],
                channel_offsets=encode(channel_offsets[run]),
                total_channels=sum(x.shape[1] for x in teacher),
                row_size=row_size,
                **_features(run_maps),
                C_ALIGN=channel_alignment(levels.channels),
                K=k,
                K_PAD=pad_tokens(k),
                BLOCK_C=block_c,
                NARROW_C=narrow_c,
                BLOCK_P=block_p,
                GRAD_INTERLEAVED=run_maps[0][-1].interleaved,
                CUSTOMIZE=saved.teacher_masks.numel() > 0,
                HAS_MASKS=grad_masks is not None,
                HAS_DISTANCE=grad_distance is not None,
                HAS_MASS=grad_mass is not None,
                HAS_ERROR=grad_error is not None and len(student) > 0,
                HAS_GRAM=grad_gram is not None,
                HAS_SUMS=grad_sums is not None,
                WANT_TEACHER=bool(grad_teacher),
                WANT_TOKENS=bool(grad_tokens),
                WANT_STUDENT=bool(grad_student),
                num_warps=warps,
            )
        if grad_tokens:
            reduce_tiles(partials, grad_tokens[run], levels, [k * c for c in levels.channels], n, per_image=False)
