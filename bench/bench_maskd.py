"""The MasKD loss over all levels, forward and backward: the published formula, what PyTorch can make of it, ours.

Tokens are frozen except in the first provider:

- ``published_as_shipped``: the formula as published, eager, with its ``[N, K, C, H, W]`` tensors and its 3x3
  convolution; tokens and weighting receive gradients, as in the authors' module, which does not freeze them
- ``published``: the same with tokens and weighting frozen; ``published_compiled``: under ``torch.compile``
- ``simplified``: masks without a channel axis, the weighting from nine sums per channel, eager;
  ``simplified_compiled``: under ``torch.compile``; ``simplified_cudagraphs``: and replayed as CUDA graphs
- ``reference`` / ``native`` / ``triton``: the backends under ``maskd_loss``; ``auto``: what users get, and
  ``auto_weight_changes``: where the loss's weight is another one in every step, so that no gradient can be prepared
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.subjects import Outputs, Subject, by_backend, features
from maskd_kernels import MaskModule, MaskWeighting, maskd_loss, reference, use_backend


def simplified(
    student: Tensor, teacher: Tensor, tokens: Tensor, weighting: MaskWeighting | None, customize: bool = False
) -> Tensor:
    """The loss without a channel axis in the masks and without a convolution: what a careful user writes in PyTorch."""
    s, t = student.flatten(2).float(), teacher.flatten(2).float()
    masks = (tokens @ t).sigmoid()  # [N, K, P]
    if customize:
        masks = masks * (tokens @ s.detach()).sigmoid()
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


def build(case: Case, device: str) -> Subject:
    """The providers, and the exact answer."""
    students, teachers = features(case, device, 2)
    for s in students:
        s.requires_grad_()
    modules = []
    for _ in case.levels:
        module = MaskModule(case.channels, case.tokens, case.weighted).to(device).requires_grad_(False)
        torch.nn.init.normal_(module.mask_token, std=0.1)
        modules.append(module)
    tokens, weighting = [m.mask_token for m in modules], [m.weighting for m in modules]
    images = len(case.levels[0]) == 2

    def published(like: list[MaskModule]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        def loss(s: list[Tensor], t: list[Tensor]) -> Tensor:
            return torch.stack(
                [
                    reference.published_maskd_loss(
                        a if images else a[..., None],
                        b if images else b[..., None],
                        m.mask_token,
                        m.weighting,
                        case.customize,
                    )
                    for a, b, m in zip(s, t, like, strict=True)
                ]
            ).sum()

        return loss

    def simple(s: list[Tensor], t: list[Tensor]) -> Tensor:
        levels = zip(s, t, tokens, weighting, strict=True)
        losses = [simplified(a, b, e, w, case.customize) for a, b, e, w in levels]
        return torch.stack(losses).sum()

    def ours(s: list[Tensor], t: list[Tensor], e: list[Tensor], w: list[MaskWeighting | None]) -> Outputs:
        weights = [x for x in w if x is not None] or None
        loss = maskd_loss(s, t, e, weighting=weights, customize=case.customize)
        assert isinstance(loss, Tensor)
        return [loss]

    frozen = [copy.deepcopy(m).to(case.dtype) for m in modules]
    shipped = [copy.deepcopy(m).to(case.dtype).requires_grad_(True) for m in modules]
    simple_compiled = torch.compile(simple, dynamic=False)
    published_compiled = torch.compile(published(frozen), dynamic=False)
    graphs: dict[str, Callable[[], Outputs]] = {}
    if device == "cuda":
        replayed = torch.compile(simple, dynamic=False, mode="reduce-overhead")
        graphs["simplified_cudagraphs"] = lambda: [replayed(students, teachers)]
    # What weight is expected is remembered by the tokens.
    changing, own_tokens = itertools.cycle([1.0, 1.0 + 2.0**-20]), [e.clone() for e in tokens]

    def weighted() -> Outputs:
        return [next(changing) * ours(students, teachers, own_tokens, weighting)[0]]

    providers: dict[str, Callable[[], Outputs]] = {
        "published_as_shipped": lambda: [published(shipped)(students, teachers)],
        "published": lambda: [published(frozen)(students, teachers)],
        "published_compiled": lambda: [published_compiled(students, teachers)],
        "simplified": lambda: [simple(students, teachers)],
        "simplified_compiled": lambda: [simple_compiled(students, teachers)],
        **by_backend(lambda: ours(students, teachers, tokens, weighting), device),
        "auto_weight_changes": weighted,
        **graphs,
    }

    def exact(leaves: list[Tensor]) -> Outputs:
        doubles = [None if w is None else MaskWeighting(*(x.double() for x in w)) for w in weighting]
        with use_backend("reference"):
            return ours(leaves, [t.double() for t in teachers], [e.double() for e in tokens], doubles)

    # The kernels read the teacher, then student and teacher, and write the student's gradient: 4. Masks that depend on
    # the student, and separate launches on a GPU, read both maps in both passes: 5. No algorithm can do without 3.
    units = 5 if case.customize or device == "cuda" else 4
    also = {"published_as_shipped": [p for m in shipped for p in m.parameters()]}
    return Subject(students, None, providers, exact, units, also=also)
