"""The MasKD loss with frozen tokens: nothing but the student is trained.

``functional.maskd_loss`` is defined by ``receptive_stats`` and a few lines on its statistics; this computes the same,
and what follows the statistics is not twenty small operations per level but part of the kernels.

On a CPU, loss and student gradient are one call: the gradient does not depend on the error, so both take one pass over
the student (two where masks are customised by it). It is prepared before the upstream gradient is known, with the one
that came last: it is the loss's weight, which seldom changes. Where it did change, the prepared gradient is dropped and
computed anew, to the same bits. On a GPU, where the host must not wait for the upstream gradient, the gradient is
computed in the backward.

On small maps checking a call and telling the kernels of it takes longer than they do. Both follow from shapes, strides,
dtypes and the like: a call that had them before is recalled by them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskd_kernels import backends, native
from maskd_kernels.alike import Recollection, described
from maskd_kernels.ops import layout
from maskd_kernels.ops import receptive_stats as stats_op
from maskd_kernels.ops.registration import as_saved, is_eager, is_followed, is_plain
from maskd_kernels.reference import ReceptiveStats, compute_dtype
from maskd_kernels.triton.launch import empty, recalled


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


class Inputs(NamedTuple):
    """The tensors of a call, ``L`` levels of each."""

    teacher: Sequence[Tensor]  # [N, C, *spatial]
    tokens: Sequence[Tensor]  # [K, C]
    student: Sequence[Tensor]  # like the teacher's; their floating dtype may differ
    weighting: Sequence[Sequence[Tensor]]  # parameters in the order of MaskWeighting; or no levels

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.teacher, *self.tokens, *self.student, *chain.from_iterable(self.weighting)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What shapes, strides, dtypes and devices say of a call: all but where its tensors lie."""

    backend: str
    dtype: torch.dtype  # of the computation
    masks: tuple[int, int, int]  # [N, K, P]
    share: tuple[int, int, int]  # [L, N, K]
    gradients: list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]  # shape, dtype and strides of each
    levels: list[Any]  # as the native kernel takes them, without addresses; none for another backend
    key: Any  # by which the Triton launchers recall calls; None where the plan is for one call


_plans: Recollection[Plan] = Recollection()


def signature(channel_dim: int, given: Inputs, tensors: list[Tensor]) -> Any:
    """All that decides whether a call is valid and how it is computed; None where something traces or watches it.

    Looking a call up by it takes a fraction of the time of validating it. It holds the backend that is asked for now:
    another thread may ask for another one meanwhile.
    """
    if not is_eager():
        return None
    try:
        kinds = described(tensors)
    except (AttributeError, RuntimeError, TypeError):  # nested, or no tensor in a weighting
        return None
    return backends.current_backend(), channel_dim, *map(len, given), torch.is_grad_enabled(), *kinds


def recall(call: Any) -> Plan | None:
    """The plan of an earlier call with this signature."""
    return None if call is None else _plans.get(call)


def applies(call: Any, inputs: Inputs) -> bool:
    """Whether the kernels can compute this: nothing but the student is trained."""
    teacher, tokens, _student, weighting = inputs
    if not is_plain(inputs.tensors()) or teacher[0].is_meta:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in chain(teacher, tokens, *weighting)):
        return False
    images = teacher[0].shape[0]
    return backends.resolve(teacher[0].device, teacher[0].dtype, call[0], images) != "reference"


def prepare(call: Any, given: Inputs, computable: Inputs) -> tuple[Plan, Inputs]:
    """The plan, and the inputs as it takes them; recalled by the signature where these are the given ones.

    Args:
        call: the signature of what was given.
        given: valid inputs.
        computable: the same, features and tokens in dtypes that the kernels take.
    """
    teacher, tokens, student, weighting = computable
    dtype = compute_dtype(teacher[0].dtype)
    backend = backends.resolve(teacher[0].device, dtype, call[0], teacher[0].shape[0])
    weighting = [[layout.as_dense(w, dtype) for w in level] for level in weighting]
    levels = []
    if backend == "native":
        tokens = [layout.as_dense(e, dtype) for e in tokens]
        views = [layout.dense_view(s) for s in student]
        student = [s.tensor for s in views]
        teacher = [
            layout.with_layout(layout.dense_view(t), s.interleaved).tensor for t, s in zip(teacher, views, strict=True)
        ]
    written = stats_op.empty_gradients(teacher, tokens, student, (False, False, True))
    gradients = [(g.shape, g.dtype, g.stride()) for g in written[2]]
    if backend == "native":
        levels = stats_op.native_levels(teacher, tokens, student, written)[0]
    n, k, pixels = teacher[0].shape[0], tokens[0].shape[0], sum(math.prod(t.shape[2:]) for t in teacher)
    taken = Inputs(teacher, tokens, student, weighting)
    kept = all(a is b for a, b in zip(given.tensors(), taken.tensors(), strict=True))
    masks, share = (n, k, pixels), (len(teacher), n, k)
    plan = Plan(backend, dtype, masks, share, gradients, levels, object() if kept else None)
    if kept:
        _plans.put(call, plan)
    return plan, taken


