"""The MasKD loss on one level, forward and backward: the published formula, what PyTorch can make of it, ours.

Providers; tokens frozen except in the first:

- ``published_as_shipped``: the formula as published, eager, with its ``[N, K, C, H, W]`` tensors and its 3x3
  convolution; tokens and weighting receive gradients, as in the authors' module, which does not freeze them
- ``published``: the same with tokens and weighting frozen
- ``simplified_compiled``: masks without a channel axis, the weighting from nine sums per channel, in one fused graph
- ``native`` / ``triton`` / ``reference``: the backends of ``receptive_stats`` under ``maskd_loss``
- ``streaming``: reads two feature maps and writes one, nothing else: the floor
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskd_kernels import MaskModule, MaskWeighting, backends, maskd_loss, native, reference, use_backend


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int
    channels: int
    height: int
    width: int
    tokens: int = 6
    weighted: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def map_bytes(self) -> int:
        """One unit of traffic: N * C * P elements."""
        return self.batch * self.channels * self.height * self.width * self.dtype.itemsize


CASES = [
    Case("RetinaNet P3, 800x1344", 2, 256, 100, 168),
    Case("RetinaNet P3, channels-last", 2, 256, 100, 168, channels_last=True),
    Case("RetinaNet P3, bfloat16", 2, 256, 100, 168, dtype=torch.bfloat16),
    Case("Cityscapes logits", 2, 19, 64, 128, tokens=8, weighted=False),
]


def simplified(student: Tensor, teacher: Tensor, tokens: Tensor, weighting: MaskWeighting | None) -> Tensor:
    """The loss without a channel axis in the masks and without a convolution: what a careful user writes in PyTorch."""
    s, t = student.flatten(2).float(), teacher.flatten(2).float()
    masks = (tokens @ t).sigmoid()  # [N, K, P]
    distance = (s - t).square().sum(1)  # [N, P]
    share = (masks.square() * distance[:, None]).sum(-1) / (t.shape[1] * masks.sum(-1))  # [N, K]
    if weighting is None:
        return share.mean()
    image = teacher.float()
    _, c, height, width = image.shape
    total, row, column = image.sum((2, 3)), image.sum(3), image.sum(2)
    rows, columns = (row[..., -1], None, row[..., 0]), (column[..., -1], None, column[..., 0])
    corners = {
        (0, 0): image[..., -1, -1],
        (0, 2): image[..., -1, 0],
        (2, 0): image[..., 0, -1],
        (2, 2): image[..., 0, 0],
    }
    shifted = []
    for i in range(3):
        for j in range(3):
            value = total
            value = value if rows[i] is None else value - rows[i]
            value = value if columns[j] is None else value - columns[j]
            shifted.append(value + corners[i, j] if (i, j) in corners else value)
    mean = (torch.stack(shifted, -1) / (height * width)).flatten(1)  # [N, 9C]
    hidden = mean @ weighting.conv_weight.reshape(c, 9 * c).mT + weighting.conv_bias
    logits = hidden @ weighting.projection_weight.flatten(1).mT + weighting.projection_bias
    return (share * logits.softmax(-1)).sum(-1).mean()


def build(case: Case, device: str) -> tuple[dict[str, Callable[[], Any]], Callable[[], Any]]:
    """The providers, each returning (loss, gradient), and the exact answer in float64."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels, case.height, case.width)
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    student, teacher = (
        torch.randn(shape, device=device).to(case.dtype).contiguous(memory_format=memory_format) for _ in range(2)
    )
    student.requires_grad_()
    module = MaskModule(case.channels, case.tokens, case.weighted).to(device).requires_grad_(False)
    torch.nn.init.normal_(module.mask_token, std=0.1)
    tokens, weighting = module.mask_token, module.weighting
    published_weighting = None if weighting is None else [w.to(case.dtype) for w in weighting]
    compiled = torch.compile(simplified, dynamic=False)

    def differentiated(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    def published() -> tuple[Tensor, Tensor]:
        arguments = (student, teacher, tokens.to(case.dtype), published_weighting)
        return differentiated(reference.published_maskd_loss(*arguments))

    shipped = copy.deepcopy(module).to(case.dtype).requires_grad_(True)

    def published_as_shipped() -> tuple[Tensor, Tensor]:
        loss = reference.published_maskd_loss(student, teacher, shipped.mask_token, shipped.weighting)
        return loss.detach(), torch.autograd.grad(loss, [student, *shipped.parameters()])[0]

    def simplified_compiled() -> tuple[Tensor, Tensor]:
        return differentiated(compiled(student, teacher, tokens, weighting))

    providers: dict[str, Callable[[], Any]] = {
        "published_as_shipped": published_as_shipped,
        "published": published,
        "simplified_compiled": simplified_compiled,
    }

    def ours(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            with use_backend(backend):
                return differentiated(maskd_loss(student, teacher, tokens, weighting=weighting))

        return run

    for backend in ("reference", "native", "triton"):
        if backends.why_unavailable(backend, device, torch.float32) is None:
            providers[backend] = ours(backend)

    a, b = student.detach(), teacher
    out = torch.empty_like(a)
    if device == "cpu" and native.available() and case.dtype == torch.float32:
        stream, threads = native.module().streaming_difference, torch.get_num_threads()
        providers["streaming"] = lambda: stream(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel(), threads)
    else:
        providers["streaming"] = lambda: torch.sub(a, b, out=out)

    def exact() -> tuple[Tensor, Tensor]:
        s, t = student.detach().double().requires_grad_(), teacher.double()
        w = None if weighting is None else MaskWeighting(*(x.double() for x in weighting))
        with use_backend("reference"):
            loss = maskd_loss(s, t, tokens.double(), weighting=w)
        return loss.detach(), torch.autograd.grad(loss, s)[0]

    return providers, exact
