"""Triton kernels of ``attention_stats``. Equations and traffic: csrc/attention_stats.h.

One program takes a tile of ``STREAM_P`` pixels of one image and walks its channels. Sums over pixels are written per
tile and added in a fixed order, so that results are bitwise repeatable. 64-bit offsets; float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout
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

_COMMON = ["channels", "pixels", "x_n", "x_stride"]


@triton.jit(do_not_specialize=_COMMON)
def forward_kernel(
    x,  # [N, C, P]
    attention,  # [N, P]
    partials,  # [N * tiles, C] channel means
    channels,
    pixels,
    x_n,
    x_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    x_n, x_stride = x_n // ALIGN * ALIGN, x_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    inside = p < pixels
    strength = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        strength += tl.sum(tl.abs(value), 0)
        to = (n * tl.num_programs(0) + tile) * channels + c
        tl.store(partials + to, tl.sum(value, 1) / pixels, mask=c < channels)
    tl.store(attention + n * pixels + p, strength / channels, mask=inside)


@triton.jit(do_not_specialize=_COMMON)
def backward_kernel(
    x,  # [N, C, P]
    grad_attention,  # [N, P]
    grad_mean,  # [N, C]
    grad_x,  # [N, C, P], laid out like x
    channels,
    pixels,
    x_n,
    x_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    x_n, x_stride = x_n // ALIGN * ALIGN, x_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    grad_n, grad_stride = channels.to(tl.int64) * pixels, pixels
    if X_INTERLEAVED:
        grad_stride = channels
    inside = p < pixels
    g_attention = tl.load(grad_attention + n * pixels + p, mask=inside, other=0.0) / channels
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        g_mean = tl.load(grad_mean + n * channels + c, mask=c < channels, other=0.0) / pixels
        sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
        at = feature_offsets(n, c, p, grad_n, grad_stride, X_INTERLEAVED)
        gradient = sign * g_attention[None, :] + g_mean[:, None]
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask=valid)


# ---- Launchers ---------------------------------------------------------------------------------


def forward(x: Sequence[Tensor], attention: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    for raw, to_attention, to_mean in zip(x, attention, mean, strict=True):
        a = layout.dense_view(raw)
        n, channels, pixels = a.shape
        tiles, _ = grid = tile_grid(a, STREAM_P)
        partials = new_partials(a, n * tiles, channels)
        if raw.numel():
            forward_kernel[grid](
                a.tensor,
                to_attention,
                partials,
                channels,
                pixels,
                a.stride[0],
                a.rest_stride,
                BLOCK_C=STREAM_C,
                BLOCK_P=STREAM_P,
                **alignment(a),
                X_INTERLEAVED=a.interleaved,
                num_warps=STREAM_WARPS,
            )
        reduce_tiles(partials, to_mean, n, tiles, 0, channels)


def backward(
    x: Sequence[Tensor], grad_attention: Sequence[Tensor], grad_mean: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    for raw, from_attention, from_mean, result in zip(x, grad_attention, grad_mean, out, strict=True):
        a = layout.dense_view(raw)
        if raw.numel():
            backward_kernel[tile_grid(a, STREAM_P)](
                a.tensor,
                from_attention,
                from_mean,
                result,
                a.shape[1],
                a.shape[2],
                a.stride[0],
                a.rest_stride,
                BLOCK_C=STREAM_C,
                BLOCK_P=STREAM_P,
                **alignment(a),
                X_INTERLEAVED=a.interleaved,
                num_warps=STREAM_WARPS,
            )
