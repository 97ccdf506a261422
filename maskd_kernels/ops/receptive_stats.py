"""Operator ``receptive_stats``: everything the MasKD losses need of the features, in one pass.

One call takes all levels of a feature pyramid. The statistics and their gradients are defined, and
computed slowly, by ``maskd_kernels.reference``; here are the operator's schema, its shapes for tracing,
its autograd rule, and the calls into the native and Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from maskd_kernels import backends, native, reference
from maskd_kernels.ops import layout
from maskd_kernels.ops.registration import Backward, Operator, full_precision
from maskd_kernels.reference import TAPS, ReceptiveStats, compute_dtype, is_customized
from maskd_kernels.triton.launch import made, recalled

_NAME = "maskd_kernels::receptive_stats"
_BACKWARD_NAME = "maskd_kernels::receptive_stats_backward"

torch.library.define(
    _NAME,
    "(Tensor[] teacher, Tensor[] tokens, Tensor[] student, Tensor? customize, bool sums)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD_NAME,
    "(Tensor[] teacher, Tensor[] tokens, Tensor[] student, Tensor[] saved, Tensor[] grad, bool[] needs) -> Tensor[]",
)


def receptive_stats(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor] = (),
    customize: Tensor | None = None,
    sums: bool = False,
) -> ReceptiveStats:
    """The statistics of all levels. The caller has validated shapes, dtypes and devices (``functional``).

    Args:
        teacher: ``L`` levels of ``[N, C, *spatial]``; float32, float16, bfloat16, or all inputs float64.
        tokens: ``L`` tensors ``[K, C]`` in the compute dtype (float32, or float64 for float64 features); or
            none: only ``distance`` and ``sums`` carry information then.
        student: like ``teacher``, or none; its floating dtype may differ.
        customize: 0-dim bool on the features' device: whether masks are multiplied by the student's own. None: never.
        sums: whether the sums over the teacher are wanted.

    Returns:
        ``ReceptiveStats``; differentiable in every field but ``teacher_masks``.

    Raises:
        ValueError: ``customize`` without a student.
    """
    return ReceptiveStats(*_operator(teacher, tokens, student, customize, sums))


def as_flag(customize: bool | Tensor, device: torch.device) -> Tensor | None:
    """The operator's ``customize``."""
    if isinstance(customize, Tensor):
        return customize
    return torch.ones((), dtype=torch.bool, device=device) if customize else None


def _empty_stats(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    customize: Tensor | None,
    sums: bool,
    pooled: bool = False,
) -> ReceptiveStats:
    """Memory for the results; also the shapes that tracing sees."""
    dtype = compute_dtype(teacher[0].dtype)
    levels, n, k = len(teacher), teacher[0].shape[0], tokens[0].shape[0] if tokens else 0
    pixels, channels = sum(math.prod(t.shape[2:]) for t in teacher), sum(t.shape[1] for t in teacher)

    def empty(*shape: int, wanted: bool = True) -> Tensor:
        size = shape if wanted else (0,)
        return native.empty(size, dtype) if pooled else teacher[0].new_empty(size, dtype=dtype)

    return ReceptiveStats(
        masks=empty(n, k, pixels),
        teacher_masks=empty(n, k, pixels, wanted=is_customized(customize, student)),
        distance=empty(n, pixels, wanted=len(student) > 0),
        mass=empty(levels, n, k),
        error=empty(levels, n, k, wanted=len(student) > 0),
        gram=empty(levels, n, k, k),
        sums=empty(n, TAPS, channels, wanted=sums),
    )


def _fake(
    teacher: list[Tensor], tokens: list[Tensor], student: list[Tensor], customize: Tensor | None, sums: bool
) -> tuple[Tensor, ...]:
    return tuple(_empty_stats(teacher, tokens, student, customize, sums))


torch.library.register_fake(_NAME, _fake)


