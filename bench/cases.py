"""What is measured: the papers' own shapes, in suites."""

from __future__ import annotations

import dataclasses
import math

import torch

RETINANET = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # P3-P7 of 800x1344
FASTER_RCNN = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))  # P2-P6


@dataclasses.dataclass(frozen=True)
class Case:
    """One subject (``maskd``, ``mgd``, ``amd``, or an operator's name) at one shape."""

    subject: str
    name: str
    batch: int
    channels: int
    levels: tuple[tuple[int, ...], ...]
    tokens: int = 6
    weighted: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mask_on_channel: bool = False
    customize: bool = False  # masks multiplied by the student's own

    @property
    def map_bytes(self) -> int:
        """One unit of traffic: N * C * P elements, all levels."""
        pixels = sum(math.prod(level) for level in self.levels)
        return self.batch * self.channels * pixels * self.dtype.itemsize

    @property
    def title(self) -> str:
        """The name with what differs from float32 NCHW."""
        layout = ", channels-last" if self.channels_last else ""
        return f"{self.name}, {str(self.dtype)[6:]}{layout}"


def _large(case: Case) -> Case:
    return dataclasses.replace(case, batch=16, name=case.name.replace("N=2", "N=16"))


def variants(case: Case) -> list[Case]:
    """float32 and bfloat16, NCHW and channels-last."""
    return [
        dataclasses.replace(case, dtype=dtype, channels_last=last)
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
    ]


P3 = Case("maskd", "RetinaNet P3, N=2", 2, 256, RETINANET[:1])
PYRAMID = Case("maskd", "RetinaNet P3-P7, N=2", 2, 256, RETINANET)
LOGITS = Case("maskd", "Cityscapes logits", 2, 19, ((64, 128),), tokens=8, weighted=False)
PSPNET = Case("maskd", "PSPNet features", 2, 2048, ((64, 64),))
VIT = Case("maskd", "ViT tokens", 8, 768, ((1024,),), weighted=False, channels_last=True)
FRCNN = Case("maskd", "Faster R-CNN P2-P6, N=2", 2, 256, FASTER_RCNN)


def _operator(subject: str) -> list[Case]:
    shape = Case(subject, "RetinaNet P3, N=2", 2, 256, RETINANET[:1])
    return [
        shape,
        dataclasses.replace(shape, channels_last=True),
        dataclasses.replace(shape, dtype=torch.bfloat16),
        Case(subject, "Cityscapes logits", 2, 19, ((64, 128),)),
        Case(subject, "ViT tokens", 8, 768, ((1024,),), channels_last=True),
        Case(subject, "ImageNet, N=256", 256, 512, ((7, 7),)),
    ]


SUITES: dict[str, list[Case]] = {
    # What `make bench` runs on a CPU.
    "maskd": [
        *variants(P3),
        dataclasses.replace(P3, customize=True, name="RetinaNet P3, N=2, customised"),
        PYRAMID,
        dataclasses.replace(PYRAMID, dtype=torch.bfloat16),
        LOGITS,
        VIT,
    ],
    "operators": [case for name in ("scale_pixels", "squared_error", "attention_stats") for case in _operator(name)],
    "generative": [
        Case("mgd", "RetinaNet P4, N=2", 2, 256, RETINANET[1:2]),
        Case("mgd", "ImageNet, N=64", 64, 512, ((7, 7),), mask_on_channel=True),
        Case("amd", "RetinaNet P4, N=2", 2, 256, RETINANET[1:2]),
        *(Case("masked_conv", f"RetinaNet P{i + 3}, 65 % masked", 2, 256, (RETINANET[i],)) for i in range(3)),
    ],
    # Larger, for machines with more memory or time.
    "maskd-more": [*variants(FRCNN), *variants(PSPNET), *variants(LOGITS)[1:]],
    "maskd-gpu": [
        *(dataclasses.replace(PYRAMID, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
        dataclasses.replace(PYRAMID, dtype=torch.bfloat16, channels_last=True),
        dataclasses.replace(_large(PYRAMID), dtype=torch.bfloat16),
        dataclasses.replace(_large(FRCNN), levels=FASTER_RCNN[:1], name="Faster R-CNN P2, N=16", dtype=torch.bfloat16),
        LOGITS,
        dataclasses.replace(PSPNET, dtype=torch.bfloat16),
        dataclasses.replace(VIT, dtype=torch.bfloat16),
    ],
    "operators-gpu": [
        Case(name, "RetinaNet P3-P7, N=16", 16, 256, RETINANET, dtype=torch.bfloat16, channels_last=last)
        for name in ("scale_pixels", "squared_error", "attention_stats")
        for last in (False, True)
    ],
    "generative-gpu": [
        Case("mgd", "RetinaNet P3-P7, N=2", 2, 256, RETINANET, dtype=torch.bfloat16),
        Case("amd", "RetinaNet P3-P7, N=2", 2, 256, RETINANET, dtype=torch.bfloat16),
        Case("mgd", "ImageNet, N=256", 256, 512, ((7, 7),), mask_on_channel=True),
    ],
}
