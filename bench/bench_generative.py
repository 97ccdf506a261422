"""The losses MGD and AMD, forward and backward, their blocks' parameters trained: composed of PyTorch, and ours.

- ``published``: aligned, masked, generated and compared as published, eager; ``published_compiled``: under
  ``torch.compile``
- ``reference`` / ``native`` / ``triton``: the backends under ``MGDLoss`` and ``AMDLoss``
- ``convolutions``: the block alone, forward and backward: what no kernel of ours touches
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.subjects import Outputs, Subject, by_backend, features
from maskd_kernels import MGD_PRESETS, AMDLoss, MGDLoss, use_backend


def build(case: Case, device: str) -> Subject:
    """The providers, and the exact answer."""
    students, teachers = features(case, device, 2)
    for s in students:
        s.requires_grad_()
    channels = [case.channels] * len(case.levels)
    preset = MGD_PRESETS["classification" if case.mask_on_channel else "detection_one_stage"]
    mgd = case.subject == "mgd"
    loss_fn = (MGDLoss(channels, channels, **preset) if mgd else AMDLoss(channels, channels)).to(device, case.dtype)
    if case.channels_last:
        loss_fn = loss_fn.to(memory_format=torch.channels_last)
    parameters = list(loss_fn.parameters())
    drawn = loss_fn._draw(teachers, None) if isinstance(loss_fn, MGDLoss) else []
    keep = [mask.to(case.dtype) for mask in drawn]  # as the authors have it; ours takes it as drawn

    def published_mgd(s: list[Tensor]) -> Tensor:
        losses = [
            (block(a * mask).float() - t.float()).square().sum()
            for a, t, block, mask in zip(s, teachers, loss_fn.generation, keep, strict=True)  # type: ignore[arg-type]
        ]
        return torch.stack(losses).sum() * (preset["alpha_mgd"] / case.batch)

    def published_amd(s: list[Tensor]) -> Tensor:
        assert isinstance(loss_fn, AMDLoss)
        assert loss_fn.channel_modules is not None
        losses = []
        for a, t, block, module in zip(s, teachers, loss_fn.generation, loss_fn.channel_modules, strict=True):  # type: ignore[arg-type]
            strength = t.float().abs().mean(1).flatten(1) / loss_fn.temperature
            attention = strength.softmax(1).reshape(t.shape[0], 1, *t.shape[2:]) * math.prod(t.shape[2:])
            scale = module(t.float().mean((2, 3)).to(case.dtype))[:, :, None, None].float()
            generated = block(a * (attention < loss_fn.threshold).to(case.dtype)).float()
            losses.append((scale * generated - t.float()).square().sum())
        return torch.stack(losses).sum() * (loss_fn.alpha_amd / case.batch)

    published = published_mgd if mgd else published_amd
    compiled = torch.compile(published, dynamic=False)

    def ours() -> Outputs:
        return [loss_fn(students, teachers, keep=drawn) if mgd else loss_fn(students, teachers)]

    providers: dict[str, Callable[[], Outputs]] = {
        "published": lambda: [published(students)],
        "published_compiled": lambda: [compiled(students)],
        **by_backend(ours, device),
        "convolutions": lambda: [x.sum() for x in loss_fn._generated(list(students))],
    }

    def exact(leaves: list[Tensor]) -> Outputs:
        doubled = copy.deepcopy(loss_fn).double()
        with use_backend("reference"):
            masks = {"keep": [mask.double() for mask in keep]} if mgd else {}
            return [doubled(leaves, [t.double() for t in teachers], **masks)]

    also = {name: parameters for name in providers} | {"convolutions": list(loss_fn.generation.parameters())}
    return Subject(students, None, providers, exact, 9 if mgd else 11, also=also)