def forward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    customize: Tensor | None,
    sums: bool,
) -> ReceptiveStats:
    """What ``receptive_stats`` returns, not differentiable."""
    backend = backends.resolve(teacher[0].device, teacher[0].dtype, images=teacher[0].shape[0])
    if backend == "reference":
        with full_precision(teacher[0]):
            return reference.receptive_stats(teacher, tokens, student, customize, sums)
    if backend == "triton":
        return ReceptiveStats(*triton_forward(teacher, tokens, student, customize, sums))
    out = _empty_stats(teacher, tokens, student, customize, sums, pooled=True)
    _native_forward(teacher, tokens, student, customize, out)
    return out


def _forward(
    teacher: list[Tensor], tokens: list[Tensor], student: list[Tensor], customize: Tensor | None, sums: bool
) -> tuple[Tensor, ...]:
    return tuple(forward(teacher, tokens, student, customize, sums))


def empty_gradients(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    needs: Sequence[bool],
    pooled: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Memory for the gradients that are needed of teacher, tokens and student, laid out as the kernels write them."""
    interleaved = [layout.dense_view(x).interleaved for x in (student or teacher)]

    def like(features: Sequence[Tensor]) -> list[Tensor]:
        return [layout.empty_gradient(x, dense, pooled) for x, dense in zip(features, interleaved, strict=True)]

    return (
        like(teacher) if needs[0] else [],
        [torch.empty_like(e, memory_format=torch.contiguous_format) for e in tokens] if needs[1] else [],
        like(student) if needs[2] else [],
    )


def _backward_fake(
    teacher: list[Tensor],
    tokens: list[Tensor],
    student: list[Tensor],
    saved: list[Tensor],
    grad: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    grad_teacher, grad_tokens, grad_student = empty_gradients(teacher, tokens, student, needs)
    return grad_teacher + grad_tokens + grad_student


torch.library.register_fake(_BACKWARD_NAME, _backward_fake)


def reference_backward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """What ``receptive_stats_backward`` returns, by operations that PyTorch can differentiate."""
    upstream = [g if g.numel() else None for g in grad]
    with full_precision(teacher[0]):
        stats = ReceptiveStats(*saved)
        return list(chain(*reference.receptive_stats_backward(teacher, tokens, student, stats, upstream, needs)))


def _backward(
    teacher: list[Tensor],
    tokens: list[Tensor],
    student: list[Tensor],
    saved: list[Tensor],  # the fields of ReceptiveStats
    grad: list[Tensor],  # likewise, upstream; empty where there is none
    needs: list[bool],  # teacher, tokens, student
) -> list[Tensor]:
    backend = backends.resolve(teacher[0].device, teacher[0].dtype, images=teacher[0].shape[0])
    # Hooks on saved tensors may give them back in other strides.
    saved, upstream = [x.contiguous() for x in saved], [g.contiguous() if g.numel() else None for g in grad]
    if backend == "triton":
        return list(triton_backward(teacher, tokens, student, saved, upstream, needs))
    results = empty_gradients(teacher, tokens, student, needs, pooled=backend == "native")
    if backend == "reference":
        layout.copy_all(chain(*results), reference_backward(teacher, tokens, student, saved, grad, needs))
    else:
        _native_backward(teacher, tokens, student, ReceptiveStats(*saved), upstream, results)
    return list(chain(*results))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> list[Tensor]:
    teacher, tokens = inputs[:2]
    stats = ReceptiveStats(*output)
    ctx.set_materialize_grads(False)
    constant = [stats.teacher_masks]
    if not any(x.requires_grad for x in teacher):
        constant.append(stats.sums)
        if not any(x.requires_grad for x in tokens):
            constant += [stats.masks, stats.mass, stats.gram]
    ctx.mark_non_differentiable(*constant)
    # The backward needs the masks, their teacher factor and the distance; the reduced statistics are not kept.
    return [stats.masks, stats.teacher_masks, stats.distance]


def _autograd(call: Backward, *grad: Tensor | None) -> list[Tensor]:
    teacher, tokens, student = call.arguments[:3]
    none = call.kept[0].new_empty(0)
    saved, upstream = [*call.kept, none, none, none, none], [none if g is None else g for g in grad]
    gradients: list[Tensor] = call.run(teacher, tokens, student, saved, upstream, call.needs[:3])
    return gradients


_operator = Operator("receptive_stats", _forward, _backward, reference.receptive_stats, _autograd, _keep)


# ---- The Triton kernels ------------------------------------------------------------------------


@recalled
def triton_forward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    customize: Tensor | None,
    sums: bool,
) -> tuple[Tensor, ...]:
    """What ``forward`` returns."""
    from maskd_kernels.triton import receptive_stats as kernels

    out = made(_empty_stats(teacher, tokens, student, customize, sums))
    kernels.forward(teacher, tokens, student, customize, out)
    return out


@recalled
def triton_backward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    saved: Sequence[Tensor],  # the fields of ReceptiveStats
    grad: Sequence[Tensor | None],  # likewise, upstream
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients that are needed of teacher, tokens and student."""
    from maskd_kernels.triton import receptive_stats as kernels

    results = made(empty_gradients(teacher, tokens, student, needs))
    kernels.backward(teacher, tokens, student, ReceptiveStats(*saved), grad, results)
    return tuple(chain(*results))


# ---- The native kernels ------------------------------------------------------------------------


def native_levels(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], []),
) -> tuple[list[Any], list[Tensor]]:
    """The kernels' view of the levels, and the tensors that must outlive the call."""
    grad_teacher, grad_tokens, grad_student = grads
    levels, alive = [], []
    pixel_offset = channel_offset = 0
    for i, raw in enumerate(teacher):
        t, s = layout.dense_view(raw), layout.dense_view(student[i]) if student else None
        # Where the two maps differ in layout, the kernels read the teacher in the student's.
        t = layout.with_layout(t, (s or t).interleaved)
        token = layout.as_dense(tokens[i], tokens[i].dtype) if tokens else None
        alive += [x for x in (t.tensor, s and s.tensor, token) if x is not None]
        _, channels, pixels = t.shape
        levels.append(
            native.module().ReceptiveLevel(
                teacher=layout.describe(t),
                student=layout.ABSENT if s is None else layout.describe(s),
                grad_teacher=layout.describe_result(grad_teacher, i),
                grad_student=layout.describe_result(grad_student, i),
                tokens=native.address(token),
                grad_tokens=native.address(grad_tokens[i] if grad_tokens else None),
                channels=channels,
                pixels=pixels,
                interleaved=t.interleaved,
                width=raw.shape[3] if raw.dim() == 4 else 0,
                pixel_offset=pixel_offset,
                channel_offset=channel_offset,
            )
        )
        pixel_offset += pixels
        channel_offset += channels
    return levels, alive


