"""Triton kernels of ``scale_pixels``. Equations and traffic: csrc/scale_pixels.h.

One program takes a tile of ``STREAM_P`` pixels of one image and walks its channels, so that the scale's gradient
stays in registers. 64-bit offsets; float32 arithmetic.
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
    tile_grid,
)

_SIZES = ["channels", "pixels"]


@triton.jit(do_not_specialize=[*_SIZES, "x_n", "x_stride", "y_n", "y_stride"])
def forward_kernel(
    x,  # [N, C, P]
    scale,  # [N, P]
    y,  # [N, C, P]
    channels,
    pixels,
    x_n,
    x_stride,
    y_n,
    y_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
    Y_INTERLEAVED: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    x_n, x_stride = x_n // ALIGN * ALIGN, x_stride // ALIGN * ALIGN
    y_n, y_stride = y_n // ALIGN * ALIGN, y_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    inside = p < pixels
    s = tl.load(scale + n * pixels + p, mask=inside, other=0.0)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * s[None, :]
        at = feature_offsets(n, c, p, y_n, y_stride, Y_INTERLEAVED)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=[*_SIZES, "x_n", "x_stride", "grad_y_n", "grad_y_stride", "grad_x_n", "grad_x_stride"])
def backward_kernel(
    x,  # [N, C, P]
    scale,  # [N, P]
    grad_y,  # [N, C, P]
    grad_x,  # [N, C, P]
    grad_scale,  # [N, P]
    channels,
    pixels,
    x_n,
    x_stride,
    grad_y_n,
    grad_y_stride,
    grad_x_n,
    grad_x_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALIGN: tl.constexpr,
    C_ALIGN: tl.constexpr,
    P_ALIGN: tl.constexpr,
    X_INTERLEAVED: tl.constexpr,
    GRAD_Y_INTERLEAVED: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_SCALE: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    # Multiplying by a constant is how the compiler learns what divides a value, and thus how wide it may load.
    x_n, x_stride = x_n // ALIGN * ALIGN, x_stride // ALIGN * ALIGN
    grad_y_n, grad_y_stride = grad_y_n // ALIGN * ALIGN, grad_y_stride // ALIGN * ALIGN
    grad_x_n, grad_x_stride = grad_x_n // ALIGN * ALIGN, grad_x_stride // ALIGN * ALIGN
    channels, pixels = channels // C_ALIGN * C_ALIGN, pixels // P_ALIGN * P_ALIGN
    inside = p < pixels
    s = tl.load(scale + n * pixels + p, mask=inside, other=0.0)
    d_scale = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = (c < channels)[:, None] & inside[None, :]
        at = feature_offsets(n, c, p, grad_y_n, grad_y_stride, GRAD_Y_INTERLEAVED)
        g = tl.load(grad_y + at, mask=valid, other=0.0).to(tl.float32)
        if WANT_SCALE:
            at = feature_offsets(n, c, p, x_n, x_stride, X_INTERLEAVED)
            d_scale += tl.sum(g * tl.load(x + at, mask=valid, other=0.0).to(tl.float32), 0)
        if WANT_X:
            at = feature_offsets(n, c, p, grad_x_n, grad_x_stride, X_INTERLEAVED)
            tl.store(grad_x + at, (g * s[None, :]).to(grad_x.dtype.element_ty), mask=valid)
    if WANT_SCALE:
        tl.store(grad_scale + n * pixels + p, d_scale, mask=inside)


# ---- Launchers ---------------------------------------------------------------------------------


def forward(x: Sequence[Tensor], scale: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for raw, factor, result in zip(x, scale, out, strict=True):
        a, y = layout.dense_view(raw), layout.dense_view(result)
        if raw.numel():
            forward_kernel[tile_grid(a, STREAM_P)](
                a.tensor,
                factor,
                y.tensor,
                a.shape[1],
                a.shape[2],
                a.stride[0],
                a.rest_stride,
                y.stride[0],
                y.rest_stride,
                BLOCK_C=STREAM_C,
                BLOCK_P=STREAM_P,
                **alignment(a, y),
                X_INTERLEAVED=a.interleaved,
                Y_INTERLEAVED=y.interleaved,
                num_warps=STREAM_WARPS,
            )


def backward(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    grad_x: Sequence[Tensor],  # none: not wanted
    grad_scale: Sequence[Tensor],  # likewise
) -> None:
    for i, (raw, factor, upstream) in enumerate(zip(x, scale, grad, strict=True)):
        a, g = layout.dense_view(raw), layout.dense_view(upstream)
        result = layout.dense_view(grad_x[i]) if grad_x else a
        if not raw.numel():
            continue
        backward_kernel[tile_grid(a, STREAM_P)](
            a.tensor,
            factor,
            g.tensor,
            result.tensor,
            grad_scale[i] if grad_scale else factor,
            a.shape[1],
            a.shape[2],
            a.stride[0],
            a.rest_stride,
            g.stride[0],
            g.rest_stride,
            result.stride[0],
            result.rest_stride,
            BLOCK_C=STREAM_C,
            BLOCK_P=STREAM_P,
            **alignment(a, g, result),
            X_INTERLEAVED=a.interleaved,
            GRAD_Y_INTERLEAVED=g.interleaved,
            WANT_X=bool(grad_x),
            WANT_SCALE=bool(grad_scale),
            num_warps=STREAM_WARPS,
        )
