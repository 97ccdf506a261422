"""A teacher that has seen every picture already: what it makes of them is computed once, and kept beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import common
import torch
from detection_data import Boxes, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Remembered(nn.Module):
    """The pyramids of all pictures of a data set that nothing augments; ``backbone`` puts out those of a batch.

    Args:
        teacher: the detector.
        data: pictures that come out of the teacher's resizing in one size.
        path: the file that keeps the pyramids; read where it is there and of this teacher, else written.

    Raises:
        ValueError: pictures that are mirrored, or of several sizes.
    """

    def __init__(self, teacher: nn.Module, data: Boxes, path: Path, device: torch.device) -> None:
        super().__init__()
        if data.flip:
            raise ValueError("--remember: expected --no-flip, as a mirrored picture has another pyramid")
        self.backbone = nn.Identity()  # what a Tap names
        key = _digest(teacher, data)
        kept = torch.load(path, mmap=True, weights_only=True) if path.exists() else {}
        if kept.get("key") != key:
            kept = {"key": key, "levels": _pyramids(teacher, data, device)}
            common.save(kept, path)
        self.levels: dict[str, Tensor] = kept["levels"]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The levels ``[N, C, h, w]`` of the pictures whose numbers the targets hold."""
        numbers = torch.stack([target["image_id"] for target in targets]).cpu()
        return self.backbone({name: level[numbers].to(images[0].device) for name, level in self.levels.items()})


@torch.no_grad()
def _pyramids(teacher: nn.Module, data: Boxes, device: torch.device) -> dict[str, Tensor]:
    levels: dict[str, list[Tensor]] = {}
    for images, _ in DataLoader(data, 16, collate_fn=collate):
        pictures = teacher.transform([image.to(device) for image in images])[0].tensors
        for name, level in teacher.backbone(pictures).items():
            levels.setdefault(name, []).append(level.cpu())
    sizes = {tuple(level.shape[2:]) for level in next(iter(levels.values()))}
    if len(sizes) > 1:
        raise ValueError(f"--remember: expected pictures of one size, got levels of {sorted(sizes)}")
    return {name: torch.cat(parts) for name, parts in levels.items()}


def _digest(teacher: nn.Module, data: Boxes) -> str:
    """What tells a file of another teacher, or of other pictures, from this one's."""
    digest = hashlib.sha256(str(len(data)).encode())
    pictures = (data[i][0] for i in range(len(data)))
    for value in (*teacher.state_dict().values(), *pictures):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
