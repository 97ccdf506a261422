"""Operator ``squared_error``: how far predicted feature maps, their channels scaled, are from their targets.

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
from maskd_kernels.reference import compute_dtype
from maskd_kernels.triton.launch import made, recalled

_NAME = "maskd_kernels::squared_error"
_BACKWARD_NAME = "maskd_kernels::squared_error_backward"
_SMALL = 1 << 17  # elements; measured on two cores

torch.library.define(_NAME, "(Tensor[] pred, Tensor[] target, Tensor[] scale) -> Tensor")
torch.library.define(
    _BACKWARD_NAME, "(Tensor[] pred, Tensor[] target, Tensor[] scale, Tensor grad, bool[] needs) -> Tensor[]"
)


def squared_error(pred: Sequence[Tensor], target: Sequence[Tensor], scale: Sequence[Tensor] = ()) -> Tensor:
    """``sum_{c,p} (scale pred - target)^2`` of all levels. The caller has validated the inputs (``functional``).

    Args:
        pred: ``L`` levels of ``[N, C, *spatial]``; float32, float16, bfloat16, or all inputs float64.
        target: like ``pred``; its floating dtype may differ.
        scale: ``L`` tensors ``[N, C]`` in the compute dtype (float32; float64 for float64 features), or none.

    Returns:
        ``[L, N]`` in the compute dtype. Differentiable in all inputs.
    """
    result: Tensor = _operator(pred, target, scale)
    return result


def _empty(pred: Sequence[Tensor]) -> Tensor:
    return pred[0].new_empty(len(pred), pred[0].shape[0], dtype=compute_dtype(pred[0].dtype))


def _fake(pred: list[Tensor], target: list[Tensor], scale: list[Tensor]) -> Tensor:
    return _empty(pred)


torch.library.register_fake(_NAME, _fake)


def _forward(pred: list[Tensor], target: list[Tensor], scale: list[Tensor]) -> Tensor:
    backend = backends.resolve(pred[0].device, pred[0].dtype, images=pred[0].shape[0])
    scale = [factor.contiguous() for factor in scale]
    if backend == "triton":
        computed: Tensor = _triton_forward(pred, target, scale)
        return computed
    out = _empty(pred)
    if backend == "reference":
        out.copy_(reference.squared_error(pred, target, scale))
    else:
        for i, (raw, goal) in enumerate(zip(pred, target, strict=True)):
            p = layout.dense_view(raw)
            t = layout.with_layout(layout.dense_view(goal), p.interleaved)
            native.module().squared_error_forward(
                shape=layout.map_shape(p),
                pred=layout.describe(p),
                target=layout.describe(t),
                scale=native.address(scale[i] if scale else None),
                error=native.address(out[i]),
                float64=raw.dtype == torch.float64,
            )
    return out


@recalled
def _triton_forward(pred: list[Tensor], target: list[Tensor], scale: list[Tensor]) -> Tensor:
    from maskd_kernels.triton import squared_error as kernels

    (out,) = made([_empty(pred)])
    kernels.forward(pred, target, scale, out)
    return out


def _empty_gradients(
    pred: Sequence[Tensor],
    target: Sequence[Tensor],
    scale: Sequence[Tensor],
    needs: Sequence[bool],
    pooled: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    interleaved = [layout.dense_view(x).interleaved for x in pred]
    return (
        layout.empty_like(pred, pooled) if needs[0] else [],
        [layout.empty_gradient(t, dense, pooled) for t, dense in zip(target, interleaved, strict=True)]
        if needs[1]
        else [],
        [torch.empty_like(s) for s in scale] if needs[2] else [],
    )


def _backward_fake(
    pred: list[Tensor], target: list[Tensor], scale: list[Tensor], grad: Tensor, needs: list[bool]
) -> list[Tensor]:
    return list(chain(*_empty_gradients(pred, target, scale, needs)))


torch.library.register_fake(_BACKWARD_NAME, _backward_fake)


def _backward(
    pred: list[Tensor],
    target: list[Tensor],
    scale: list[Tensor],
    grad: Tensor,  # [L, N]
    needs: list[bool],  # pred, target, scale
) -> list[Tensor]:
    backend = backends.resolve(pred[0].device, pred[0].dtype, images=pred[0].shape[0])
    scale, grad = [factor.contiguous() for factor in scale], grad.contiguous()
    if backend == "triton":
        return list(_triton_backward(pred, target, scale, grad, needs))
    results = _empty_gradients(pred, target, scale, needs, pooled=backend == "native")
    grad_pred, grad_target, grad_scale = results
    if backend == "reference":
        computed = reference.squared_error_backward(pred, target, scale, grad, needs)
        layout.copy_all(chain(*results), chain(*computed))
    else:
        for i, (raw, goal) in enumerate(zip(pred, target, strict=True)):
            p = layout.dense_view(raw)
            t = layout.with_layout(layout.dense_view(goal), p.interleaved)
            native.module().squared_error_backward(
                shape=layout.map_shape(p),
                pred=layout.describe(p),
                target=layout.describe(t),
                grad_pred=layout.describe_result(grad_pred, i),
                grad_target=layout.describe_result(grad_target, i),
                scale=native.address(scale[i] if scale else None),
                grad_scale=native.address(grad_scale[i] if grad_scale else None),
                grad=native.address(grad[i]),
                float64=raw.dtype == torch.float64,
            )
    return list(chain(*results))


@recalled
def _triton_backward(
    pred: list[Tensor], target: list[Tensor], scale: list[Tensor], grad: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    from maskd_kernels.triton import squared_error as kernels

    results = made(_empty_gradients(pred, target, scale, needs))
    kernels.backward(pred, target, scale, grad, *results)
    return tuple(chain(*results))


_operator = Operator("squared_error", _forward, _backward, reference.squared_error, small=_SMALL)
