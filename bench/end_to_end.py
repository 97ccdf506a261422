"""``python -m bench.end_to_end``: a training step of a detector under a teacher, and what distillation adds to it.

torchvision's RetinaNet-R50 under an R101 teacher, random weights, MasKD on P3-P7 with frozen tokens: the published
formula, ours, the teacher's forward alone (which any distillation of features needs), and no distillation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import device_folder, interleaved, machine, peak_extra_bytes, time_once
from maskd_kernels import Distiller, MasKDLoss, Tap, reference

CHANNELS = [256] * 5


class PublishedMasKD(nn.Module):
    """The published formula with the parameters of our module, frozen."""

    def __init__(self, like: MasKDLoss) -> None:
        super().__init__()
        self.mask_modules = like.mask_modules

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The loss of all levels."""
        modules: list[Any] = list(self.mask_modules)
        losses = [
            reference.published_maskd_loss(s, t, m.mask_token, m.weighting)
            for s, t, m in zip(student, teacher, modules, strict=True)
        ]
        return torch.stack(losses).sum()


class Nothing(nn.Module):
    """A loss that does not look at the features."""

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Zero."""
        return student[0].new_zeros(())


def detector(depth: str, size: int) -> nn.Module:
    """RetinaNet on a ResNet; images keep their size."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = resnet_fpn_backbone(
        backbone_name=depth,
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
        trainable_layers=5,
    )
    return RetinaNet(backbone, 91, min_size=size, max_size=4096)


def build(device: str, batch: int, height: int, width: int) -> dict[str, Callable[[], Any]]:
    """One training step, by kind of distillation."""
    torch.manual_seed(0)
    student = detector("resnet50", min(height, width)).to(device).train()
    teacher = detector("resnet101", min(height, width)).to(device)
    images = [torch.rand(3, height, width, device=device) for _ in range(batch)]
    box = torch.tensor([[10.0, 10.0, 90.0, 120.0]], device=device)
    targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device)} for _ in images]
    ours = MasKDLoss(CHANNELS, custom_mask=False).to(device)
    losses = {
        "the teacher's forward alone": Nothing(),
        "published formula": PublishedMasKD(ours),
        "maskd-kernels": ours,
    }
    parameters = [p for p in student.parameters() if p.requires_grad]

    def finish(loss: Tensor) -> None:
        for p in parameters:
            p.grad = None
        loss.backward()

    def alone() -> None:
        finish(sum(student(images, targets).values()))

    def distilled(loss: nn.Module) -> Callable[[], None]:
        def step() -> None:
            with Distiller(student, teacher, [Tap("backbone", "backbone", loss, name="kd")]) as distiller:
                detection, features = distiller(images, targets)
                finish(sum(detection.values()) + sum(features.values()))

        return step

    return {"none": alone, **{name: distilled(loss) for name, loss in losses.items()}}


def main() -> None:
    """Measures and writes end_to_end.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path, help="folder for results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    height, width = options.size or ((256, 320) if options.device == "cpu" else (800, 1344))
    steps = build(options.device, options.batch, height, width)
    for step in steps.values():
        step()
    calls = {name: (lambda step=step: time_once(step)) for name, step in steps.items()}
    timings = interleaved(calls, options.seconds)
    base = timings["none"].median_ms
    rows = []
    for name, timing in timings.items():
        share = None if name == "none" else (timing.median_ms - base) / timing.median_ms
        peak = peak_extra_bytes(steps[name]) / 2**20
        rows.append({"name": name, **dataclasses.asdict(timing), "share": share, "peak_mib": peak})
        print(f"{name:30s}{timing.median_ms:10.1f} ms{'' if share is None else f'{share:8.1%}'}{peak:10.0f} MiB")
    about = (
        f"RetinaNet-R50 under R101, random weights, batch {options.batch}, {height}x{width}, float32, forward and "
        "backward without the optimizer. Share: what is added to the step without distillation, of the whole step."
    )
    if options.json:
        content = {"machine": machine(), "about": about, "rows": rows}
        (device_folder(options.json, options.device) / "end_to_end.json").write_text(
            json.dumps(content, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