def _native_forward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    customize: Tensor | None,
    out: ReceptiveStats,
) -> None:
    levels, _alive = native_levels(teacher, tokens, student)
    native.module().receptive_forward(
        levels=levels,
        batch=teacher[0].shape[0],
        num_tokens=tokens[0].shape[0] if tokens else 0,
        float64=teacher[0].dtype == torch.float64,
        customize=customize is not None and bool(customize),  # a CPU tensor: nothing to wait for
        threads=torch.get_num_threads(),
        out=[native.address(x) for x in out],
    )


def _native_backward(
    teacher: Sequence[Tensor],
    tokens: Sequence[Tensor],
    student: Sequence[Tensor],
    saved: ReceptiveStats,
    grad: Sequence[Tensor | None],
    results: tuple[list[Tensor], list[Tensor], list[Tensor]],
) -> None:
    levels, _alive = native_levels(teacher, tokens, student, results)
    native.module().receptive_backward(
        levels=levels,
        batch=teacher[0].shape[0],
        num_tokens=tokens[0].shape[0] if tokens else 0,
        float64=teacher[0].dtype == torch.float64,
        customize=saved.teacher_masks.numel() > 0,
        threads=torch.get_num_threads(),
        saved=[native.address(x) for x in saved],
        grad=[native.address(x) for x in grad],
    )
