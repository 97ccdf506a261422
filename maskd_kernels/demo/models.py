"""Teacher and student: torchvision backbones under a feature pyramid of the same shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskd_kernels.demo.scenes import CLASSES
from maskd_kernels.distill import prepare_teacher

CHANNELS = 64  # of every pyramid level


class PyramidSegmenter(nn.Module):
    """A torchvision backbone, torchvision's feature pyramid, and a convolutional head on its finest level.

    Teacher and student share the shapes of pyramid features and head, so that a student can start from the teacher's
    head (the papers' inheriting strategy).
    """

    def __init__(self, backbone: nn.Module, channels: list[int]) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(channels, CHANNELS)
        self.head = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(CHANNELS, CLASSES, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 11, H, W]`` of images ``[N, 3, H, W]``."""
        return logits_of(self.head, self.fpn(self.backbone(images)), images)


def logits_of(head: nn.Module, levels: dict[str, Tensor], images: Tensor) -> Tensor:
    """The head's logits on the finest level, at the images' size."""
    return F.interpolate(head(levels["0"]), size=images.shape[2:], mode="bilinear", align_corners=False)


class Remembered(nn.Module):
    """A teacher that has seen all scenes already: nothing augments them, so its pyramids are computed once.

    Tokens are learned on its head, students under its pyramid alone, where a ``Distiller`` stops it.

    Set ``numbers``, those of a batch's scenes, before a call.
    """

    def __init__(self, teacher: PyramidSegmenter, scenes: Tensor) -> None:
        super().__init__()
        prepared = prepare_teacher(teacher, taps=["fpn"])
        self.fpn = nn.Identity()  # what a Tap names
        self.head = prepared.head
        self.numbers: Tensor | None = None
        self.levels: dict[str, Tensor] = {}
        for start in range(0, len(scenes), 50):
            for key, level in prepared.fpn(prepared.backbone(scenes[start : start + 50])).items():
                if key not in self.levels:
                    self.levels[key] = torch.empty(
                        (len(scenes), *level.shape[1:]), device=level.device, memory_format=torch.channels_last
                    )
                self.levels[key][start : start + 50] = level

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's logits for the scenes ``numbers``."""
        levels = self.fpn({key: level[self.numbers] for key, level in self.levels.items()})
        return logits_of(self.head, levels, images)


def build_teacher() -> PyramidSegmenter:
    """ResNet-18, pyramid levels at strides 4, 8 and 16."""
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = IntermediateLayerGetter(resnet18(weights=None), {"layer1": "0", "layer2": "1", "layer3": "2"})
    return PyramidSegmenter(backbone, [64, 128, 256])


def build_student() -> PyramidSegmenter:
    """MobileNetV2 at 0.35 of its width, the same strides."""
    from torchvision.models import mobilenet_v2
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {"features.3": "0", "features.6": "1", "features.13": "2"}
    backbone = create_feature_extractor(mobilenet_v2(weights=None, width_mult=0.35), nodes)
    with torch.no_grad():
        channels = [level.shape[1] for level in backbone.eval()(torch.zeros(1, 3, 64, 64)).values()]
    return PyramidSegmenter(backbone.train(), channels)
