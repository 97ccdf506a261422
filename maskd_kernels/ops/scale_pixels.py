"""Operator ``scale_pixels``: feature maps times one number per pixel; the backward gives both gradients in one pass.

Defined, and computed slowly, by ``maskd_kernels.reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from maskd_kernels import backends, native, reference
from maskd_kernels.ops import layout
from maskd_kernels.ops.registration import Operator
from maskd_kernels.triton.launch import made, recalled

_NAME = "maskd_kernels::scale_pixels"
_BACKWARD_NAME = "maskd_kernels::scale_pixels_backward"
_SMALL = 1 << 19  # elements; measured on two cores

torch.library.define(_NAME, "(Tensor[] x, Tensor[] scale) -> Tensor[]")
torch.library.define(_BACKWARD_NAME, "(Tensor[] x, Tensor[] scale, Tensor[] grad, bool[] needs) -> Tensor[]")


def scale_pixels(x: Sequence[Tensor], scale: Sequence[Tensor]) -> list[Tensor]:
    """``scale * x`` of all levels. The caller has validated shapes, dtypes and devices (``functional``).

    Args:
        x: ``L`` levels of ``[N, C, *spatial]``; float32, float16, bfloat16 or float64.
        scale: ``L`` contiguous tensors ``[N, *spatial]`` in the compute dtype (float32; float64 for float64 features).

    Returns:
        ``L`` tensors like ``x``, in its dtype. Differentiable in both.
    """
    return list(_operator(x, scale))


def _fake(x: list[Tensor], scale: list[Tensor]) -> list[Tensor]:
    return layout.empty_like(x)


torch.library.register_fake(_NAME, _fake)


def _forward(x: list[Tensor], scale: list[Tensor]) -> list[Tensor]:
    backend = backends.resolve(x[0].device, x[0].dtype, images=x[0].shape[0])
    if backend == "triton":
        return list(_triton_forward(x, scale))
    out = layout.empty_like(x, pooled=backend == "native")
    if backend == "reference":
        layout.copy_all(out, reference.scale_pixels(x, scale))
    else:
        for level, factor, result in zip(x, scale, out, strict=True):
            a = layout.dense_view(level)
            native.module().scale_pixels_forward(
                shape=layout.map_shape(a),
                x=layout.describe(a),
                y=layout.describe(layout.dense_view(result)),
                scale=native.address(factor),
                float64=level.dtype == torch.float64,
            )
    return out


@recalled
def _triton_forward(x: list[Tensor], scale: list[Tensor]) -> tuple[Tensor, ...]:
    from maskd_kernels.triton import scale_pixels as kernels

    out = made(layout.empty_like(x))
    kernels.forward(x, scale, out)
    return tuple(out)


def _empty_gradients(
    x: Sequence[Tensor], scale: Sequence[Tensor], needs: Sequence[bool], pooled: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    return layout.empty_like(x, pooled) if needs[0] else [], [torch.empty_like(s) for s in scale] if needs[1] else []


def _backward_fake(x: list[Tensor], scale: list[Tensor], grad: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return list(chain(*_empty_gradients(x, scale, needs)))


torch.library.register_fake(_BACKWARD_NAME, _backward_fake)


def _backward(x: list[Tensor], scale: list[Tensor], grad: list[Tensor], needs: list[bool]) -> list[Tensor]:
    backend = backends.resolve(x[0].device, x[0].dtype, images=x[0].shape[0])
    scale = [factor.contiguous() for factor in scale]  # hooks on saved tensors may change their strides
    if backend == "triton":
        return list(_triton_backward(x, scale, grad, needs))
    grad_x, grad_scale = results = _empty_gradients(x, scale, needs, pooled=backend == "native")
    if backend == "reference":
        layout.copy_all(chain(*results), chain(*reference.scale_pixels_backward(x, scale, grad, needs)))
    else:
        for i, (level, factor, upstream) in enumerate(zip(x, scale, grad, strict=True)):
            a = layout.dense_view(level)
            g = layout.with_layout(layout.dense_view(upstream), a.interleaved)
            native.module().scale_pixels_backward(
                shape=layout.map_shape(a),
                x=layout.describe(a),
                grad_y=layout.describe(g),
                grad_x=layout.describe_result(grad_x, i),
                scale=native.address(factor),
                grad_scale=native.address(grad_scale[i] if grad_scale else None),
                float64=level.dtype == torch.float64,
            )
    return list(chain(*results))


@recalled
def _triton_backward(x: list[Tensor], scale: list[Tensor], grad: list[Tensor], needs: list[bool]) -> tuple[Tensor, ...]:
    from maskd_kernels.triton import scale_pixels as kernels

    results = made(_empty_gradients(x, scale, needs))
    kernels.backward(x, scale, grad, *results)
    return tuple(chain(*results))


_operator = Operator("scale_pixels", _forward, _backward, reference.scale_pixels, small=_SMALL)
