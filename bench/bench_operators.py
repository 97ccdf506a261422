"""The operators beside ``receptive_stats``, forward and backward, each against the same composed of PyTorch.

- ``eager``: PyTorch, eager; ``compiled``: under ``torch.compile``
- ``reference`` / ``native`` / ``triton``: our backends; ``auto``: what users get, PyTorch's own for small maps
- ``eager_channels_last``: of ``masked_conv``, the library's convolution in the layout it likes best

``attention_stats`` is forward only: the teacher is frozen wherever it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import maskd_kernels
from bench.cases import Case
from bench.subjects import Outputs, Subject, by_backend, features
from maskd_kernels import use_backend
from maskd_kernels.ops.masked_conv import masked_conv


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


MASKED = 0.65  # of the pixels, as MGD masks them in one-stage detectors


def build_masked_conv(case: Case, device: str) -> Subject:
    """The convolution of a masked image: the library's in either layout, ours from the kept pixels alone."""
    ((x,), (upstream,)) = features(case, device, 2)
    c = case.channels
    weight, bias = torch.randn(c, c, 3, 3, device=device) * (9 * c) ** -0.5, torch.randn(c, device=device)
    keep = torch.rand(x.shape[0], *x.shape[2:], device=device) <= 1 - MASKED
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def library(a: Tensor, w: Tensor, b: Tensor) -> Outputs:
        return [F.conv2d(a * keep[:, None].to(a.dtype), w, b, padding=1)]

    def channels_last(a: Tensor, w: Tensor, b: Tensor) -> Outputs:
        return library(a.contiguous(memory_format=torch.channels_last), w, b)

    providers: dict[str, Callable[[], Outputs]] = {
        "eager": lambda: library(*leaves),
        "eager_channels_last": lambda: channels_last(*leaves),
        **by_backend(lambda: [masked_conv(x, keep, weight, bias)], device),
    }
    # Compulsory: read x, write y; read dy, write dx.
    return Subject(leaves, [upstream], providers, lambda doubles: library(*doubles), 4)


def build(case: Case, device: str) -> Subject:
    """The providers, and the exact answer."""
    if case.subject == "masked_conv":
        return build_masked_conv(case, device)
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
        {"scale_pixels": upstream, "squared_error": [torch.ones(len(first), case.batch, device=device)]}.get(name),
        providers,
        exact,
        units,
        differentiable=bool(leaves),
    )