def maskd_loss(plan: Plan, inputs: Inputs, tensors: Sequence[Tensor], customize: bool | Tensor, eps: float) -> Tensor:
    """The loss, a scalar in the compute dtype, differentiable in the student.

    Args:
        plan: for these inputs.
        inputs: as the plan takes them.
        tensors: of these inputs.
        customize: whether masks are multiplied by the student's own; also a 0-dim bool on the features' device.
        eps: added to each mask's mass.
    """
    apply: Any = _FrozenLoss.apply
    loss: Tensor = apply((plan, inputs, tensors, customize, eps, torch.is_grad_enabled()), *inputs.student)
    return loss


def _native(
    plan: Plan, inputs: Inputs, customize: bool | Tensor, eps: float, gradients: list[Tensor], upstream: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, masks ``[N, K, P]`` and each mask's share of the loss ``[L, N, K]``; fills the gradients, where given."""
    teacher, tokens, student, weighting = inputs
    masks, share = native.empty(plan.masks, plan.dtype), native.empty(plan.share, plan.dtype)
    loss = native.empty((), plan.dtype)
    results = [g.data_ptr() for g in gradients] or [0] * len(student)
    native.module().maskd_loss(
        levels=plan.levels,
        addresses=[
            (t.data_ptr(), s.data_ptr(), e.data_ptr(), g)
            for t, s, e, g in zip(teacher, student, tokens, results, strict=True)
        ],
        weighting=[tuple([w.data_ptr() for w in level]) for level in weighting],
        batch=plan.masks[0],
        num_tokens=plan.masks[1],
        float64=plan.dtype == torch.float64,
        customize=bool(customize),  # a CPU tensor: nothing to wait for
        threads=torch.get_num_threads(),
        eps=eps,
        upstream=upstream,
        masks=native.address(masks),
        share=native.address(share),
        loss=native.address(loss),
    )
    return loss, masks, share


def _triton(
    plan: Plan, inputs: Inputs, tensors: Sequence[Tensor], customize: bool | Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, masks and shares, as of the native kernel."""
    flag = stats_op.as_flag(customize, inputs.teacher[0].device)
    flags = [] if flag is None else [flag]
    known = plan.key and (plan.key, len(flags), eps)
    losses, masks, share = _triton_forward(inputs, flag, eps, tensors=[*tensors, *flags], known=known)
    return losses.sum(), masks, share


@recalled
def _triton_forward(inputs: Inputs, customize: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each level and image ``[L, N]``, masks and shares."""
    from maskd_kernels.triton import maskd_loss as kernels

    teacher, tokens, student, weighting = inputs
    stats = ReceptiveStats(*stats_op.triton_forward(teacher, tokens, student, customize, len(weighting) > 0))
    share, losses = kernels.shares(stats, teacher, weighting, eps)
    return losses, stats.masks, share


@recalled
def _triton_backward(
    teacher: Sequence[Tensor], tokens: Sequence[Tensor], student: Sequence[Tensor], masks: Tensor, grad_error: Tensor
) -> tuple[Tensor, ...]:
    """The student's gradients, of the masks and of the gradient of each mask's error."""
    saved, grad = [masks] + [empty(masks, 0)] * 6, [None] * 4 + [grad_error] + [None] * 2
    gradients: tuple[Tensor, ...] = stats_op.triton_backward(
        teacher, tokens, student, saved, grad, (False, False, True)
    )
    return gradients


class _FrozenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Plan, Inputs, Sequence[Tensor], bool | Tensor, float, bool],
        *_: Tensor,  # the student
    ) -> Tensor:
        plan, inputs, tensors, customize, eps, differentiable = call
        ctx.upstream, ctx.gradients = None, []
        if plan.backend == "native":
            ctx.upstream = _upstream_of(inputs.tokens[0].data_ptr())
            ctx.expected = ctx.upstream.last
            if differentiable and ctx.upstream.steady and any(ctx.needs_input_grad):
                ctx.gradients = [native.empty(*g) for g in plan.gradients]
            loss, masks, share = _native(plan, inputs, customize, eps, ctx.gradients, ctx.expected)
        else:
            loss, masks, share = _triton(plan, inputs, tensors, customize, eps)
        ctx.count, ctx.plan = len(inputs.teacher), plan
        ctx.save_for_backward(*as_saved(tensors[: 3 * ctx.count]), masks, share)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Handed out once: whoever receives the gradient may change it.
        gradients, ctx.gradients = ctx.gradients, []
        through = is_followed([grad])
        if ctx.upstream is not None and not through:
            value = grad.item()  # a CPU tensor: nothing to wait for
            ctx.upstream.record(value)
            gradients = gradients if value == ctx.expected else []
        if not gradients or through:
            *tensors, masks, share = ctx.saved_tensors
            teacher, tokens, student = (tensors[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
            if ctx.plan.backend == "triton" and not through and is_plain([grad]):
                # Not known by the plan: hooks on saved tensors may give them back in other strides.
                grad_error = (share * grad).contiguous()
                return None, *_triton_backward(teacher, tokens, student, masks.contiguous(), grad_error)
            none = masks.new_empty(0)
            saved = [masks, none, none, none, none, none, none]
            upstream = [none, none, none, none, share * grad, none, none]
            # Masks and shares do not depend on the student, or are taken not to: constants of any derivative.
            run = stats_op.reference_backward if through else torch.ops.maskd_kernels.receptive_stats_backward
            with backends.running(ctx.plan.backend):
                gradients = run(teacher, tokens, student, saved, upstream, [False, False, True])
        return None, *gradients
