"""``python -m bench.end_to_end``: training steps under a teacher, and what distillation adds to them.

torchvision's models, random weights, frozen tokens: the published formula and ours with a teacher that runs whole, ours
with one that stops at its last tap, and with one that ``prepare_teacher`` has made, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import Timing, device_folder, interleaved, machine, peak_extra_bytes, time_once
from maskd_kernels import Distiller, MasKDLoss, MasKDSegLoss, Tap, prepare_teacher, reference

PUBLISHED, WHOLE, STOPPED = "published formula, whole teacher", "ours, whole teacher", "ours, teacher stops at its tap"
PREPARED, HALF = "ours, stops, prepared in float32", "ours, stops, prepared in bfloat16"
GOALS = ((HALF, 0.40), (PREPARED, 0.65))  # what is added, over what the published formula adds; a CPU, RetinaNet
CLASSES = 19


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


class PublishedMasKDSeg(nn.Module):
    """The same on logits."""

    def __init__(self, like: MasKDSegLoss) -> None:
        super().__init__()
        self.mask_module = like.mask_module

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level."""
        tokens: Any = self.mask_module.mask_token
        return 0.5 * reference.published_maskd_loss(student, teacher, tokens, eps=1e-5)


class Recorded(nn.Module):
    """A loss that keeps the features of its latest call, so that it can be timed by itself."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.features: Any = None

    def forward(self, student: Any, teacher: Any) -> Tensor:
        """The loss."""
        self.features = student, teacher
        return self.loss(student, teacher)

    def alone(self) -> Callable[[], Any]:
        """The loss of these features, forward and backward."""
        student, teacher = self.features
        levels = [s.detach().requires_grad_() for s in ([student] if isinstance(student, Tensor) else student)]
        given = levels[0] if isinstance(student, Tensor) else levels
        return lambda: torch.autograd.grad(self.loss(given, teacher), levels)


@dataclasses.dataclass
class Setup:
    """Two models, what they are called with, and the losses between them."""

    title: str
    student: nn.Module
    teacher: nn.Module
    tap: str
    published: nn.Module
    ours: nn.Module
    inputs: tuple[Any, ...]  # of one call of both models in training
    images: Any  # of one call of the teacher
    task_loss: Callable[[Any], Tensor]


def _detection(name: str, device: str, batch: int, height: int, width: int) -> Setup:
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    def detector(depth: str) -> nn.Module:  # images keep their size
        settings: dict[str, Any] = {"min_size": min(height, width), "max_size": 4096}
        kind: dict[str, Any] = {"backbone_name": depth, "weights": None, "trainable_layers": 5}
        if name == "RetinaNet":
            kind |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
        make = RetinaNet if name == "RetinaNet" else FasterRCNN
        return make(resnet_fpn_backbone(**kind), 91, **settings)

    images = [torch.rand(3, height, width, device=device) for _ in range(batch)]
    box = torch.tensor([[10.0, 10.0, 90.0, 120.0]], device=device)
    targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device)} for _ in images]
    ours = MasKDLoss([256] * 5, custom_mask=False)
    return Setup(
        f"{name}-R50 under R101",
        detector("resnet50"),
        detector("resnet101"),
        "backbone",
        PublishedMasKD(ours),
        ours,
        (images, targets),
        images,
        lambda output: sum(output.values()),  # type: ignore[arg-type, return-value]
    )


def _segmentation(device: str, batch: int, height: int, width: int) -> Setup:
    from torchvision.models.segmentation import deeplabv3_resnet101, lraspp_mobilenet_v3_large

    settings: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    images = torch.rand(batch, 3, height, width, device=device)
    labels = torch.randint(0, CLASSES, (batch, height, width), device=device)
    ours = MasKDSegLoss(CLASSES)
    return Setup(
        "LR-ASPP-MobileNetV3 under DeepLabV3-R101, logits",
        lraspp_mobilenet_v3_large(**settings),
        deeplabv3_resnet101(**settings),
        "classifier",
        PublishedMasKDSeg(ours),
        ours,
        (images,),
        images,
        lambda output: nn.functional.cross_entropy(output["out"], labels),
    )


SETUPS: dict[str, Callable[..., Setup]] = {
    "retinanet": lambda *given: _detection("RetinaNet", *given),
    "faster-rcnn": lambda *given: _detection("Faster R-CNN", *given),
    "deeplabv3": _segmentation,
}


class _Stop(Exception):
    """Ends a step where the student would begin."""


def _stop(_module: nn.Module, _inputs: Any) -> None:
    raise _Stop


def build(setup: Setup, device: str) -> tuple[dict[str, Callable[[], Any]], dict[str, Distiller], dict[str, Recorded]]:
    """One training step, by kind of distillation; and the distillers and losses behind them."""
    student, teacher = setup.student.to(device).train(), setup.teacher.to(device).eval()
    for loss in (setup.ours, setup.published):
        loss.to(device)
    example = {"taps": [setup.tap], "example_inputs": (setup.images,)}
    prepared = prepare_teacher(teacher, **example)
    half = prepare_teacher(teacher, dtype=torch.bfloat16, **example)
    print(f"{setup.title}: prepared in bfloat16, {half.preparation}", flush=True)
    kinds: dict[str, tuple[nn.Module, nn.Module, bool]] = {
        PUBLISHED: (setup.published, teacher, True),
        WHOLE: (setup.ours, teacher, True),
        STOPPED: (setup.ours, teacher, False),
        PREPARED: (setup.ours, prepared, False),
        HALF: (setup.ours, half, False),
    }
    losses = {name: Recorded(loss) for name, (loss, _, _) in kinds.items()}
    distillers = {
        name: Distiller(student, model, [Tap(setup.tap, setup.tap, losses[name], name="kd")], teacher_output=whole)
        for name, (_, model, whole) in kinds.items()
    }
    parameters = [p for p in student.parameters() if p.requires_grad]

    def finish(loss: Tensor) -> None:
        for p in parameters:
            p.grad = None
        loss.backward()

    def distilled(distiller: Distiller) -> Callable[[], None]:
        def step() -> None:
            output, features = distiller(*setup.inputs)
            finish(setup.task_loss(output) + features["kd"])

        return step

    steps: dict[str, Callable[[], Any]] = {"none": lambda: finish(setup.task_loss(student(*setup.inputs)))}
    return steps | {name: distilled(distiller) for name, distiller in distillers.items()}, distillers, losses


def teacher_alone(distiller: Distiller, inputs: Sequence[Any]) -> Callable[[], None]:
    """The teacher's part of a step."""

    def part() -> None:
        handle = distiller.student.register_forward_pre_hook(_stop)
        try:
            distiller(*inputs)
        except _Stop:
            pass
        finally:
            handle.remove()

    return part


