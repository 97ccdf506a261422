"""Scenes of handwritten digits, scattered and cluttered, and their labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 11  # ten digits and, as class 0, the background


def digit_splits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 digits, ``[n, 8, 8]`` in 0..1 with labels, split so that no digit is in two splits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels, classes = torch.from_numpy(images).float().reshape(-1, 8, 8) / 16, torch.from_numpy(labels)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    bounds = {"train": order[:1000], "validation": order[1000:1300], "test": order[1300:]}
    return {name: (pixels[chosen], classes[chosen]) for name, chosen in bounds.items()}


def compose_scenes(digits: tuple[Tensor, Tensor], count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` scenes ``[count, 3, size, size]`` and their labels ``[count, size, size]``, uint8."""
    generator = torch.Generator().manual_seed(seed)
    pixels, classes = digits

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    scenes = torch.empty(count, 3, size, size, memory_format=torch.channels_last)
    labels = torch.zeros(count, size, size, dtype=torch.uint8)
    for scene, label in zip(scenes, labels, strict=True):
        coarse = torch.rand(1, 3, 5, 5, generator=generator) * uniform(0.1, 0.5)
        scene.copy_(F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)[0])
        for clutter in [True] * draw(0, 3) + [False] * draw(3, 6):
            which, side = draw(0, len(pixels)), draw(20, 33)
            digit = F.interpolate(pixels[which][None, None], size=(side, side), mode="bicubic", align_corners=False)
            shape = digit[0, 0].clamp(0, 1)
            if clutter:  # a torn piece of a digit: strokes that mean nothing
                shape = shape.rot90(draw(1, 4))[: side // 2, : side // 2]
            height, width = shape.shape
            top, left = draw(0, size - height + 1), draw(0, size - width + 1)
            window = scene[:, top : top + height, left : left + width]
            colour = torch.rand(3, 1, 1, generator=generator) * 0.8 + 0.2
            window.copy_(window * (1 - shape) + colour * shape)
            if not clutter:
                region = label[top : top + height, left : left + width]
                region[shape > 0.4] = classes[which] + 1
        scene += 0.05 * torch.randn(scene.shape, generator=generator)
    return scenes.sub_(0.5), labels
