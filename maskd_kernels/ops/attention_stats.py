"""Operator ``attention_stats``: where feature maps are strong, and the means of their channels, in one read.

Defined, and computed slowly, by ``maskd_kernels.reference``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskd_kernels import backends, native, reference
from maskd_kernels.ops import layout
from maskd_kernels.ops.registration import Backward, Operator
from maskd_kernels.reference import compute_dtype
from maskd_kernels.triton.launch import made, recalled

_NAME = "maskd_kernels::attention_stats"
_BACKWARD_NAME = "maskd_kernels::attention_stats_backward"
_SMALL = 1 << 17  # elements; measured on two cores

torch.library.define(_NAME, "(Tensor[] x) -> (Tensor[], Tensor[])")
torch.library.define(_BACKWARD_NAME, "(Tensor[] x, Tensor[] grad_attention, Tensor[] grad_mean) -> Tensor[]")


def attention_stats(x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``sum_c |x| / C`` and the channels' means of all levels. The caller has validated the inputs (``functional``).

    Args:
        x: ``L`` levels of ``[N, C, *spatial]``; float32, float16, bfloat16 or float64.

    Returns:
        ``L`` tensors ``[N, *spatial]`` and ``L`` tensors ``[N, C]`` in the compute dtype (float32; float64 for float64
        features). Differentiable.
    """
    attention, mean = _operator(x)
    return list(attention), list(mean)


def _empty(x: Sequence[Tensor], pooled: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    dtype = compute_dtype(x[0].dtype)

    def empty(level: Tensor, *shape: int) -> Tensor:
        return native.empty(shape, dtype) if pooled else level.new_empty(shape, dtype=dtype)

    attention = [empty(level, level.shape[0], *level.shape[2:]) for level in x]
    return attention, [empty(level, *level.shape[:2]) for level in x]


def _fake(x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return _empty(x)


torch.library.register_fake(_NAME, _fake)


def _forward(x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    backend = backends.resolve(x[0].device, x[0].dtype, images=x[0].shape[0])
    if backend == "triton":
        attention, mean = _triton_forward(x)
        return list(attention), list(mean)
    attention, mean = _empty(x, pooled=backend == "native")
    if backend == "reference":
        for out, computed in zip((attention, mean), reference.attention_stats(x), strict=True):
            layout.copy_all(out, computed)
    else:
        for level, to_attention, to_mean in zip(x, attention, mean, strict=True):
            a = layout.dense_view(level)
            native.module().attention_stats_forward(
                shape=layout.map_shape(a),
                x=layout.describe(a),
                attention=native.address(to_attention),
                mean=native.address(to_mean),
                float64=level.dtype == torch.float64,
            )
    return attention, mean


@recalled
def _triton_forward(x: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    from maskd_kernels.triton import attention_stats as kernels

    attention, mean = made(_empty(x))
    kernels.forward(x, attention, mean)
    return attention, mean


def _backward_fake(x: list[Tensor], grad_attention: list[Tensor], grad_mean: list[Tensor]) -> list[Tensor]:
    return layout.empty_like(x)


torch.library.register_fake(_BACKWARD_NAME, _backward_fake)


def _backward(x: list[Tensor], grad_attention: list[Tensor], grad_mean: list[Tensor]) -> list[Tensor]:
    backend = backends.resolve(x[0].device, x[0].dtype, images=x[0].shape[0])
    grad_attention, grad_mean = [g.contiguous() for g in grad_attention], [g.contiguous() for g in grad_mean]
    if backend == "triton":
        return list(_triton_backward(x, grad_attention, grad_mean))
    out = layout.empty_like(x, pooled=backend == "native")
    if backend == "reference":
        layout.copy_all(out, reference.attention_stats_backward(x, grad_attention, grad_mean))
    else:
        for level, from_attention, from_mean, result in zip(x, grad_attention, grad_mean, out, strict=True):
            a = layout.dense_view(level)
            native.module().attention_stats_backward(
                shape=layout.map_shape(a),
                x=layout.describe(a),
                grad_x=layout.describe(layout.dense_view(result)),
                grad_attention=native.address(from_attention),
                grad_mean=native.address(from_mean),
                float64=level.dtype == torch.float64,
            )
    return out


@recalled
def _triton_backward(x: list[Tensor], grad_attention: list[Tensor], grad_mean: list[Tensor]) -> tuple[Tensor, ...]:
    from maskd_kernels.triton import attention_stats as kernels

    out = made(layout.empty_like(x))
    kernels.backward(x, grad_attention, grad_mean, out)
    return tuple(out)


def _autograd(call: Backward, grad_attention: list[Tensor], grad_mean: list[Tensor]) -> list[Tensor]:
    gradients: list[Tensor] = call.run(*call.arguments, grad_attention, grad_mean)
    return gradients


_operator = Operator("attention_stats", _forward, _backward, reference.attention_stats, _autograd, small=_SMALL)
