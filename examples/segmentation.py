"""Distils a segmenter: a teacher, its receptive tokens, a student by MasKD, MGD, AMD or feature MSE, and their mIoU.

    python examples/segmentation.py teacher
    python examples/segmentation.py tokens
    python examples/segmentation.py distil --method maskd
    python examples/segmentation.py evaluate runs/segmentation/maskd/last.pth

MasKD compares logits under unweighted masks, as its authors do; their Cityscapes tokens load by ``--tokens``. On your
own data: ``--data FOLDER``, Cityscapes or VOC; without it, a small generated set. On several GPUs, or machines:
``torchrun --nproc-per-node=8 examples/segmentation.py ...``. An interrupted command goes on with ``--resume``. Needs
``pip install "maskd-kernels[examples]"``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import common
import torch
from generated import write_digits
from segmentation_data import IGNORED, LabelMaps
from segmenters import SEGMENTERS, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from maskd_kernels import MGD_PRESETS, AMDLoss, Distiller, MasKDSegLoss, MGDLoss, Tap, TokenTrainer, plot_masks

METHODS = ("maskd", "mgd", "amd", "mse", "none")

# What is not given on the command line: for the generated set, and for everything else, after the papers.
SMALL = {
    "teacher_backbone": "resnet18",
    "student_backbone": "mobilenet_v3_small",
    "crop": (96, 96),
    "scales": (1.0, 1.0),
    "flip": False,
    "optimizer": "adamw",
    "batch": 8,
    "lr": {"teacher": 2e-3, "tokens": 1e-2, "distil": 2e-3},
    "epochs": {"teacher": 5, "tokens": 1, "distil": 2},
    "milestones": {},
}
PAPERS = {
    "teacher_backbone": "resnet101",
    "student_backbone": "resnet18",
    "crop": (512, 1024),
    "scales": (0.5, 2.0),
    "flip": True,
    "optimizer": "sgd",
    "batch": 16,
    "lr": {"teacher": 1e-2, "tokens": 1e-1, "distil": 1e-2},
    "epochs": {"teacher": 215, "tokens": 54, "distil": 215},  # 40,000 and, for tokens, 10,000 steps of Cityscapes
    "milestones": {},
}


def task_losses(output: tuple[Tensor, Tensor | None], labels: Tensor) -> dict[str, Tensor]:
    """Cross entropy, that of the auxiliary head times 0.4."""
    logits, auxiliary = output
    losses = {"segmentation": F.cross_entropy(logits, labels, ignore_index=IGNORED)}
    if auxiliary is not None:
        losses["auxiliary"] = 0.4 * F.cross_entropy(auxiliary, labels, ignore_index=IGNORED)
    return losses


def make_loader(args: argparse.Namespace, data: LabelMaps) -> Any:
    """Batches for training."""
    sampler = common.EpochSampler(len(data), args.batch, args.seed)
    return DataLoader(data, args.batch // common.world_size(), sampler=sampler, num_workers=args.workers)


def load_segmenter(
    path: Path, device: torch.device, classes: list[str] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The segmenter of a checkpoint, in eval mode, and the settings that it was made with.

    Raises:
        ValueError: it was trained on other classes, or holds no model but tokens.
    """
    return common.load_model(build, path, device, classes)


def train_data(args: argparse.Namespace) -> LabelMaps:
    """What is trained on."""
    return LabelMaps(args.data, "train", tuple(args.crop), tuple(args.scales), args.flip)


def train_teacher(args: argparse.Namespace, device: torch.device) -> None:
    """``teacher``: trains the larger segmenter on its own."""
    data = train_data(args)
    architecture = {"segmenter": args.segmenter, "classes": data.classes, "frozen_norm": args.frozen_norm}
    model = build(architecture, args.teacher_backbone, args.backbone_weights).to(device).train()
    loader = make_loader(args, data)
    optimizer, schedule = common.make_optimizer(args, list(model.parameters()), args.epochs * len(loader))
    settings = {**common.decisive(args), "architecture": architecture, "backbone": args.teacher_backbone}
    trainer = common.Trainer(
        args.out, settings, model, optimizer, schedule, device=device, amp=args.amp, clip=args.clip
    )
    if args.resume:
        trainer.resume()
    wrapped = common.parallel(model, device)
    trainer.run(
        lambda batch: task_losses(wrapped(batch[0].to(device)), batch[1].to(device)), loader, args.epochs, "teacher"
    )
    finish(args, trainer)


