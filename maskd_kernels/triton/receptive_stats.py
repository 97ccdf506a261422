"""Triton kernels of ``receptive_stats``.

Forward equation, gradients and traffic: csrc/receptive_stats.h and reference.py. One program takes a tile
of ``BLOCK_P`` pixels of one image and walks its channels ``BLOCK_C`` at a time; tokens are padded to the 16
rows that ``tl.dot`` wants. Everything accumulates in float32, and products keep float32's accuracy on tensor
cores by three TF32 products each (``tf32x3``); plain TF32 is never used. Each program writes its own partial
sums and a second kernel adds them in a fixed order, so that results are bitwise repeatable. Offsets are
64-bit. No autotuning: nothing recompiles when image sizes change, but for what divides them (``*_ALIGN``).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
from maskd_kernels.reference import TAPS, ReceptiveStats
from maskd_kernels.triton.common import (
    STREAM_C,
    STREAM_P,
    STREAM_WARPS,
    alignment,
    feature_offsets,
    new_partials,
    reduce_tiles,
    tile_grid,
)

BLOCK_C = 32
BLOCK_P = 64
NUM_WARPS = 4
PRECISION = tl.constexpr("tf32x3")
_SIZES = ["channels", "pixels", "width", "total_pixels", "total_channels"]
_STRIDES = ["teacher_n", "teacher_stride", "student_n", "student_stride"]


@triton.jit
def tap_windows(p, pixels, width, ROWS: tl.constexpr):
    """[ROWS, BLOCK_P] float: row 3i + j is 1 where tap (i, j) reads a pixel (reference.tap_windows), else 0."""
    i, j = tl.arange(0, ROWS)[:, None] // 3, tl.arange(0, ROWS)[:, None] % 3
    x, image = p % tl.maximum(width, 1), width > 0
    first_row, last_row = image & (p < width), image & (p >= pixels - width)
    first_column, last_column = image & (x == 0), image & (x == width - 1)
    read = (p < pixels)[None, :] & (i < 3)
    read &= ((i != 0) | ~last_row[None, :]) & ((i != 2) | ~first_row[None, :])
    read &= ((j != 0) | ~last_column[None, :]) & ((j != 2) | ~first_column[None, :])
    return read.to(tl.float32)


@triton.jit(do_not_specialize=["channels", "pixels", "width", "total_pixels", "pixel_offset", *_STRIDES])
def forward_kernel(
    teacher,  # [N, C, P]
    student,  # [N, C, P]
    tokens,  # [K, C]
    customize,  # [] bool
    masks,  # [N, K, total P]
    teacher_masks,  # [N, K, total P]
    distance,  # [N, total P]
    partials,  # [N * tiles, 2K + K*K]: mass, error, gram
    sums,  # [N * tiles, 9, C]
    channels,
    pixels,
    width,
    total_pixels,
    pixel_offset,
    teacher_n,
    teacher_stride,
    student_n,
    student_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    TEACHER_INTERLEAVED: tl.constexpr,
    STUDENT_INTERLEAVED: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    CUSTOMIZE: tl.constexpr,
    SUMS: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    task = n * tl.num_programs(0) + tile
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, K_PAD)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    teacher_n, teacher_stride = teacher_n // ALIGN * ALIGN, teacher_stride // ALIGN * ALIGN
    student_n, student_stride = student_n // ALIGN * ALIGN, student_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    inside = p < pixels
    logits = tl.zeros([K_PAD, BLOCK_P], tl.float32)
    student_logits = tl.zeros([K_PAD, BLOCK_P], tl.float32)
    d = tl.zeros([BLOCK_P], tl.float32)
    if SUMS:
        windows = tap_windows(p, pixels, width, 16)

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
            sums_c = tl.dot(windows, tl.trans(t), input_precision=PRECISION)  # [16, BLOCK_C]
            r = tl.arange(0, 16)
            to = (task * 9 + r[:, None]) * channels + c[None, :]
            tl.store(sums + to, sums_c, mask=(r < 9)[:, None] & (c < channels)[None, :])

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
        partial = partials + task * (2 * K + K * K)
        tl.store(partial + k, tl.sum(m, 1), mask=k < K)
        if HAS_STUDENT:
            tl.store(partial + K + k, tl.sum(m * m * d[None, :], 1), mask=k < K)
        gram = tl.dot(m, tl.trans(m), input_precision=PRECISION)  # [K_PAD, K_PAD]
        tl.store(partial + 2 * K + k[:, None] * K + k[None, :], gram, mask=(k < K)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "pixel_offset", "channel_offset"])
def backward_kernel(
    teacher,  # [N, C, P]
    student,  # [N, C, P]
    tokens,  # [K, C]
    masks,  # [N, K, total P]
    teacher_masks,  # [N, K, total P]
    distance,  # [N, total P]
    grad_masks,  # [N, K, total P]
    grad_distance,  # [N, total P]
    grad_mass,  # [N, K] of this level
    grad_error,  # [N, K] of this level
    grad_gram,  # [N, K, K] of this level
    grad_sums,  # [N, 9, total C]
    grad_teacher,  # [N, C, P], laid out like the student where there is one
    grad_student,  # [N, C, P]
    partials,  # [N * tiles, K, C] token gradients
    channels,
    pixels,
    width,
    total_pixels,
    total_channels,
    pixel_offset,
    channel_offset,
    teacher_n,
    teacher_stride,
    student_n,
    student_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
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
    task = n * tl.num_programs(0) + tile
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.arange(0, K_PAD)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    teacher_n, teacher_stride = teacher_n // ALIGN * ALIGN, teacher_stride // ALIGN * ALIGN
    student_n, student_stride = student_n // ALIGN * ALIGN, student_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
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
            g_error = tl.load(grad_error + n * K + k, mask=k < K, other=0.0)
            coefficient += tl.sum(g_error[:, None] * m * m, 0)
        if WANT_TOKENS or WANT_TEACHER:
            inner = tl.zeros([K_PAD, BLOCK_P], tl.float32)
            if HAS_MASS:
                inner += tl.load(grad_mass + n * K + k, mask=k < K, other=0.0)[:, None]
            if HAS_ERROR:
                d = tl.load(distance + n * total_pixels + column, mask=inside, other=0.0)
                inner += 2 * g_error[:, None] * m * d[None, :]
            if HAS_GRAM:
                both = (k < K)[:, None] & (k < K)[None, :]
                gram = tl.load(grad_gram + n * K * K + k[:, None] * K + k[None, :], mask=both, other=0.0)
                gram += tl.load(grad_gram + n * K * K + k[None, :] * K + k[:, None], mask=both, other=0.0)
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
            to = (task * K + k[:, None]) * channels + c[None, :]
            tl.store(partials + to, d_tokens, mask=(k < K)[:, None] & (c < channels)[None, :])
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


# ---- Launchers ---------------------------------------------------------------------------------


def backward_tile(wants_logits: bool, element_size: int) -> tuple[int, int, int]:
    """Channels and pixels per step, and warps: no register spills, and 128 bits of a tile or more for each thread."""
    if not wants_logits:
        return STREAM_C, STREAM_P, STREAM_WARPS
    return BLOCK_C, BLOCK_P, 2 * NUM_WARPS if element_size == 4 else NUM_WARPS


def _pad_tokens(num_tokens: int) -> int:
    return max(16, triton.next_power_of_2(num_tokens))


def _feature_arguments(t: layout.Feature, s: layout.Feature | None) -> tuple[dict[str, int], dict[str, int | bool]]:
    """Strides, and what is constant at compile time, of the two features. Their layouts may differ."""
    other = s if s is not None else t
    strides = {
        "teacher_n": t.stride[0],
        "teacher_stride": t.rest_stride,
        "student_n": other.stride[0],
        "student_stride": other.rest_stride,
    }
    constants = {
        **alignment(t, other),
        "TEACHER_INTERLEAVED": t.interleaved,
        "STUDENT_INTERLEAVED": other.interleaved,
        "HAS_STUDENT": s is not None,
    }
    return strides, constants


def forward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    customize: Tensor | None,
    out: ReceptiveStats,
) -> None:
    num_tokens = tokens[0].shape[0] if tokens else 0
    pixel_offset = channel_offset = 0
    for level, raw in enumerate(teacher):
        t = layout.dense_view(raw)
        s = layout.dense_view(student[level]) if student else None
        n, channels, pixels = t.shape
        tiles, _ = grid = tile_grid(t, BLOCK_P)
        partials = new_partials(t, n * tiles, 2 * num_tokens + num_tokens**2)
        sums = new_partials(t, n * tiles, TAPS * channels if out.sums.numel() else 0)
        strides, constants = _feature_arguments(t, s)
        if n * tiles:
            forward_kernel[grid](
                t.tensor,
                t.tensor if s is None else s.tensor,
                tokens[level].contiguous() if tokens else out.mass,
                out.mass if customize is None else customize,
                out.masks,
                out.teacher_masks,
                out.distance,
                partials,
                sums,
                channels,
                pixels,
                raw.shape[3] if raw.dim() == 4 else 0,
                out.masks.shape[2],
                pixel_offset,
                **strides,
                **constants,
                K=num_tokens,
                K_PAD=_pad_tokens(num_tokens),
                BLOCK_C=BLOCK_C,
                BLOCK_P=BLOCK_P,
                CUSTOMIZE=customize is not None and num_tokens > 0 and s is not None,
                SUMS=out.sums.numel() > 0,
                num_warps=NUM_WARPS,
            )
        k = num_tokens
        reduce_tiles(partials, out.mass[level], n, tiles, 0, k)
        if s is not None:
            reduce_tiles(partials, out.error[level], n, tiles, k, k)
        reduce_tiles(partials, out.gram[level], n, tiles, 2 * k, k * k)
        if out.sums.numel():
            reduce_tiles(sums, out.sums[:, :, channel_offset:], n, tiles, 0, channels, TAPS)
        pixel_offset += pixels
        channel_offset += channels


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
    num_tokens = tokens[0].shape[0] if tokens else 0
    nothing = saved.masks
    pixel_offset = channel_offset = 0
    for level, raw in enumerate(teacher):
        t = layout.dense_view(raw)
        s = layout.dense_view(student[level]) if student else None
        n, channels, pixels = t.shape
        block_c, block_p, warps = backward_tile(bool(grad_teacher or grad_tokens), raw.element_size())
        tiles, _ = grid = tile_grid(t, block_p)
        partials = new_partials(t, n * tiles, num_tokens * channels if grad_tokens else 0)
        strides, constants = _feature_arguments(t, s)
        if n * tiles:
            backward_kernel[grid](
                t.tensor,
                t.tensor if s is None else s.tensor,
                tokens[level].contiguous() if tokens else nothing,
                saved.masks,
                saved.teacher_masks,
                saved.distance,
                nothing if grad_masks is None else grad_masks,
                nothing if grad_distance is None else grad_distance,
                nothing if grad_mass is None else grad_mass[level],
                nothing if grad_error is None else grad_error[level],
                nothing if grad_gram is None else grad_gram[level],
                nothing if grad_sums is None else grad_sums,
                grad_teacher[level] if grad_teacher else nothing,
                grad_student[level] if grad_student else nothing,
                partials,
                channels,
                pixels,
                raw.shape[3] if raw.dim() == 4 else 0,
                saved.masks.shape[2],
                sum(x.shape[1] for x in teacher),
                pixel_offset,
                channel_offset,
                **strides,
                **constants,
                K=num_tokens,
                K_PAD=_pad_tokens(num_tokens),
                BLOCK_C=block_c,
                BLOCK_P=block_p,
                GRAD_INTERLEAVED=(s or t).interleaved,
                CUSTOMIZE=saved.teacher_masks.numel() > 0,
                HAS_MASKS=grad_masks is not None,
                HAS_DISTANCE=grad_distance is not None,
                HAS_MASS=grad_mass is not None,
                HAS_ERROR=grad_error is not None and s is not None,
                HAS_GRAM=grad_gram is not None,
                HAS_SUMS=grad_sums is not None,
                WANT_TEACHER=bool(grad_teacher),
                WANT_TOKENS=bool(grad_tokens),
                WANT_STUDENT=bool(grad_student),
                num_warps=warps,
            )
        if grad_tokens:
            reduce_tiles(partials, grad_tokens[level], 1, n * tiles, 0, num_tokens * channels)
        pixel_offset += pixels
        channel_offset += channels
