"""examples/segmentation.py, on the generated set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("torchvision", reason="the examples build on torchvision")
pytest.importorskip("sklearn", reason="the generated set is made of scikit-learn's digits")

import common  # noqa: E402
import generated  # noqa: E402
import segmentation  # noqa: E402
import segmentation_data  # noqa: E402
import segmenters  # noqa: E402
from PIL import Image  # noqa: E402

SMALL = ["--device", "cpu", "--batch", "2", "--epochs", "2", "--crop", "64", "64"]
TOKENS = Path(__file__).parent / "golden" / "maskd_seg_deeplabv3_r101_cityscapes_tokens.pth"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the set, a teacher and tokens."""
    folder = tmp_path_factory.mktemp("runs")
    generated.write_digits(folder / "digits", {"train": 4, "val": 2})
    where = ["--runs", str(folder), *SMALL]
    segmentation.main(["teacher", "--teacher-backbone", "mobilenet_v3_small", "--segmenter", "lraspp", *where])
    segmentation.main(["tokens", *where])
    return folder


@pytest.mark.parametrize("kind", segmenters.SEGMENTERS)
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small"])
def test_features_keep_their_size(kind: str, backbone: str) -> None:
    """Dilated: stride 8 (LR-ASPP: 16), and what is seen reaches as far as with the strides."""
    architecture = {"segmenter": kind, "classes": ["a", "b", "c"], "frozen_norm": False}
    model = segmenters.build(architecture, backbone)
    shown: list[torch.Tensor] = []
    model.features.register_forward_hook(lambda _m, _i, x: shown.append(x))
    logits, auxiliary = model(torch.randn(2, 3, 64, 64))
    assert shown[0].shape[2] == (4 if kind == "lraspp" else 8)
    assert logits.shape == (2, 3, 64, 64)
    assert (auxiliary is None) == (kind == "lraspp")
    logits, auxiliary = model.eval()(torch.randn(2, 3, 64, 64))
    assert auxiliary is None
    rates = {m.dilation[0] for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d)}
    assert max(rates) == (2 if kind == "lraspp" else 4)


def test_dilated_resnet_is_torchvisions() -> None:
    """The same features as ``replace_stride_with_dilation``, which torchvision has for its bottlenecks alone."""
    from torchvision.models import resnet50

    body = segmenters.backbone_body("resnet50", False, None).eval()
    theirs = resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(body.state_dict())
    segmenters._dilate(body, after="layer2")
    for own, other in zip(body.modules(), theirs.modules(), strict=True):
        if isinstance(own, torch.nn.Conv2d):
            assert (own.stride, own.dilation, own.padding) == (other.stride, other.dilation, other.padding)


def test_released_cityscapes_tokens_load() -> None:
    args = argparse.Namespace(method="maskd", tokens=TOKENS, tokens_per_level=8, weight=1.0)
    tap = segmentation.make_tap(args, 19, 0, 0)
    released = torch.load(TOKENS, map_location="cpu", weights_only=True)
    (value,) = (v for v in released.get("state_dict", released).values())
    assert torch.equal(tap.loss.mask_module.mask_token, value)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["maskd", "mgd", "amd", "mse"])
def test_resumed_run_is_the_uninterrupted_one(
    method: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distil(out: Path, *more: str) -> dict:
        student = ["--method", method, "--student-backbone", "mobilenet_v3_small"]
        segmentation.main(["distil", "--runs", str(runs), "--out", str(out), *student, *SMALL, *more])
        return torch.load(out / "last.pth", weights_only=True)

    whole = distil(tmp_path / "whole")
    kept = common.save

    def interrupted(state: dict, path: Path) -> None:
        kept(state, path)
        if state["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "parts")
    monkeypatch.undo()
    parts = distil(tmp_path / "parts", "--resume")
    assert parts["history"] == whole["history"]
    assert method in whole["history"][0]
    for key, value in whole["model"].items():
        assert torch.equal(parts["model"][key], value), key


def test_augmentation_moves_labels_with_the_picture(runs: Path) -> None:
    whole = segmentation_data.LabelMaps(runs / "digits", "train")
    image, labels = whole[1]
    assert set(labels.unique().tolist()) <= {*range(11), segmentation_data.IGNORED}
    cut = segmentation_data.LabelMaps(runs / "digits", "train", (40, 120), (1.0, 1.0), flip=True)
    seen = []
    for draw in np.linspace(0, 0.99, 12):
        part, its_labels = cut[1, float(draw)]
        assert part.shape == (3, 40, 120)
        assert (its_labels[:, :24] == 255).all() or (its_labels[:, 96:] == 255).all()
        again, _ = cut[1, float(draw)]
        assert torch.equal(part, again)
        for mirrored in (False, True):
            for top in range(57):
                window = labels[top : top + 40]
                found = its_labels.flip(-1)[:, :96] if mirrored else its_labels[:, :96]
                picture = part.flip(-1)[..., :96] if mirrored else part[..., :96]
                if torch.equal(window, found) and torch.equal(image[:, top : top + 40], picture):
                    seen.append((mirrored, draw))
    assert {mirrored for mirrored, _ in seen} == {False, True}
    assert len({draw for _, draw in seen}) == 12


def test_cityscapes_labels_are_the_training_ones(tmp_path: Path) -> None:
    for folder, name, values in (
        ("leftImg8bit", "a_000000_000000_leftImg8bit.png", np.zeros((4, 4, 3), np.uint8)),
        ("gtFine", "a_000000_000000_gtFine_labelIds.png", np.array([[0, 7, 26, 33]] * 4, np.uint8)),
    ):
        (tmp_path / folder / "train" / "a").mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / folder / "train" / "a" / name)
    data = segmentation_data.LabelMaps(tmp_path, "train")
    assert data[0][1][0].tolist() == [255, 0, 13, 18]  # unlabelled, road, car, bicycle
    assert data.classes[0] == "road"
    assert len(data.classes) == 19
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit/val, gtFine/val.*Segmentation/val\.txt.*val_labels"):
        segmentation_data.LabelMaps(tmp_path, "val")


def test_classes_that_do_not_fit(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"last\.pth knows 11 classes .*, --data has 2"):
        segmentation.load_segmenter(runs / "teacher" / "last.pth", torch.device("cpu"), ["a", "b"])


def test_classes_that_nobody_has_are_left_out() -> None:
    """The mean is over the others; a class that is missed altogether counts as nothing."""
    pytest.importorskip("torchmetrics", reason='mIoU needs pip install "maskd-kernels[examples]"')

    class Data(list[Any]):
        classes = ("a", "b", "c", "d")

    class Says(torch.nn.Module):
        def __init__(self, labels: torch.Tensor) -> None:
            super().__init__()
            self.labels = labels

        def forward(self, _x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.nn.functional.one_hot(self.labels, 4).permute(2, 0, 1)[None].float(), None

    labels = torch.tensor([[0, 1], [1, 0]])
    data = Data([(torch.zeros(3, 2, 2), labels)])
    perfect = segmentation.mean_iou(Says(labels), data, torch.device("cpu"))
    assert perfect == pytest.approx({"mIoU": 100, "a": 100, "b": 100})
    half = segmentation.mean_iou(Says(torch.tensor([[0, 3], [3, 0]])), data, torch.device("cpu"))
    assert half == pytest.approx({"mIoU": 100 / 3, "a": 100, "b": 0, "d": 0})
