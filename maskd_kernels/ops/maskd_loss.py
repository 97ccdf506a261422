"""The MasKD loss with frozen tokens: nothing but the student is trained.

``functional.maskd_loss`` is defined by ``receptive_stats`` and a few lines on its statistics; this computes the same,
and what follows the statistics is not twenty small operations per level but part of the kernels.

On a CPU, loss and student gradient are one call: the gradient does not depend on the error, so both take one pass over
the student (two where masks are customised by it). It is prepared before the upstream gradient is known, with the one
that came last: it is the loss's weight, which seldom changes. Where it did change, the prepared gradient is dropped and
computed anew, to the same bits. On a GPU, where the host must not wait for the upstream gradient, the gradient is
computed in the backward.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskd_kernels import backends, native
from maskd_kernels.ops import layout
from maskd_kernels.ops import receptive_stats as stats_op
from maskd_kernels.ops.registration import is_plain
from maskd_kernels.reference import compute_dtype


@dataclasses.dataclass
class _Upstream:
    """The gradient that last came from upstream, and whether it is expected again."""

    last: float = 1.0
    steady: bool = True

    def record(self, value: float) -> None:
        self.steady = value == self.last
        self.last = value


@functools.lru_cache(maxsize=256)
def _upstream_of(tokens_address: int) -> _Upstream:
    """What is expected of the loss with these tokens. An address used anew costs a wrong guess, no wrong result."""
    return _Upstream()


def applies(
    teacher: Sequence[Tensor], tokens: Sequence[Tensor], student: Sequence[Tensor], parameters: Sequence[Tensor]
) -> bool:
    """Whether the kernels can compute this: eager mode, and nothing but the student is trained."""
    if not is_plain([*teacher, *student]):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*teacher, *tokens, *parameters)):
        return False
    return backends.resolve(teacher[0].device, compute_dtype(teacher[0].dtype)) != "reference"


def maskd_loss(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    weighting: Sequence[Sequence[Tensor]],
    customize: bool | Tensor,
    eps: float,
) -> Tensor:
    """The loss, a scalar in the compute dtype, differentiable in the student. The caller has validated all inputs.

    Args:
        teacher: ``L`` levels of ``[N, C, *spatial]``.
        tokens: ``L`` tensors ``[K, C]`` in the compute dtype.
        student: like ``teacher``; its floating dtype may differ.
        weighting: the parameters of each level's weighting, in the order of ``MaskWeighting``, or none.
        customize: whether masks are multiplied by the student's own; also a 0-dim bool on the features' device.
        eps: added to each mask's mass.
    """
    loss: Tensor = _FrozenLoss.apply((teacher, tokens, weighting, customize, eps), torch.is_grad_enabled(), *student)
    return loss


def _parameters(weighting: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[list[Tensor]]:
    return [[layout.as_dense(w, dtype) for w in level] for level in weighting]


def _native(
    inputs: tuple[Any, ...], student: Sequence[Tensor], gradients: list[Tensor], upstream: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, masks ``[N, K, P]`` and each mask's share of the loss ``[L, N, K]``; fills the gradients, where given."""
    teacher, tokens, weighting, customize, eps = inputs
    dtype = compute_dtype(teacher[0].dtype)
    n, k, pixels = teacher[0].shape[0], tokens[0].shape[0], sum(math.prod(t.shape[2:]) for t in teacher)
    masks = native.empty((n, k, pixels), dtype)
    share, loss = native.empty((len(teacher), n, k), dtype), native.empty((), dtype)
    parameters = _parameters(weighting, dtype)
    levels, _alive = stats_op.native_levels(teacher, tokens, student, ([], [], gradients))
    native.module().maskd_loss(
        levels=levels,
        weighting=[tuple(w.data_ptr() for w in level) for level in parameters],
        batch=n,
        num_tokens=k,
        float64=dtype == torch.float64,
        customize=bool(customize),  # a CPU tensor: nothing to wait for
        threads=torch.get_num_threads(),
        eps=eps,
        upstream=upstream,
        masks=native.address(masks),
        share=native.address(share),
        loss=loss.data_ptr(),
    )
    return loss, masks, share


def _triton(inputs: tuple[Any, ...], student: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, masks and shares, as of the native kernel."""
    from maskd_kernels.triton import maskd_loss as kernels

    teacher, tokens, weighting, customize, eps = inputs
    stats = stats_op.forward(
        teacher, tokens, student, stats_op.as_flag(customize, teacher[0].device), len(weighting) > 0
    )
    share, loss = kernels.shares(stats, teacher, _parameters(weighting, stats.mass.dtype), eps)
    return loss.sum(), stats.masks, share


class _FrozenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: tuple[Any, ...], differentiable: bool, *student: Tensor) -> Tensor:
        teacher, tokens = inputs[:2]
        ctx.upstream, ctx.gradients = None, []
        if backends.resolve(teacher[0].device, compute_dtype(teacher[0].dtype)) == "native":
            ctx.upstream = _upstream_of(tokens[0].data_ptr())
            ctx.expected = ctx.upstream.last
            if differentiable and any(ctx.needs_input_grad) and ctx.upstream.steady:
                ctx.gradients = stats_op.empty_gradients(teacher, [], student, (False, False, True), pooled=True)[2]
            loss, masks, share = _native(inputs, student, ctx.gradients, ctx.expected)
        else:
            loss, masks, share = _triton(inputs, student)
        ctx.count = len(teacher)
        ctx.save_for_backward(*teacher, *tokens, *student, masks, share)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Handed out once: whoever receives the gradient may change it.
        gradients, ctx.gradients = ctx.gradients, []
        if ctx.upstream is not None:
            value = float(grad)  # a CPU tensor: nothing to wait for
            ctx.upstream.record(value)
            gradients = gradients if value == ctx.expected else []
        # With create_graph the operator runs, which says that it has no second derivative.
        if not gradients or torch.is_grad_enabled():
            *tensors, masks, share = ctx.saved_tensors
            teacher, tokens = tensors[: ctx.count], tensors[ctx.count : 2 * ctx.count]
            none = masks.new_empty(0)
            saved = [masks, none, none, none, none, none, none]
            upstream = [None, None, None, None, share * grad, None, None]
            needs = [False, False, True]
            gradients = torch.ops.maskd_kernels.receptive_stats_backward(
                teacher, tokens, tensors[2 * ctx.count :], saved, upstream, needs
            )
        return (None, None, *gradients)