def train_tokens(args: argparse.Namespace, device: torch.device) -> None:
    """``tokens``: learns receptive tokens on the teacher's logits; reports mean mask, Dice and task loss."""
    data = train_data(args)
    teacher, settings = load_segmenter(args.teacher, device, data.classes)
    architecture = settings["architecture"]
    logits: list[Tensor] = []
    # Made before the trainer's own hook, this one sees the logits before they are masked.
    teacher.get_submodule("logits").register_forward_hook(lambda _m, _i, x: logits.append(x))
    tokens = TokenTrainer(teacher, "logits", len(data.classes), num_tokens=args.tokens_per_level, weight_mask=False).to(
        device
    )
    loader = make_loader(args, data)
    optimizer, schedule = common.make_token_optimizer(args, list(tokens.parameters()), args.epochs * len(loader))
    settings = {**common.decisive(args), "architecture": architecture}
    trainer = common.Trainer(
        args.out, settings, tokens, optimizer, schedule, device=device, amp=args.amp, clip=args.clip
    )
    if args.resume:
        trainer.resume()
    wrapped = common.parallel(tokens, device)
    module: Any = tokens.mask_modules[0]

    def step(batch: Any) -> dict[str, Tensor]:
        logits.clear()
        output, dice = wrapped(batch[0].to(device))
        with torch.no_grad():
            mean = module.forward_mask(logits[0]).float().mean()
        return {**task_losses(output, batch[1].to(device)), "dice": dice, "_mean_mask": mean}

    trainer.run(step, loader, args.epochs, "tokens")
    if common.rank() == 0:
        tokens.save(args.out / "tokens.pth")
        logits.clear()
        image = data[0][0].to(device)
        with torch.no_grad():
            teacher.eval()(image[None])
            plot_masks(image, module.forward_mask(logits[0])[0], args.out / "masks.png")
    finish(args, trainer)


class FeatureMSE(nn.Module):
    """The control: every pixel alike, no mask."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Half of the mean squared error."""
        return 0.5 * F.mse_loss(student, teacher)


def make_tap(args: argparse.Namespace, classes: int, student: int, teacher: int) -> Tap:
    """What is compared: logits (MasKD and its control) or the backbones' last features (MGD, AMD)."""
    if args.method in ("maskd", "mse"):
        loss = FeatureMSE() if args.method == "mse" else MasKDSegLoss(classes, args.tokens_per_level, args.tokens)
        return Tap("logits", "logits", loss, align=None, name=args.method, weight=args.weight)
    loss = (
        MGDLoss(student, teacher, **MGD_PRESETS["segmentation"]) if args.method == "mgd" else AMDLoss(student, teacher)
    )
    return Tap("features", "features", loss, align=None, name=args.method, weight=args.weight)


def distil(args: argparse.Namespace, device: torch.device) -> None:
    """``distil``: trains a student with one method, or alone."""
    data = train_data(args)
    teacher, settings = load_segmenter(args.teacher, device, data.classes)
    architecture = settings["architecture"]
    student = build(architecture, args.student_backbone, args.backbone_weights).to(device).train()
    module: nn.Module | None = None
    parameters = list(student.parameters())
    if args.method != "none":
        widths = []
        for model in (student, teacher):
            shown: list[Tensor] = []
            handle = model.get_submodule("features").register_forward_hook(lambda _m, _i, x, s=shown: s.append(x))
            with torch.no_grad():
                training = model.training
                model.eval()(torch.zeros(1, 3, *args.crop, device=device))
                model.train(training)
            handle.remove()
            widths.append(shown[0].shape[1])
        module = Distiller(student, teacher, [make_tap(args, len(data.classes), *widths)]).to(device).train()
        parameters = module.trainable_parameters()
    loader = make_loader(args, data)
    optimizer, schedule = common.make_optimizer(args, parameters, args.epochs * len(loader))
    settings = {**common.decisive(args), "architecture": architecture, "backbone": args.student_backbone}
    trainer = common.Trainer(
        args.out, settings, student, optimizer, schedule, module=module, device=device, amp=args.amp, clip=args.clip
    )
    if args.resume:
        trainer.resume()
    wrapped = common.parallel(module or student, device)

    def step(batch: Any) -> dict[str, Tensor]:
        images, labels = batch[0].to(device), batch[1].to(device)
        if module is None:
            return task_losses(wrapped(images), labels)
        output, distillation = wrapped(images)
        return {**task_losses(output, labels), **distillation}

    trainer.run(step, loader, args.epochs, args.method)
    finish(args, trainer)