def measure(setup: Setup, device: str, seconds: float) -> list[dict[str, Any]]:
    """Rows: each kind's step, its parts measured by themselves, and its memory."""
    steps, distillers, losses = build(setup, device)
    for name, step in steps.items():
        print(f"  {name}: first step {time_once(step) / 1e3:.1f} s", flush=True)
    calls = {(name, "step"): step for name, step in steps.items()}
    calls |= {(name, "teacher"): teacher_alone(d, setup.inputs) for name, d in distillers.items() if name != PUBLISHED}
    calls |= {(name, "loss"): loss.alone() for name, loss in losses.items()}
    named = {" / ".join(key): (lambda call=call: time_once(call)) for key, call in calls.items()}
    # A step's spread is many times the loss's time: differences between steps want more than three runs.
    timings = interleaved(named, seconds, least_if_long=lambda name: 9 if name.endswith(" / step") else 3)

    def timing(name: str, part: str) -> Timing:
        return timings[f"{name} / {part}"]

    base = timing("none", "step").median_ms
    added = {name: timing(name, "step").median_ms - base for name in steps}
    rows = []
    for name in steps:
        row: dict[str, Any] = {"name": name, **dataclasses.asdict(timing(name, "step"))}
        if name != "none":
            row["share"] = added[name] / row["median_ms"]
            row["added_ratio"] = added[name] / added[PUBLISHED]
            row["teacher_ms"] = timing(WHOLE if name == PUBLISHED else name, "teacher").median_ms
            row["loss_ms"] = timing(name, "loss").median_ms
        row["peak_mib"] = peak_extra_bytes(steps[name]) / 2**20
        rows.append(row)
        text = "".join(f"{row[key]:10.2f}" for key in ("share", "added_ratio", "teacher_ms", "loss_ms") if key in row)
        print(f"  {name:36s}{row['median_ms']:10.1f} ms{row['peak_mib']:8.0f} MiB{text}", flush=True)
    return rows


def main() -> None:
    """Measures and writes end_to_end.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="2; RetinaNet on a GPU also 16")
    parser.add_argument("--size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seconds", type=float, default=75, help="of each model's interleaved rounds")
    parser.add_argument("--json", type=Path, help="folder for results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    height, width = options.size or ((256, 320) if options.device == "cpu" else (800, 1344))
    models = []
    for name in options.models:
        for batch in options.batch or ([2, 16] if options.device == "cuda" and name == "retinanet" else [2]):
            torch.manual_seed(0)
            setup = SETUPS[name](options.device, batch, height, width)
            title = f"{setup.title}, batch {batch}, {height}x{width}"
            rows = measure(setup, options.device, options.seconds)
            models.append({"model": name, "batch": batch, "title": title, "rows": rows})
            if name == "retinanet" and options.device == "cpu":
                ratios = {row["name"]: row["added_ratio"] for row in rows if "added_ratio" in row}
                for kind, goal in GOALS:
                    print(
                        f"goal, {kind}: added over what the published formula adds {ratios[kind]:.2f}, at most {goal}"
                    )
    if options.json:
        content = {"machine": machine(), "models": models}
        (device_folder(options.json, options.device) / "end_to_end.json").write_text(
            json.dumps(content, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
