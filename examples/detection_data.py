"""Pictures with boxes from a COCO-format or VOC folder, read by torchvision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CocoDetection, VOCDetection
from torchvision.transforms.functional import hflip, pil_to_tensor

# fmt: off
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on

Sample = tuple[Tensor, dict[str, Tensor]]


class Objects(NamedTuple):
    """A picture's annotations."""

    corners: list[list[float]]  # left, top, right, bottom
    labels: list[int]
    areas: list[float]
    crowds: list[bool]  # whether it is a region of many


def coco_package() -> str:
    """Which package there is for COCO's format: ``pycocotools`` or ``faster_coco_eval``, which then stands in for it.

    Raises:
        ImportError: neither.
    """
    try:
        import pycocotools
    except ImportError:
        try:
            from faster_coco_eval import init_as_pycocotools
        except ImportError:
            raise ImportError("COCO's format and mAP need pip install pycocotools (or faster-coco-eval)") from None
        init_as_pycocotools()  # torchvision asks for pycocotools by name
        import pycocotools
    return str(pycocotools.__name__)


class Boxes(Dataset[Sample]):
    """Pictures ``[3, H, W]`` in 0..1, and targets: ``boxes [n, 4]`` (left, top, right, bottom, in pixels),
    ``labels [n]`` from 1 on, ``area [n]``; ``crowds [m, 4]`` and ``crowd_labels [m]``, regions of many objects; and
    ``image_id``, the picture's number.

    Args:
        root: a COCO-format folder (``annotations/instances_<split>.json`` or ``instances_<split><year>.json``, pictures
            in ``<split>`` or ``<split><year>``) or one that holds VOC (``VOCdevkit/VOC<year>``).
        split: ``train``, ``val`` or ``test``.
        flip: whether half of the pictures are mirrored.

    Raises:
        FileNotFoundError: a folder that is neither: what was looked for, and where.
    """

    def __init__(self, root: Path, split: str, flip: bool = False) -> None:
        self.flip = flip
        annotations = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        years = sorted((root / "VOCdevkit").glob("VOC[0-9][0-9][0-9][0-9]"))
        listed = [year for year in years if (year / "ImageSets" / "Main" / f"{split}.txt").exists()]
        if annotations:
            name = annotations[-1].stem.removeprefix("instances_")
            if not (root / name).is_dir():
                raise FileNotFoundError(f"{root}: found {annotations[-1].name}, but no folder {name} with its pictures")
            coco_package()
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
                self.data: Any = CocoDetection(str(root / name), str(annotations[-1]))
            categories = self.data.coco.loadCats(sorted(self.data.coco.getCatIds()))
            self.classes = [category["name"] for category in categories]
            self.label = {category["id"]: i for i, category in enumerate(categories, 1)}
            self.boxes = self._coco
        elif listed:
            self.data = VOCDetection(str(root), year=listed[-1].name[3:], image_set=split)
            self.classes = VOC_CLASSES
            self.boxes = self._voc
        else:
            held = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else "nothing: no such folder"
            raise FileNotFoundError(
                f"--data {root}: neither a COCO-format folder (looked for annotations/instances_{split}*.json) nor VOC "
                f"(looked for VOCdevkit/VOC<year>/ImageSets/Main/{split}.txt); it holds {held or 'nothing'}"
            )

    def _coco(self, annotations: list[dict[str, Any]]) -> Objects:
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        areas = [float(a.get("area", a["bbox"][2] * a["bbox"][3])) for a in annotations]
        labels = [self.label[a["category_id"]] for a in annotations]
        return Objects(corners, labels, areas, [bool(a.get("iscrowd")) for a in annotations])

    def _voc(self, annotation: dict[str, Any]) -> Objects:
        objects = [o for o in annotation["annotation"].get("object", []) if o.get("difficult", "0") != "1"]
        corners = [[float(o["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in corners]
        labels = [VOC_CLASSES.index(o["name"]) + 1 for o in objects]
        return Objects(corners, labels, areas, [False] * len(objects))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int | tuple[int, float]) -> Sample:
        index, draw = item if isinstance(item, tuple) else (item, 1.0)
        picture, annotation = self.data[index]
        image = pil_to_tensor(picture).float() / 255
        corners, classes, areas, crowds = self.boxes(annotation)
        boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
        if self.flip and draw < 0.5:
            image = hflip(image)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
        # Detectors refuse boxes without an area. Crowds are not learned, and what is found in them is not judged.
        real, crowd = (boxes[:, 2:] > boxes[:, :2]).all(1), torch.tensor(crowds, dtype=torch.bool)
        labels, sizes = torch.tensor(classes, dtype=torch.int64), torch.tensor(areas, dtype=torch.float32)
        one, many = real & ~crowd, real & crowd
        return image, {
            "boxes": boxes[one],
            "labels": labels[one],
            "area": sizes[one],
            "crowds": boxes[many],
            "crowd_labels": labels[many],
            "image_id": torch.tensor(index),
        }


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Lists: pictures differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
