"""The operators beside ``receptive_stats``, forward and backward, each against the same composed of PyTorch.

- ``eager``: PyTorch, eager; ``compiled``: under ``torch.compile``
- ``reference`` / ``native`` / ``triton``: our backends

``attention_stats`` is forward only: the teacher is frozen wherever it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import maskd_kernels
from bench.cases import Case
from bench.subjects import Outputs, Subject, by_backend, features
from maskd_kernels import use_backend


def _expand(scale: Tensor, like: Tensor) -> Tensor:  # [N, *spatial] over the channels
    return scale[:, None].to(like.dtype)


def eager_scale_pixels(x: list[Tensor], scale: list[Tensor]) -> Outputs:
    """What the operator does, in PyTorch."""
    return [a * _expand(s, a) for a, s in zip(x, scale, strict=True)]


def eager_squared_error(pred: list[Tensor], target: list[Tensor]) -> Outputs:
    """What the operator does, in PyTorch; float32 sums whatever the features are."""
    losses = [(p.float() - t.float()).square().flatten(1).sum(1) for p, t in zip(pred, target, strict=True)]
    return [torch.stack(losses)]


def eager_attention_stats(x: list[Tensor]) -> Outputs:
    """What the operator does, in PyTorch; float32 sums whatever the features are."""
    attention = [a.float().abs().mean(1) for a in x]
    return [*attention, *(a.float().flatten(2).mean(2) for a in x)]


def build(case: Case, device: str) -> Subject:
    """The providers, and the exact answer."""
    first, second, upstream = features(case, device, 3)
    name = case.subject
    scale = [torch.rand(x.shape[0], *x.shape[2:], device=device) for x in first]
    inputs: tuple[list[Tensor], ...]
    if name == "scale_pixels":
        # As in MGD and AMD: the mask has no gradient. Read x, write y; read dy, write dx.
        inputs, eager, units = (first, scale), eager_scale_pixels, 4.0
    elif name == "squared_error":
        inputs, eager, units = (first, second), eager_squared_error, 5.0
    else:
        inputs, eager, units = (first,), eager_attention_stats, 1.0
    leaves = [] if name == "attention_stats" else first
    for x in leaves:
        x.requires_grad_()

    def fused(*arguments: Any) -> Outputs:
        result = getattr(maskd_kernels, name)(*arguments)
        return [result] if isinstance(result, Tensor) else [*result[0], *result[1]] if name[0] == "a" else result

    compiled = torch.compile(eager, dynamic=False)  # type: ignore[arg-type]
    providers: dict[str, Callable[[], Outputs]] = {
        "eager": lambda: eager(*inputs),  # type: ignore[operator]
        "compiled": lambda: compiled(*inputs),
        **by_backend(lambda: fused(*inputs), device),
    }

    def exact(doubles: list[Tensor]) -> Outputs:
        others = [[x.double() for x in group] for group in (inputs[1:] if leaves else inputs)]
        with use_backend("reference"):
            return fused(*([doubles] if leaves else []), *others)

    return Subject(
        list(leaves),
        upstream if name == "scale_pixels" else None,
        providers,
        exact,
        units,
        differentiable=bool(leaves),
    )