@torch.no_grad()
def mean_iou(model: nn.Module, data: LabelMaps, device: torch.device) -> dict[str, float]:
    """Intersection over union, in percent: the mean over the classes and each class's; of all processes together.

    Classes that neither the labels nor the model have anywhere are left out.
    """
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(
        len(data.classes), average="none", ignore_index=IGNORED, zero_division=float("nan")
    ).to(device)
    model.eval()
    for i in range(common.rank(), len(data), common.world_size()):
        image, labels = data[i]
        metric.update(model(image[None].to(device))[0].argmax(1), labels[None].to(device))
    values = zip(data.classes, (100 * metric.compute()).tolist(), strict=True)
    seen = {name: value for name, value in values if not math.isnan(value)}
    return {"mIoU": sum(seen.values()) / len(seen), **seen}


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """``evaluate``: prints the mIoU of a checkpoint and keeps it, with pictures, beside it."""
    data = LabelMaps(args.data, args.split)
    model, _ = load_segmenter(args.checkpoint, device, data.classes)
    result = mean_iou(model, data, device)
    if common.rank() == 0:
        path = args.checkpoint.parent / f"{args.split}.json"
        draw_labels(model, data, device, path.with_suffix(".png"))
        path.write_text(json.dumps(result, indent=2) + "\n")
        print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))
    return result


@torch.no_grad()
def draw_labels(model: nn.Module, data: LabelMaps, device: torch.device, path: Path, count: int = 4) -> None:
    """A PNG of pictures, their label maps, and what the model says."""
    from matplotlib.figure import Figure

    count = min(count, len(data))
    figure = Figure(figsize=(2.2 * count, 6), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    for i in range(count):
        image, labels = data[i]
        said = model(image[None].to(device))[0].argmax(1)[0].cpu()
        axes[0, i].imshow(data.shown(image))
        for row, values in ((1, labels.masked_fill(labels == IGNORED, 0)), (2, said)):
            axes[row, i].imshow(values, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
    for axis, name in zip(axes[:, 0], ("picture", "labels", "predicted"), strict=True):
        axis.set_ylabel(name)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110, format="png")


def finish(args: argparse.Namespace, trainer: common.Trainer) -> None:
    """The curves."""
    if common.rank() == 0:
        common.draw_curves(trainer.history, args.out / "curves.png")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    functions = {"teacher": train_teacher, "tokens": train_tokens, "distil": distil, "evaluate": evaluate}
    for name, function in functions.items():
        sub = commands.add_parser(name, help=function.__doc__)
        sub.set_defaults(run=function)
        sub.add_argument("--data", type=Path, help="folder of Cityscapes or VOC (default: the generated set)")
        sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
        sub.add_argument(
            "--runs", type=Path, default=Path("runs/segmentation"), help="where everything goes by default"
        )
        if name == "evaluate":
            sub.add_argument("checkpoint", type=Path)
            sub.add_argument("--split", default="val")
            continue
        common.training_arguments(sub)
        sub.add_argument("--batch", type=int, help="pictures per step, of all processes together")
        sub.add_argument("--crop", type=int, nargs=2, help="height and width")
        sub.add_argument("--scales", type=float, nargs=2, help="of the pictures before cropping, from and to")
        if name == "teacher":
            sub.add_argument("--segmenter", choices=SEGMENTERS, default="deeplabv3")
            sub.add_argument("--teacher-backbone")
            sub.add_argument("--frozen-norm", action="store_true", help="batch norm of the backbone stays as loaded")
        else:
            sub.add_argument("--teacher", type=Path, help="the teacher's checkpoint")
            sub.add_argument("--tokens-per-level", type=int, default=8)
        if name != "tokens":
            sub.add_argument("--backbone-weights", help="file of torchvision's ImageNet weights")
        if name == "distil":
            sub.add_argument("--method", choices=METHODS, required=True)
            sub.add_argument("--weight", type=float, default=1.0, help="of the method's loss")
            sub.add_argument("--tokens", type=Path, help="file of the learned tokens")
            sub.add_argument("--student-backbone")
    return main


def main(argv: list[str] | None = None) -> Any:
    """Runs a command."""
    args = parser().parse_args(argv)
    common.fill(args, PAPERS if args.data else SMALL)
    if args.data is None:
        args.data = write_digits(args.runs / "digits")
    if args.command in ("tokens", "distil"):
        args.teacher = args.teacher or args.runs / "teacher" / "last.pth"
    if args.command == "distil":
        args.tokens = args.tokens or args.runs / "tokens" / "tokens.pth"
    if args.command != "evaluate":
        args.out = args.out or args.runs / (args.method if args.command == "distil" else args.command)
    device = common.start(args.device)
    torch.manual_seed(args.seed if args.command != "evaluate" else 0)
    return args.run(args, device)


if __name__ == "__main__":
    try:
        main()
    finally:
        common.stop()
