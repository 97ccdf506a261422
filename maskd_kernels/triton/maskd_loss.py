"""Triton kernels of ``maskd_loss``: what follows the statistics, for all levels in two launches.

The weighting's logits are ``proj (conv mean + b) + q``, ``mean`` the average of what each of the convolution's taps
reads: the first kernel computes ``proj conv`` for some columns, and multiplies them with the means of all images, so
that each convolution is read once. The second adds these up, and turns them into each mask's share of the loss.
Float32 accuracy as in ``receptive_stats``; sums in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskd_kernels.reference import TAPS, ReceptiveStats, least_mass
from maskd_kernels.triton.common import aligned, channel_alignment, encode, integer, offsets, pick
from maskd_kernels.triton.launch import empty, launch
from maskd_kernels.triton.receptive_stats import PRECISION, pad_tokens

BLOCK_N = 16  # images
BLOCK_C = 32  # channels of the convolution's output
BLOCK_J = 32  # columns: its taps and input channels
NUM_WARPS = 4


class Weighting(NamedTuple):
    """The weighting's parameters, of each level."""

    conv_weight: Any  # [C, C * 9]
    conv_bias: Any  # [C]
    projection_weight: Any  # [K, C]
    projection_bias: Any  # [K]


@triton.jit(do_not_specialize=["images", "total_channels", "blocks"])
def weighting_kernel(
    weighting,  # Weighting
    sums,  # [N, 9, total C]
    logits,  # [levels, blocks, N, K]
    channels,
    pixels,
    channel_offsets,
    images,
    total_channels,
    blocks,
    C_ALIGN: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    block = tl.program_id(0)
    level = tl.program_id(1)
    conv, bias = pick(weighting.conv_weight, level), pick(weighting.conv_bias, level)
    projection, size = pick(weighting.projection_weight, level), aligned(integer(channels, level), C_ALIGN)
    k = tl.arange(0, K_PAD)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    combined = tl.zeros([K_PAD, BLOCK_J], tl.float32)
    constant = tl.zeros([K_PAD], tl.float32)
    for start in range(0, size, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        known = (k < K)[:, None] & (c < size)[None, :]
        p = tl.load(projection + k[:, None] * size + c[None, :], mask=known, other=0.0)  # [K_PAD, BLOCK_C]
        read = (c < size)[:, None] & (j < 9 * size)[None, :]
        at = c[:, None].to(tl.int64) * (9 * size) + j[None, :]
        w = tl.load(conv + at, mask=read, other=0.0)  # [BLOCK_C, BLOCK_J]
        combined = tl.dot(p, w, combined, input_precision=PRECISION)
        constant += tl.sum(p * tl.load(bias + c, mask=c < size, other=0.0)[None, :], 1)
    constant += tl.load(pick(weighting.projection_bias, level) + k, mask=k < K, other=0.0)
    column = (j % 9) * total_channels + integer(channel_offsets, level) + j // 9
    for start in range(0, images, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < images)[:, None] & (j < 9 * size)[None, :]
        at = n[:, None].to(tl.int64) * (9 * total_channels) + column[None, :]
        mean = tl.load(sums + at, mask=mask, other=0.0) / integer(pixels, level)  # [BLOCK_N, BLOCK_J]
        part = tl.dot(mean, tl.trans(combined), input_precision=PRECISION)  # [BLOCK_N, K_PAD]
        part += tl.where(block == 0, constant, 0.0)[None, :]
        to = ((level.to(tl.int64) * blocks + block) * images + n[:, None]) * K + k[None, :]
        tl.store(logits + to, part, mask=(n < images)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["blocks", "eps"])
def share_kernel(
    mass,  # [levels, N, K]
    error,  # [levels, N, K]
    logits,  # [levels, blocks, N, K]
    share,  # [levels, N, K]
    loss,  # [levels, N]
    channels,
    blocks,
    eps,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LEAST_MASS: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    level = tl.program_id(1)
    images = tl.num_programs(0)
    k = tl.arange(0, K_PAD)
    weight = tl.full([K_PAD], 1 / K, tl.float32)
    if WEIGHTED:
        total = tl.zeros([ROWS, K_PAD], tl.float32)
        for start in range(0, blocks, ROWS):
            row = start + tl.arange(0, ROWS)
            at = ((level.to(tl.int64) * blocks + row[:, None]) * images + n) * K + k[None, :]
            total += tl.load(logits + at, mask=(row < blocks)[:, None] & (k < K)[None, :], other=0.0)
        logit = tl.where(k < K, tl.sum(total, 0), float("-inf"))
        weight = tl.exp(logit - tl.max(logit, 0))
        weight = weight / tl.sum(weight, 0)
    at = (level * images + n) * K + k
    size = tl.maximum(tl.load(mass + at, mask=k < K, other=1.0) + eps, LEAST_MASS)
    part = weight / size / (integer(channels, level).to(tl.float32) * images)
    tl.store(share + at, part, mask=k < K)
    e = tl.load(error + at, mask=k < K, other=0.0)
    tl.store(loss + level * images + n, tl.sum(part * e, 0))


# ---- Launchers ---------------------------------------------------------------------------------


def shares(
    stats: ReceptiveStats, teacher: Sequence[Tensor], weighting: Sequence[Sequence[Tensor]], eps: float
) -> tuple[Tensor, Tensor]:
    """Each mask's share of the loss ``[L, N, K]``, and the loss of each level and image ``[L, N]``."""
    levels, n, k = stats.mass.shape
    channels = tuple(t.shape[1] for t in teacher)
    blocks = triton.cdiv(TAPS * max(channels), BLOCK_J) if weighting else 0
    logits = empty(stats.mass, levels, blocks, n, k)  # the weighting's are the sums over the blocks
    share, loss = empty(stats.mass, levels, n, k), empty(stats.mass, levels, n)
    if n and blocks:
        launch(
            weighting_kernel,
            (blocks, levels),
            Weighting(*zip(*weighting, strict=True)),
            stats.sums,
            logits,
            encode(channels),
            encode([max(math.prod(t.shape[2:]), 1) for t in teacher]),
            encode(offsets(channels)),
            n,
            sum(channels),
            blocks,
            C_ALIGN=channel_alignment(channels),
            K=k,
            K_PAD=pad_tokens(k),
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            BLOCK_J=BLOCK_J,
            num_warps=NUM_WARPS,
        )
    if n:
        launch(
            share_kernel,
            (n, levels),
            stats.mass,
            stats.error,
            logits,
            share,
            loss,
            encode(channels),
            blocks,
            eps,
            K=k,
            K_PAD=pad_tokens(k),
            WEIGHTED=blocks > 0,
            LEAST_MASS=least_mass(torch.float32),
            ROWS=32,
            num_warps=1,
        )
    return share, loss
