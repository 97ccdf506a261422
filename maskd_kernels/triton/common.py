"""What the Triton kernels and their launchers share: offsets, what divides strides, sums over tiles."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.ops import layout

# Channels and pixels per step, and warps, of kernels that only stream: 128 bits of a tile or more for each thread.
STREAM_C, STREAM_P, STREAM_WARPS = 16, 128, 4


@triton.jit
def feature_offsets(n, c, p, stride_n, stride, INTERLEAVED: tl.constexpr):
    """[BLOCK_C, BLOCK_P] offsets into a feature; ``stride`` is that of the axis that is not dense."""
    if INTERLEAVED:
        return n * stride_n + p[None, :].to(tl.int64) * stride + c[:, None]
    return n * stride_n + c[:, None].to(tl.int64) * stride + p[None, :]


@triton.jit(do_not_specialize=["rows", "row_size", "width", "begin", "out_n", "out_set"])
def reduce_kernel(partials, out, rows, row_size, begin, width, out_n, out_set, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[n, set, :width] = sum of n's ``rows`` partial rows, columns ``begin + set * width`` on, in a fixed order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (n * rows + row[:, None]) * row_size + begin + which * width + i[None, :]
        total += tl.load(partials + at, mask=(row < rows)[:, None] & (i < width)[None, :], other=0.0)
    tl.store(out + n * out_n + which * out_set + i, tl.sum(total, 0), mask=i < width)


def reduce_tiles(partials: Tensor, out: Tensor, images: int, rows: int, begin: int, width: int, sets: int = 1) -> None:
    """out [images, (sets,) width] = partials [images * rows, ...] summed over the rows of each image."""
    if width and images:
        block = min(64, triton.next_power_of_2(width))
        grid = (triton.cdiv(width, block), images, sets)
        strides = (out.stride(0), out.stride(1) if sets > 1 else 0)
        reduce_kernel[grid](
            partials, out, rows, partials.shape[1], begin, width, *strides, ROWS=2048 // block, BLOCK=block, num_warps=4
        )


def tile_grid(feature: layout.Feature, block: int) -> tuple[int, int]:
    """Tiles of ``block`` pixels, images."""
    n, _, pixels = feature.shape
    return triton.cdiv(pixels, block), n


def alignment(*features: layout.Feature) -> dict[str, int]:
    """Powers of two, up to the 8 elements of a 128-bit load, that divide row starts and row lengths."""
    _, channels, pixels = features[0].shape
    return {
        "ALIGN": math.gcd(8, *(f.stride[0] for f in features), *(f.rest_stride for f in features)),
        "C_ALIGN": math.gcd(8, channels),
        "P_ALIGN": math.gcd(8, pixels),
    }


def new_partials(feature: layout.Feature, rows: int, width: int) -> Tensor:
    """Memory for one row of partial sums per tile."""
    return feature.tensor.new_empty(rows, width, dtype=torch.float32)
