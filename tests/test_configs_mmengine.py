"""The configurations in examples/configs/mmengine, run whole on pictures made here; by ``make test-models``.

With the real models of mmdetection and mmsegmentation. Their mmcv is mmcv-lite, without compiled operators, of which
these models need none to train; to predict, detectors get torchvision's NMS.
"""

import json
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision


class Operators(types.ModuleType):
    """What mmcv has compiled, as far as it is called here; mmdetection looks for all of it when it is imported."""

    @staticmethod
    def nms(boxes, scores, iou_threshold, offset):
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


pytest.importorskip("mmcv", reason="by `make test-models`")
_operators = Operators("mmcv._ext")
_operators.__spec__ = ModuleSpec("mmcv._ext", None)
sys.modules.setdefault("mmcv._ext", _operators)
for _package in ("mmdet", "mmseg"):
    pytest.importorskip(_package, reason="by `make test-models`")
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine keeps more than tensors in its checkpoints

from mmdet.datasets import CocoDataset  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hub import get_config  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from PIL import Image  # noqa: E402

from maskd_kernels import MasKDLoss, MasKDSegLoss  # noqa: E402

SMALL = {  # what is other than in the files, by type
    "Resize": {"scale": (64, 64)},
    "RandomResize": {"scale": (64, 64)},
    "RandomCrop": {"crop_size": (32, 64)},
    "SegDataPreProcessor": {"size": (32, 64)},
    "SyncBN": {"type": "BN"},  # there is no GPU
}
FOLDER = Path(__file__).parent.parent / "examples" / "configs" / "mmengine"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Four pictures with a bright box each, in the folders that COCO has."""
    root, random = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, boxes = [], []
        for i in range(4):
            picture = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            x, y = (int(value) for value in random.integers(0, 24, 2))
            picture[y : y + 40, x : x + 40] = 220
            Image.fromarray(picture).save(root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
            box = {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 1600}
            boxes.append({**box, "bbox": [x, y, 40, 40]})
        classes = [{"id": i, "name": name} for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
        annotations = {"images": images, "annotations": boxes, "categories": classes}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(annotations))
    return root


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "leftImg8bit" / split).mkdir(parents=True)
        (root / "gtFine" / split).mkdir(parents=True)
        for i in range(8):
            labels = random.integers(0, 19, (4, 4), dtype=np.uint8).repeat(16, 0).repeat(32, 1)
            picture = np.stack([labels * 13] * 3, 2)
            Image.fromarray(picture).save(root / "leftImg8bit" / split / f"{i}_leftImg8bit.png")
            Image.fromarray(labels).save(root / "gtFine" / split / f"{i}_gtFine_labelTrainIds.png")
    return root


def each_dict(value):
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from each_dict(item)


def loaded(name, data, folder):
    """A configuration as it stands, but for the data and their size, and weights that would be downloaded."""
    config = Config.fromfile(FOLDER / f"{name}.py")
    config.merge_from_dict({"work_dir": str(folder), "log_level": "WARNING", "randomness": {"seed": 0}})
    config.experiment_name = f"{name}-{folder.name}"
    config.default_hooks.logger.interval = 1
    del config.default_hooks.visualization
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(data)
        loader.update(num_workers=0, persistent_workers=False)
    if "ann_file" in config.val_evaluator:
        config.val_evaluator.ann_file = str(data / "annotations/instances_val2017.json")
    for hook in config.get("custom_hooks", []):
        hook.update(iterations=3, interval=1, out=str(folder / "tokens.pth"))
    for part in each_dict(config._cfg_dict):
        part.update(SMALL.get(part.get("type"), {}))
    student = config.model.student
    student.backbone.init_cfg = None
    if "pretrained" in student:
        student.pretrained = None
    torch.manual_seed(0)
    teacher = MODELS.build({"_scope_": config.default_scope, **get_config(config.model.teacher).model})
    config.model.teacher_ckpt = str(folder / "teacher.pth")  # as the packages publish them
    torch.save({"meta": {}, "state_dict": teacher.state_dict()}, config.model.teacher_ckpt)
    return config


def trained(config):
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def series(runner, name):
    values, _ = runner.message_hub.get_scalar(name).data
    return list(values)


def student_alone(config, name):
    """What the student's own package makes of a checkpoint."""
    student = MODELS.build({"_scope_": config.default_scope, **config.model.student})
    state = torch.load(Path(config.work_dir) / name, weights_only=False)["state_dict"]
    missing, unexpected = student.load_state_dict(state, strict=False)
    assert not missing
    assert all(name.startswith("distiller.") for name in unexpected)
    return student.eval()


@pytest.mark.parametrize("name", ["maskd_retinanet", "mgd_retinanet", "amd_retinanet"])
def test_detection(name, coco, tmp_path):
    config = loaded(name, coco, tmp_path)
    config.train_cfg.max_epochs = 1
    runner = trained(config)
    for tap in config.model.taps:
        assert all(value > 0 for value in series(runner, f"train/distill.loss_{tap.name}"))
    assert -1 <= runner.message_hub.get_scalar("val/coco/bbox_mAP").current() <= 1
    student, teacher = runner.model.distiller.student, runner.model.distiller.teacher
    for inherited in ("neck.fpn_convs.0.conv.weight", "bbox_head.retina_cls.bias"):
        weights = student.get_parameter(inherited)
        torch.testing.assert_close(weights, teacher.get_parameter(inherited), rtol=0, atol=1e-4)
        assert not torch.equal(weights, teacher.get_parameter(inherited))
    picture = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(student.eval()(picture), student_alone(config, "epoch_1.pth")(picture), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if name == "maskd_retinanet":
        loss = runner.model.distiller.losses[0]
        written = MasKDLoss([256] * 5, pretrained=tmp_path / "tokens.pth")
        assert torch.equal(loss.mask_modules[4].mask_token, written.mask_modules[4].mask_token)


def test_tokens_alone(coco, tmp_path):
    config = loaded("tokens_retinanet", coco, tmp_path)
    trained(config)
    assert MasKDLoss([256] * 5, pretrained=tmp_path / "tokens.pth").mask_modules[0].mask_token.std() > 0.012
    assert not list(tmp_path.glob("epoch_*.pth"))


def test_segmentation(cityscapes, tmp_path):
    config = loaded("maskd_deeplabv3", cityscapes, tmp_path)
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.checkpoint.interval = 2
    runner = trained(config)
    assert all(value > 0 for value in series(runner, "train/distill.loss_maskd"))
    assert 0 <= runner.message_hub.get_scalar("val/mIoU").current() <= 100
    loss = runner.model.distiller.losses[0]
    written = MasKDSegLoss(19, pretrained=tmp_path / "tokens.pth")
    assert torch.equal(loss.mask_module.mask_token, written.mask_module.mask_token)
    picture = torch.rand(1, 3, 32, 64)
    assert torch.equal(runner.model.eval()(picture), student_alone(config, "iter_2.pth")(picture))
