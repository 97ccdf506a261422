"""A small data set made on the spot: handwritten digits on photographs, in COCO's format, with label maps beside it.

scikit-learn ships 1,797 real handwritten digits and two real photographs; nothing is downloaded. Digits are small and
most of every picture is background. No digit and no part of a photograph is in two of the splits.

``<folder>/annotations/instances_<split>.json``, ``<folder>/<split>/000000.png`` and, for segmentation,
``<folder>/<split>_labels/000000.png`` (0 background, 1 to 10 the digits, 255 the rim of a stroke: to be ignored).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 96  # pixels, height and width
COUNTS = {"train": 2400, "val": 300, "test": 600}
# Shares of the digits, and of the photographs' width, that a split owns.
SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}
STREAMS = {"train": 0, "val": 1, "test": 3}  # of random numbers; test pictures of stream 2 have been looked at
INK, RIM = 0.4, 0.15  # of a stroke's opacity: what belongs to the digit, and what is ignored around it


def write_digits(folder: Path, counts: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Writes the set unless it is there already; a folder appears only once it is complete.

    Args:
        folder: where it goes.
        counts: pictures of each split; ``COUNTS`` by default.
        seed: of everything that is drawn.
    """
    if folder.exists():
        return folder
    from sklearn.datasets import load_digits, load_sample_images

    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    photographs = load_sample_images().images
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    try:
        (part / "annotations").mkdir()
        for split, count in (counts or COUNTS).items():
            low, high = SHARES[split]
            chosen = order[int(low * len(order)) : int(high * len(order))]
            strips = [p[:, int(low * p.shape[1]) : int(high * p.shape[1])] for p in photographs]
            rng = np.random.default_rng([seed, STREAMS[split]])
            _write_split(part, split, count, pixels[chosen].reshape(-1, 8, 8) / 16, classes[chosen], strips, rng)
        part.chmod(0o755)
        try:
            os.rename(part, folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _write_split(
    folder: Path,
    split: str,
    count: int,
    digits: np.ndarray,
    classes: np.ndarray,
    strips: list[np.ndarray],
    rng: np.random.Generator,
) -> None:
    for name in (split, f"{split}_labels"):
        (folder / name).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        scene, label, boxes = _scene(digits, classes, strips, rng)
        name = f"{i:06d}.png"
        Image.fromarray(scene).save(folder / split / name)
        Image.fromarray(label).save(folder / f"{split}_labels" / name)
        images.append({"id": i, "file_name": name, "height": SIZE, "width": SIZE})
        for digit, (left, top, width, height) in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": digit + 1,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _scene(
    digits: np.ndarray, classes: np.ndarray, strips: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """A picture ``[SIZE, SIZE, 3]``, its label map ``[SIZE, SIZE]``; each digit with its left, top, width, height."""
    strip = strips[rng.integers(len(strips))]
    side = int(rng.integers(SIZE // 2, min(strip.shape[:2]) + 1))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in strip.shape[:2])
    crop = Image.fromarray(strip[top : top + side, left : left + side]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    scene = np.asarray(crop, dtype=np.float32) / 255
    if rng.random() < 0.5:
        scene = scene[:, ::-1]
    scene = np.ascontiguousarray(scene)
    label = np.zeros((SIZE, SIZE), dtype=np.uint8)
    boxes: list[tuple[int, tuple[int, int, int, int]]] = []
    taken = np.zeros((SIZE, SIZE), dtype=bool)
    for _ in range(rng.integers(2, 6)):
        which, side = rng.integers(len(digits)), int(rng.integers(13, 29))
        ink = Image.fromarray(digits[which].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        shape = np.asarray(ink).clip(0, 1)[..., None]
        top, left = (int(x) for x in rng.integers(0, SIZE - side + 1, 2))
        window = (slice(top, top + side), slice(left, left + side))
        if taken[window].any():
            continue
        taken[window] = True
        # Readable on what lies below: dark on light, light on dark.
        below = scene[window].mean((0, 1))
        colour = rng.uniform(0.0, 0.35, 3) if below.mean() > 0.5 else rng.uniform(0.65, 1.0, 3)
        scene[window] = scene[window] * (1 - shape) + colour * shape
        shape = shape[..., 0]
        region = label[window]
        region[shape > RIM] = 255
        region[shape > INK] = classes[which] + 1
        rows, columns = np.nonzero((shape > INK).any(1))[0], np.nonzero((shape > INK).any(0))[0]
        box = (left + columns[0], top + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        boxes.append((int(classes[which]), (int(box[0]), int(box[1]), int(box[2]), int(box[3]))))
    scene += 0.03 * rng.standard_normal(scene.shape, dtype=np.float32)
    return (scene.clip(0, 1) * 255).round().astype(np.uint8), label, boxes
