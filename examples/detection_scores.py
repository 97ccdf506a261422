"""How good a detector is: mAP, and pictures of what it finds."""

from __future__ import annotations

from pathlib import Path

import common
import torch
from detection_data import Boxes, coco_package, collate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


@torch.no_grad()
def mean_average_precision(
    model: nn.Module, data: Boxes, device: torch.device, batch: int = 16, scale: float = 1.0
) -> dict[str, float]:
    """COCO's mAP, mAP50 and mAP75, and by size of the objects, in percent; of all processes together.

    Args:
        model: a detector.
        data: what it is measured on.
        device: the model's.
        batch: pictures at a time.
        scale: factor on the boxes. It changes nothing but the bounds between small, medium and large objects, which are
            32 and 96 pixels at 1.
    """
    from torchmetrics.detection import MeanAveragePrecision

    pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    model.eval()
    mine = range(common.rank(), len(data), common.world_size())
    for images, targets in DataLoader(data, batch, sampler=list(mine), collate_fn=collate):
        found = model([image.to(device) for image in images])
        pairs += zip([{k: v.cpu() for k, v in f.items()} for f in found], targets, strict=True)
    # Gathered here: torchmetrics gathers tensor by tensor, and fails where processes have unequal shares.
    metric = MeanAveragePrecision(backend=coco_package(), sync_on_compute=False)
    metric.warn_on_many_detections = False
    for f, t in common.gathered(pairs):
        metric.update([{**f, "boxes": f["boxes"] * scale}], [_truth(t, scale)])
    names = {"map": "mAP", "map_50": "mAP50", "map_75": "mAP75"}
    names |= {f"map_{size}": f"mAP {size}" for size in ("small", "medium", "large")}
    values = metric.compute()
    return {name: 100 * float(values[key]) for key, name in names.items() if float(values[key]) >= 0}


def _truth(target: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What torchmetrics judges by: objects, and crowds, in which whatever is found does not count."""
    boxes, crowds = target["boxes"], target["crowds"]
    return {
        "boxes": torch.cat([boxes, crowds]) * scale,
        "labels": torch.cat([target["labels"], target["crowd_labels"]]),
        "area": torch.cat([target["area"], (crowds[:, 2:] - crowds[:, :2]).prod(1)]) * scale**2,
        "iscrowd": torch.arange(len(boxes) + len(crowds)) >= len(boxes),
    }


@torch.no_grad()
def draw_boxes(model: nn.Module, data: Boxes, device: torch.device, path: Path, count: int = 4) -> None:
    """A PNG of pictures with the true boxes, above, and those found with a score from 0.3 on, below."""
    from torchvision.transforms.functional import resize, to_pil_image
    from torchvision.utils import draw_bounding_boxes, make_grid

    tiles: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i in range(min(count, len(data))):
        image, target = data[i]
        found = model([image.to(device)])[0]
        kept = found["scores"] >= 0.3
        factor = 384 / image.shape[2]
        big = resize((image * 255).byte(), [round(image.shape[1] * factor), 384])
        for row, boxes, labels in (
            (0, target["boxes"], target["labels"]),
            (1, found["boxes"][kept], found["labels"][kept]),
        ):
            names = [data.classes[label - 1] for label in labels.tolist()]
            tile = draw_bounding_boxes(big, boxes.cpu() * factor, names, colors="yellow", width=2) if names else big
            tiles[row].append(F.pad(tile, (0, 0, 0, 384 - tile.shape[1])) if tile.shape[1] < 384 else tile[:, :384])
    to_pil_image(make_grid(tiles[0] + tiles[1], nrow=len(tiles[0]))).save(path)
