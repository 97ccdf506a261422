"""torchvision's RetinaNet, FCOS and Faster R-CNN on any of its ResNets and MobileNets, at any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

DETECTORS = ("retinanet", "fcos", "faster_rcnn")
HEADS = {"retinanet": "head", "fcos": "head", "faster_rcnn": "rpn"}
# The output that regresses boxes: the same on student and teacher whatever the detector then makes of it.
BOX_REGRESSION = {
    "retinanet": "head.regression_head",
    "fcos": "head.regression_head",
    "faster_rcnn": "rpn.head.bbox_pred",
}


def backbone_body(name: str, frozen_norm: bool, weights: str | None) -> nn.Module:
    """The convolutional part of one of torchvision's classifiers; ``weights`` is a file of its parameters."""
    norm: Any = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        model = torchvision.models.get_model(name, weights=None, norm_layer=norm)
        body: nn.Module = model
    elif name.startswith("mobilenet"):
        model = torchvision.models.get_model(name, weights=None, norm_layer=norm)
        body = model.features
    else:
        raise ValueError(f"backbone: expected a ResNet or MobileNet of torchvision, got {name!r}")
    if weights is not None:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return body


def last_layers(body: nn.Module) -> dict[int, tuple[str, int]]:
    """The last layer at each stride, by its name, and its channels."""
    found: dict[int, tuple[str, int]] = {}
    x = torch.zeros(1, 3, 64, 64)
    training = body.training
    body.eval()
    with torch.no_grad():
        for name, child in body.named_children():
            if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear)):
                break
            x = child(x)
            found[64 // x.shape[2]] = (name, x.shape[1])
    body.train(training)
    return found


def build(architecture: Mapping[str, Any], backbone: str, weights: str | None = None) -> nn.Module:
    """A detector.

    Args:
        architecture: what teacher and student share: ``detector``, ``classes`` (their names), ``channels`` and
            ``levels`` of the pyramid, ``anchor`` (pixels, at the finest level), ``size`` (shorter and longer side in
            pixels), ``frozen_norm``.
        backbone: ``resnet18``, ``mobilenet_v3_small`` and so on.
        weights: a file of torchvision's ImageNet weights.
    """
    kind, channels, levels = architecture["detector"], architecture["channels"], architecture["levels"]
    if kind not in DETECTORS:
        raise ValueError(f"--detector: expected one of {', '.join(DETECTORS)}, got {kind!r}")
    if kind == "fcos" and channels % 32:
        raise ValueError(f"--channels: expected a multiple of 32, as FCOS's heads normalise 32 groups, got {channels}")
    body = backbone_body(backbone, architecture["frozen_norm"], weights)
    stages = last_layers(body)
    strides = [4, 8, 16, 32] if kind == "faster_rcnn" else [8, 16, 32]
    if not (1 <= levels <= len(strides) or levels == 5):
        raise ValueError(f"--levels: expected 1 to {len(strides)}, or 5, got {levels}")
    strides = strides[:levels]
    extra: Any = _NoExtra()
    if levels == 5:
        extra = LastLevelMaxPool() if kind == "faster_rcnn" else LastLevelP6P7(channels, channels)
    pyramid = BackboneWithFPN(
        body,
        {stages[stride][0]: str(i) for i, stride in enumerate(strides)},
        [stages[stride][1] for stride in strides],
        channels,
        extra_blocks=extra,
    )
    least, most = architecture["size"]
    anchor, count = architecture["anchor"], len(architecture["classes"]) + 1  # 0 is the background
    sides = [anchor * 2**i for i in range(levels)]
    scales = tuple((side, round(side * 2 ** (1 / 3)), round(side * 2 ** (2 / 3))) for side in sides)
    shapes = ((0.5, 1.0, 2.0),) * levels
    if kind == "retinanet":
        return detection.RetinaNet(
            pyramid, count, min_size=least, max_size=most, anchor_generator=AnchorGenerator(scales, shapes)
        )
    single = tuple((side,) for side in sides)
    if kind == "fcos":
        points = AnchorGenerator(single, ((1.0,),) * levels)
        return detection.FCOS(pyramid, count, min_size=least, max_size=most, anchor_generator=points)
    maps = [str(i) for i in range(len(strides))]
    return detection.FasterRCNN(
        pyramid,
        count,
        min_size=least,
        max_size=most,
        rpn_anchor_generator=AnchorGenerator(single, shapes),
        box_roi_pool=MultiScaleRoIAlign(maps, output_size=7, sampling_ratio=2),
    )


class _NoExtra(torchvision.ops.feature_pyramid_network.ExtraFPNBlock):
    """No levels beyond the backbone's: ``BackboneWithFPN`` takes None for a max pool."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return results, names


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> int:
    """Starts the student's neck and head from the teacher's (the papers' inheriting strategy), where shapes agree.

    Returns:
        How many parameters were taken.
    """
    own, theirs = student.state_dict(), teacher.state_dict()
    taken = 0
    for key, value in own.items():
        if not key.startswith("backbone.body.") and key in theirs and theirs[key].shape == value.shape:
            value.copy_(theirs[key])
            taken += value.numel()
    return taken
