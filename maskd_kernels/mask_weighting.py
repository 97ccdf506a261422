"""The module that weights the masks: its parameters, and its output from nine sums per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MaskWeighting(NamedTuple):
    """Parameters of the module that weights the masks, as the authors define it.

    ``softmax(Conv1x1(AvgPool(Conv3x3(teacher))))``. Nothing nonlinear lies between the convolution and the
    pooling, so it is evaluated from nine sums per channel and never as a convolution over the map.

    Attributes:
        conv_weight: ``[C, C, 3, 3]``.
        conv_bias: ``[C]``.
        projection_weight: ``[K, C, 1, 1]``.
        projection_bias: ``[K]``.
    """

    conv_weight: Tensor
    conv_bias: Tensor
    projection_weight: Tensor
    projection_bias: Tensor


def weights_from_sums(sums: Tensor, teacher: list[Tensor], weighting: Sequence[MaskWeighting]) -> Tensor:
    """``[L, N, K]``: softmax of the weighting module's logits, from ``sums`` ``[N, 9, C]`` of all levels.

    The average of a convolution's output is its weights times the average of what each tap reads.
    """
    result = []
    for sum_of, t, w in zip(sums.split([t.shape[1] for t in teacher], -1), teacher, weighting, strict=True):
        mean = (sum_of / max(math.prod(t.shape[2:]), 1)).mT.flatten(1)  # [N, 9C], channels first, as the weight's
        conv_weight, projection_weight = (x.to(mean.dtype).flatten(1) for x in (w.conv_weight, w.projection_weight))
        hidden = torch.addmm(w.conv_bias.to(mean.dtype), mean, conv_weight.mT)
        logits = torch.addmm(w.projection_bias.to(mean.dtype), hidden, projection_weight.mT)
        result.append(logits.softmax(-1))
    return torch.stack(result)
