"""DeepLabV3, a PSPNet and LR-ASPP on any ResNet or MobileNet of torchvision, with torchvision's heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectors import backbone_body, last_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.segmentation.lraspp import LRASPPHead

SEGMENTERS = ("deeplabv3", "pspnet", "lraspp")


class PyramidPoolingHead(nn.Module):
    """PSPNet's head (arXiv 1612.01105): means over 1, 4, 9 and 36 parts of the map beside the map itself."""

    def __init__(self, channels: int, classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.means = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(parts), nn.Conv2d(channels, hidden // 4, 1), nn.ReLU())
            for parts in (1, 2, 3, 6)
        )
        self.classify = nn.Sequential(
            nn.Conv2d(channels + hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(hidden, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of features, both ``[N, channels, h, w]``."""
        size = x.shape[2:]
        means = [F.interpolate(mean(x), size=size, mode="bilinear", align_corners=False) for mean in self.means]
        return self.classify(torch.cat([x, *means], 1))


class Segmenter(nn.Module):
    """A backbone, a head on its last features, and an auxiliary head two stages earlier where the papers have one.

    ``features`` and ``logits`` do nothing: they are where MGD and AMD, and MasKD, look.
    """

    def __init__(self, kind: str, body: nn.Module, classes: int) -> None:
        super().__init__()
        stages = last_layers(body)
        (low, low_channels), (middle, middle_channels), (high, high_channels) = (stages[s] for s in (8, 16, 32))
        _dilate(body, after=low if kind != "lraspp" else middle)
        self.backbone = IntermediateLayerGetter(body, {low: "low", middle: "middle", high: "high"})
        self.features, self.logits = nn.Identity(), nn.Identity()
        self.auxiliary = None if kind == "lraspp" else FCNHead(middle_channels, classes)
        self.kind = kind
        self.classifier: nn.Module
        if kind == "lraspp":
            self.classifier = LRASPPHead(low_channels, high_channels, classes, 128)
        elif kind == "pspnet":
            self.classifier = PyramidPoolingHead(high_channels, classes)
        else:
            self.classifier = DeepLabHead(high_channels, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``[N, classes, H, W]`` of images ``[N, 3, H, W]``, and those of the auxiliary head while training."""
        size = images.shape[2:]
        levels = self.backbone(images)
        high = self.features(levels["high"])
        logits = self.logits(self.classifier({"low": levels["low"], "high": high} if self.kind == "lraspp" else high))
        auxiliary = None
        if self.auxiliary is not None and self.training:
            auxiliary = F.interpolate(self.auxiliary(levels["middle"]), size=size, mode="bilinear", align_corners=False)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False), auxiliary


def _dilate(body: nn.Module, after: str) -> None:
    """Trades the strides behind a layer for dilation, so that the last features keep that layer's size."""
    rate, behind = 1, False
    for name, child in body.named_children():
        if behind:
            before = rate
            for module in child.modules():
                if isinstance(module, nn.Conv2d):
                    # A strided convolution still reads at the old distance; what follows it, at the new one.
                    reach = rate
                    if module.stride[0] == 2:
                        module.stride, reach, rate = (1, 1), before, before * 2
                    if module.kernel_size[0] > 1:
                        module.dilation = (reach, reach)
                        module.padding = (module.kernel_size[0] // 2 * reach,) * 2
        behind = behind or name == after


def build(architecture: Mapping[str, Any], backbone: str, weights: str | None = None) -> Segmenter:
    """A segmenter.

    Args:
        architecture: what teacher and student share: ``segmenter``, ``classes`` (their names), ``frozen_norm``.
        backbone: ``resnet18``, ``mobilenet_v3_small`` and so on.
        weights: a file of torchvision's ImageNet weights.
    """
    kind = architecture["segmenter"]
    if kind not in SEGMENTERS:
        raise ValueError(f"--segmenter: expected one of {', '.join(SEGMENTERS)}, got {kind!r}")
    body = backbone_body(backbone, architecture["frozen_norm"], weights)
    return Segmenter(kind, body, len(architecture["classes"]))
