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

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from PIL import Image  # noqa: E402

from maskd_kernels import MasKDLoss, MasKDSegLoss  # noqa: E402

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
        people = [{"id": 1, "name": "person"}]
        annotations = {"images": images, "annotations": boxes, "categories": people}
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


def loaded(name, folder, data):
    """A configuration as it stands, but for the data, its size, and pretrained weights, which would be downloaded."""
    config = Config.fromfile(FOLDER / f"{name}.py")
    config.work_dir, config.log_level, config.randomness = str(folder), "WARNING", {"seed": 0}
    config.experiment_name = f"{name}-{folder.name}"
    config.default_hooks.logger.interval = 1
    config.default_hooks.pop("visualization")
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(data)
        loader.num_workers, loader.persistent_workers = 0, False
    config.train_dataloader.batch_size = 2
    for hook in config.get("custom_hooks", []):
        hook.iterations, hook.interval = 2, 1
        if "out" in hook:
            hook.out = str(folder / hook.out)
    for part in each_dict(config._cfg_dict):
        if part.get("type") in ("Resize", "RandomResize"):
            part["scale"] = (64, 64)
        if part.get("type") == "RandomCrop":
            part["crop_size"] = (32, 64)
        if part.get("type") == "SegDataPreProcessor":
            part["size"] = (32, 64)
        if part.get("type") == "SyncBN":
            part["type"] = "BN"  # there is no GPU
    student = config.model.student
    student.backbone.init_cfg = student.pretrained = None
    if "pretrained" not in Config.fromfile(FOLDER / f"{name}.py").model.student:
        student.pop("pretrained")
    return config


def with_teacher(config, folder):
    """An untrained teacher in a checkpoint as the packages publish them."""
    path = folder / "teacher.pth"
    if not path.exists():
        DefaultScope.get_instance(config.experiment_name, scope_name=config.default_scope)
        from mmengine.hub import get_config

        torch.manual_seed(0)
        teacher = MODELS.build({"_scope_": config.default_scope, **get_config(config.model.teacher).model})
        torch.save({"meta": {}, "state_dict": teacher.state_dict()}, path)
    config.model.teacher_ckpt = str(path)
    return config


def student_alone(config, checkpoint):
    """The student's own package loads what was saved."""
    student = MODELS.build({"_scope_": config.default_scope, **config.model.student})
    missing, unexpected = student.load_state_dict(checkpoint["state_dict"], strict=False)
    assert not missing
    assert all(name.startswith("distiller.") for name in unexpected)
    return student


def series(runner, name):
    return [value for value, _ in zip(*runner.message_hub.get_scalar(name).data, strict=True)]


@pytest.mark.parametrize("name", ["maskd_retinanet", "mgd_retinanet", "amd_retinanet"])
def test_detection(name, coco, tmp_path):
    config = with_teacher(loaded(name, tmp_path, coco), tmp_path)
    config.train_cfg.max_epochs = 1
    config.val_evaluator.ann_file = str(coco / "annotations/instances_val2017.json")
    runner = Runner.from_cfg(config)
    distiller = runner.model.distiller
    runner.train()
    assert torch.equal(
        distiller.teacher.neck.fpn_convs[0].conv.weight,
        torch.load(tmp_path / "teacher.pth")["state_dict"]["neck.fpn_convs.0.conv.weight"],
    )
    for tap in config.model.taps:
        assert all(value > 0 for value in series(runner, f"train/distill.loss_{tap.name}"))
    assert 0 <= runner.message_hub.get_scalar("val/coco/bbox_mAP").current() <= 1
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    student_alone(config, checkpoint)
