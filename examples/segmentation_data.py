"""Pictures with label maps from Cityscapes, VOC or the generated set, read by torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection_data import VOC_CLASSES
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import Cityscapes, VOCSegmentation
from torchvision.transforms.functional import normalize, pil_to_tensor

IGNORED = 255  # the label of pixels that count for nothing
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


class LabelMaps(Dataset[tuple[Tensor, Tensor]]):
    """Pictures ``[3, H, W]``, normalised, and their labels ``[H, W]``, int64.

    Args:
        root: Cityscapes (``leftImg8bit`` and ``gtFine``), VOC (``VOCdevkit/VOC<year>``) or the generated set.
        split: ``train``, ``val`` or ``test``.
        crop: height and width that training pictures are cut to, at random; None: whole pictures.
        scales: what they are resized by before, from and to.
        flip: whether half of them are mirrored.

    Raises:
        FileNotFoundError: a folder that is none of these: what was looked for, and where.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        crop: tuple[int, int] | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
        flip: bool = False,
    ) -> None:
        self.crop, self.scales, self.flip = crop, scales, flip
        # Label by the value in the file.
        self.table = torch.full((256,), IGNORED, dtype=torch.int64)
        years = sorted((root / "VOCdevkit").glob("VOC[0-9][0-9][0-9][0-9]"))
        listed = [year for year in years if (year / "ImageSets" / "Segmentation" / f"{split}.txt").exists()]
        self.data: Any
        if (root / "leftImg8bit" / split).is_dir() and (root / "gtFine" / split).is_dir():
            self.data = Cityscapes(str(root), split, mode="fine", target_type="semantic")
            known = [c for c in Cityscapes.classes if not c.ignore_in_eval]
            self.classes = [c.name for c in known]
            self.table[[c.id for c in known]] = torch.tensor([c.train_id for c in known])
        elif listed:
            self.data = VOCSegmentation(str(root), year=listed[-1].name[3:], image_set=split)
            self.classes = ["background", *VOC_CLASSES]
            self.table[:21] = torch.arange(21)
        elif (root / f"{split}_labels").is_dir() and (root / split).is_dir():
            self.data = _Folder(root, split)
            self.classes = self.data.classes
            self.table[: len(self.classes)] = torch.arange(len(self.classes))
        else:
            held = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else "nothing: no such folder"
            raise FileNotFoundError(
                f"--data {root}: neither Cityscapes (looked for leftImg8bit/{split}, gtFine/{split}) nor VOC (looked "
                f"for VOCdevkit/VOC<year>/ImageSets/Segmentation/{split}.txt) nor the generated set ({split} and "
                f"{split}_labels); it holds {held or 'nothing'}"
            )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int | tuple[int, float]) -> tuple[Tensor, Tensor]:
        index, draw = item if isinstance(item, tuple) else (item, 0.0)
        picture, drawn = self.data[index]
        image = normalize(pil_to_tensor(picture).float() / 255, MEAN, DEVIATION)
        labels = self.table[torch.from_numpy(np.array(drawn)).long()]
        if self.crop is None:
            return image, labels
        return self._augmented(image, labels, torch.Generator().manual_seed(int(draw * 2**52)))

    def _augmented(self, image: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        share, down, across, mirror = torch.rand(4, generator=generator).tolist()
        scale = self.scales[0] + share * (self.scales[1] - self.scales[0])
        if scale != 1:
            size = [round(extent * scale) for extent in labels.shape]
            image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
            labels = F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].long()
        assert self.crop is not None
        height, width = self.crop
        missing = [max(height - labels.shape[0], 0), max(width - labels.shape[1], 0)]
        image = F.pad(image, (0, missing[1], 0, missing[0]))
        labels = F.pad(labels, (0, missing[1], 0, missing[0]), value=IGNORED)
        top, left = int(down * (labels.shape[0] - height + 1)), int(across * (labels.shape[1] - width + 1))
        window = (..., slice(top, top + height), slice(left, left + width))
        image, labels = image[window], labels[window]
        return (image.flip(-1), labels.flip(-1)) if self.flip and mirror < 0.5 else (image, labels)

    @staticmethod
    def shown(image: Tensor) -> Tensor:
        """The picture ``[H, W, 3]`` in 0..1, to look at."""
        scale = torch.tensor(DEVIATION)[:, None, None], torch.tensor(MEAN)[:, None, None]
        return (image * scale[0] + scale[1]).clamp(0, 1).permute(1, 2, 0)


class _Folder:
    """``<root>/<split>`` and, under the same names, ``<root>/<split>_labels``."""

    def __init__(self, root: Path, split: str) -> None:
        self.labels = sorted((root / f"{split}_labels").glob("*.png"))
        self.pictures = [root / split / path.name for path in self.labels]
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        self.classes = ["background", *(category["name"] for category in content["categories"])]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        return Image.open(self.pictures[index]).convert("RGB"), Image.open(self.labels[index])
