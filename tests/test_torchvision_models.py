"""Distilling and learning tokens on torchvision's models: every kind of output that they have."""

import pytest
import torch
from test_distiller import mse
from torch import nn

from maskd_kernels import AMDLoss, Distiller, Layer, MasKDLoss, MGDLoss, Tap, TokenTrainer

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def seen_by_the_loss(student, teacher, tap):
    """Student's and teacher's levels as the loss gets them, in eval mode."""
    seen = []
    tap.loss = lambda s, t: seen.append((s, t)) or mse(s, t)
    Distiller(student, teacher, tap, example_inputs=IMAGES).eval()(IMAGES)
    return seen[-1]


def test_segmenters():
    """LR-ASPP's ``high`` under DeepLab's ``out``, and the logits that both keep in a dict."""
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large

    student = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    teacher = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).eval()
    s, t = seen_by_the_loss(student, teacher, Tap(Layer("backbone", "high"), Layer("backbone", "out"), mse))
    assert torch.equal(s, student.backbone(IMAGES)["high"])
    assert torch.equal(t, teacher.backbone(IMAGES)["out"])
    s, t = seen_by_the_loss(student, teacher, Tap("", "", mse, levels="out"))
    assert torch.equal(s, student(IMAGES)["out"])
    assert torch.equal(t, teacher(IMAGES)["out"])

    trainer = TokenTrainer(student, "backbone", 960, levels="high")
    output, _ = trainer(IMAGES)
    features = student.backbone(IMAGES)
    masked = {"low": features["low"], "high": trainer.mask_modules[0](features["high"])[0]}
    expected = nn.functional.interpolate(student.classifier(masked), size=64, mode="bilinear", align_corners=False)
    torch.testing.assert_close(output["out"], expected)


def test_three_of_five_levels():
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    def pyramid(returned_layers):
        blocks = LastLevelP6P7(256, 256)
        return resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, extra_blocks=blocks, returned_layers=returned_layers
        ).eval()

    student, teacher = pyramid([2, 3, 4]), pyramid([2, 3, 4])
    s, t = seen_by_the_loss(student, teacher, Tap("fpn", "fpn", mse, levels=["0", "p6", 2]))
    for got, model in ((s, student), (t, teacher)):
        levels = model(IMAGES)
        for x, key in zip(got, ("0", "p6", "2"), strict=True):
            assert torch.equal(x, levels[key])


@pytest.mark.parametrize("loss", [MasKDLoss(32), MGDLoss(32, 32), AMDLoss(32, 32, reduction=4)], ids=type)
def test_vision_transformer(loss):
    from torchvision.models import VisionTransformer

    student = VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=5)
    teacher = VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=5)
    where = {"channel_dim": -1, "prefix_tokens": 1, "grid": "input"}
    tap = Tap("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2", loss, name="kd", **where)
    d = Distiller(student, teacher, tap, example_inputs=IMAGES)
    _, losses = d(IMAGES)
    losses["kd"].backward()
    assert all(p.grad.abs().sum() > 0 for p in d.aligns.parameters())
    blocks = []
    handle = teacher.encoder.layers[2].register_forward_hook(lambda _m, _i, output: blocks.append(output))
    with torch.no_grad():
        teacher(IMAGES)
    handle.remove()
    _, t = seen_by_the_loss(student, teacher, tap)
    assert torch.equal(t, blocks[0][:, 1:].mT.unflatten(-1, (4, 4)))

    trainer = TokenTrainer(teacher, "encoder.layers.encoder_layer_0", 32, **where)
    logits, dice = trainer(IMAGES)
    (logits.square().mean() + dice).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.parameters())


def test_swin_transformer():
    """Features ``[N, H, W, C]``."""
    from torchvision.models import SwinTransformer

    student, teacher = (SwinTransformer([4, 4], width, [1, 1], [1, 2], [4, 4], num_classes=5) for width in (8, 16))
    s, t = seen_by_the_loss(student.eval(), teacher, Tap("features.1", "features.1", mse, channel_dim=-1))
    assert torch.equal(t, teacher.features[:2](IMAGES).movedim(-1, 1))
    assert s.shape == t.shape
