"""Operator ``masked_conv``: a 3x3 convolution over an image of which only some pixels are kept, the others zero.

On a CPU, in float32, the kept pixels are gathered into a matrix: one product with the weights gives what each
contributes to its nine neighbours, and a kernel (csrc/sum_taps.h) adds that up. The backward gathers the neighbours'
gradients instead. The work shrinks with the share of pixels kept; the result is the convolution's, up to the order of
its sums. Everything else is the library's convolution of the masked image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from maskd_kernels import backends, native
from maskd_kernels.ops.registration import Backward, Operator

_NAME = "maskd_kernels::masked_conv"
_BACKWARD_NAME = "maskd_kernels::masked_conv_backward"

torch.library.define(_NAME, "(Tensor x, Tensor keep, Tensor weight, Tensor bias) -> Tensor")
torch.library.define(
    _BACKWARD_NAME, "(Tensor x, Tensor keep, Tensor weight, Tensor grad, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def masked_conv(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``conv2d(x * keep, weight, bias, padding=1)``, in channels-last memory.

    Args:
        x: ``[N, C, H, W]``.
        keep: ``[N, H, W]`` bool, not differentiable.
        weight: ``[D, C, 3, 3]``.
        bias: ``[D]``.

    Returns:
        ``[N, D, H, W]``. Differentiable in x, weight and bias.
    """
    result: Tensor = _operator(x, keep, weight, bias)
    return result


def _gathers(x: Tensor) -> bool:
    """Whether the kept pixels are gathered: on a CPU, in float32, where the native kernels run."""
    return x.dtype == torch.float32 and backends.resolve(x.device, x.dtype) == "native"


def _channels_last(x: Tensor, channels: int, pooled: bool = False) -> Tensor:
    n, _, height, width = x.shape
    shape, stride = (n, channels, height, width), (height * width * channels, 1, width * channels, channels)
    return native.empty(shape, x.dtype, stride) if pooled else x.new_empty_strided(shape, stride)


def _fake(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _channels_last(x, weight.shape[0])


torch.library.register_fake(_NAME, _fake)


def _reference(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x * keep[:, None], weight, bias, padding=1)


def _as_matrix(weight: Tensor) -> Tensor:
    """``[C, 9 D]``: what a pixel's channels become, tap by tap."""
    return weight.permute(1, 2, 3, 0).flatten(1)


def _forward(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    n, _, height, width = x.shape
    d = weight.shape[0]
    out = _channels_last(x, d, pooled=_gathers(x))
    if not _gathers(x):
        return out.copy_(_reference(x, keep, weight, bias))
    rows, matrix, bias = x.flatten(2).mT, _as_matrix(weight).contiguous(), bias.contiguous()
    for image in range(n):
        kept = keep[image].flatten().nonzero().squeeze(1)
        slot = torch.full((height * width,), -1, dtype=torch.int64, device=x.device)
        slot[kept] = torch.arange(len(kept), device=x.device)
        table = native.empty((len(kept), 9 * d), x.dtype)
        torch.mm(rows[image].index_select(0, kept), matrix, out=table)
        native.module().sum_taps(
            table=native.address(table),
            slot=native.address(slot),
            bias=native.address(bias),
            out=native.address(out[image].permute(1, 2, 0)),
            height=height,
            width=width,
            channels=d,
            threads=torch.get_num_threads(),
        )
    return out


def _backward_fake(
    x: Tensor, keep: Tensor, weight: Tensor, grad: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _channels_last(x, x.shape[1]) if needs[0] else x.new_empty(0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


torch.library.register_fake(_BACKWARD_NAME, _backward_fake)


def _backward(
    x: Tensor, keep: Tensor, weight: Tensor, grad: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, height, width = x.shape
    d = weight.shape[0]
    grad_x, grad_weight, grad_bias = _backward_fake(x, keep, weight, grad, needs)
    if needs[2]:
        grad_bias.copy_(grad.sum((0, 2, 3)))
    if not _gathers(x):
        if needs[0]:
            grad_x.copy_(conv2d_input(x.shape, weight, grad, padding=1) * keep[:, None])
        if needs[1]:
            grad_weight.copy_(conv2d_weight(x * keep[:, None], weight.shape, grad, padding=1))
        return grad_x, grad_weight, grad_bias
    matrix = _as_matrix(weight)
    # A pixel meets tap (i, j) in the output (1 - i, 1 - j) away from it; a border of zeros stands for those outside.
    padded = F.pad(grad, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(n, (height + 2) * (width + 2), d)
    away = torch.tensor([(1 - i) * (width + 2) + (1 - j) for i in range(3) for j in range(3)], device=x.device)
    sums = matrix.new_zeros(c, 9 * d) if needs[1] else None
    for image in range(n):
        kept = keep[image].flatten().nonzero().squeeze(1)
        centre = (kept // width + 1) * (width + 2) + kept % width + 1
        around = native.empty((len(kept), 9 * d), x.dtype)
        torch.index_select(padded[image], 0, (centre[:, None] + away).flatten(), out=around.view(-1, d))
        if needs[0]:
            flat = grad_x[image].flatten(1).mT  # [P, C]
            flat.zero_()
            flat.index_copy_(0, kept, around @ matrix.mT)
        if sums is not None:
            sums.addmm_(x[image].flatten(1).mT.index_select(0, kept).mT, around)
    if sums is not None:
        grad_weight.copy_(sums.view(c, 3, 3, d).permute(3, 0, 1, 2))
    return grad_x, grad_weight, grad_bias


def _autograd(call: Backward, grad: Tensor) -> list[Tensor]:
    needs = [call.needs[i] for i in (0, 2, 3)]
    gradients = zip(call.run(*call.arguments[:3], grad, needs), needs, strict=True)
    return [g for g, needed in gradients if needed]


_operator = Operator("masked_conv", _forward, _backward, _reference, _autograd)
