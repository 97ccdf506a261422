"""Distils a detector: a teacher, its receptive tokens, a student by MasKD, MGD, AMD or feature MSE, and their mAP.

    python examples/detection.py teacher
    python examples/detection.py tokens
    python examples/detection.py distil --method maskd
    python examples/detection.py evaluate runs/detection/maskd/last.pth

On your own data: ``--data FOLDER``, in COCO's format or VOC's; then defaults are the papers'. Without it, a small
generated set. On several GPUs, or machines: ``torchrun --nproc-per-node=8 examples/detection.py ...``. An interrupted
command goes on with ``--resume``. Needs ``pip install "maskd-kernels[examples]"``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import torch
from detection_data import Boxes, collate
from detection_scores import draw_boxes, mean_average_precision
from detectors import BOX_REGRESSION, DETECTORS, build, inherit
from generated import write_digits
from remembered import Remembered
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from maskd_kernels import MGD_PRESETS, AMDLoss, Distiller, MasKDLoss, MGDLoss, Tap, TokenTrainer, plot_masks

METHODS = ("maskd", "mgd", "amd", "mse", "none")
# Loss weight and calls before masks are customised, as released; for MGD the preset.
BOX_WEIGHTS = {"retinanet": 1.0, "fcos": 0.0, "faster_rcnn": 1.0}
MASKD_RECIPES = {"retinanet": (7.0, 7000), "fcos": (10.0, 5000), "faster_rcnn": (1.0, 7330)}
MGD_RECIPES = {"retinanet": "detection_one_stage", "fcos": "detection_one_stage", "faster_rcnn": "detection_two_stage"}

# What is not given on the command line: for the generated set, and for everything else, after the papers.
SMALL = {
    "detector": "fcos",  # its heads are normalised: from scratch it learns several times as fast as RetinaNet
    "teacher_backbone": "resnet18",
    "student_backbone": "mobilenet_v3_small",
    "channels": 64,
    "levels": 2,
    "anchor": 8,
    "size": (96, 96),
    "frozen_norm": False,
    "flip": False,
    "optimizer": "adamw",
    "batch": 8,
    "lr": {"teacher": 2e-3, "tokens": 1e-3, "distil": 4e-3},
    "epochs": {"teacher": 10, "tokens": 2, "distil": 2},
    "milestones": {"teacher": (), "tokens": (), "distil": ()},
    "align": False,
    "weight_mask": False,
    "warmup": -1,
    "masked": 0.3,
    "salient": 1.5,
}
# Loss weights on the generated set: examples/study.py chose them on validation pictures.
SMALL_WEIGHTS = {"mse": 0.25, "maskd": 1.0, "mgd": 16.0, "amd": 4.0}
PAPERS = {
    "detector": "retinanet",
    "teacher_backbone": "resnet101",
    "student_backbone": "resnet50",
    "channels": 256,
    "levels": 5,
    "anchor": 32,
    "size": (800, 1333),
    "frozen_norm": True,
    "flip": True,
    "optimizer": "sgd",
    "batch": 16,
    "lr": {"teacher": 1e-2, "tokens": 1e-2, "distil": 1e-2},
    "epochs": {"teacher": 24, "tokens": 1, "distil": 24},
    "milestones": {"teacher": (16, 22), "tokens": (), "distil": (16, 22)},
    "align": True,
    "weight_mask": True,
    "salient": 1.0,
}


class FeatureMSE(nn.Module):
    """The control: every pixel alike, no mask."""

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The mean squared error of each level, summed."""
        return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


def box_loss(student: Tensor | list[Tensor], teacher: Tensor | list[Tensor]) -> Tensor:
    """Smooth L1 between regressed boxes: the papers distil them beside the features."""
    if isinstance(student, Tensor):
        return F.smooth_l1_loss(student, teacher)
    return torch.stack([F.smooth_l1_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


def distillation_loss(args: argparse.Namespace, architecture: dict[str, Any]) -> nn.Module:
    """The method's loss over the pyramid."""
    channels, detector = [architecture["channels"]] * architecture["levels"], architecture["detector"]
    if args.method == "mse":
        return FeatureMSE()
    if args.method == "mgd":
        own = {} if args.masked is None else {"lambda_mgd": args.masked}
        return MGDLoss(channels, channels, **{**MGD_PRESETS[MGD_RECIPES[detector]], **own})
    if args.method == "amd":
        return AMDLoss(channels, channels, threshold=args.salient)
    warmup = MASKD_RECIPES[detector][1] if args.warmup is None else args.warmup
    return MasKDLoss(
        channels,
        args.tokens_per_level,
        weight_mask=args.weight_mask,
        custom_mask=warmup >= 0,
        custom_mask_warmup=max(warmup, 0),
        pretrained=args.tokens,
    )


def make_loader(args: argparse.Namespace, data: Boxes) -> Any:
    """Batches for training."""
    sampler = common.EpochSampler(len(data), args.batch, args.seed)
    share = args.batch // common.world_size()
    return DataLoader(data, share, sampler=sampler, num_workers=args.workers, collate_fn=collate, drop_last=True)


def to(batch: Any, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch on the device."""
    images, targets = batch
    return [i.to(device) for i in images], [{k: v.to(device) for k, v in t.items()} for t in targets]


def load_detector(
    path: Path, device: torch.device, classes: list[str] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The detector of a checkpoint, in eval mode, and the settings that it was made with.

    Raises:
        ValueError: it was trained on other classes, or holds no model but tokens.
    """
    return common.load_model(build, path, device, classes)


def train_teacher(args: argparse.Namespace, device: torch.device) -> None:
    """``teacher``: trains the larger detector on its own."""
    data = Boxes(args.data, "train", args.flip)
    architecture = {
        "detector": args.detector,
        "classes": data.classes,
        "channels": args.channels,
        "levels": args.levels,
        "anchor": args.anchor,
        "size": tuple(args.size),
        "frozen_norm": args.frozen_norm and args.backbone_weights is not None,
    }
    model = build(architecture, args.teacher_backbone, args.backbone_weights).to(device).train()
    settings = {**common.decisive(args), "architecture": architecture, "backbone": args.teacher_backbone}
    loader = make_loader(args, data)
    optimizer, schedule = common.make_optimizer(args, list(model.parameters()), args.epochs * len(loader))
    trainer = common.Trainer(
        args.out, settings, model, optimizer, schedule, device=device, amp=args.amp, clip=args.clip
    )
    if args.resume:
        trainer.resume()
    wrapped = common.parallel(model, device)
    trainer.run(lambda batch: wrapped(*to(batch, device)), loader, args.epochs, "teacher")
    finish(args, trainer)


def train_tokens(args: argparse.Namespace, device: torch.device) -> None:
    """``tokens``: learns receptive tokens on the teacher's pyramid; reports mean mask, Dice and task loss."""
    data = Boxes(args.data, "train", args.flip)
    teacher, settings = load_detector(args.teacher, device, data.classes)
    architecture = settings["architecture"]
    features: list[Tensor] = []
    # Made before the trainer's own hook, this one sees the features before they are masked.
    teacher.backbone.register_forward_hook(lambda _m, _i, levels: features.extend(levels.values()))
    tokens = TokenTrainer(
        teacher,
        "backbone",
        [architecture["channels"]] * architecture["levels"],
        num_tokens=args.tokens_per_level,
        weight_mask=args.weight_mask,
        teacher_training=True,
    ).to(device)
    loader = make_loader(args, data)
    optimizer, schedule = common.make_token_optimizer(args, list(tokens.parameters()), args.epochs * len(loader))
    settings = {**common.decisive(args), "architecture": architecture}
    trainer = common.Trainer(
        args.out, settings, tokens, optimizer, schedule, device=device, amp=args.amp, clip=args.clip
    )
    if args.resume:
        trainer.resume()
    wrapped = common.parallel(tokens, device)

    def step(batch: Any) -> dict[str, Tensor]:
        features.clear()
        losses, dice = wrapped(*to(batch, device))
        with torch.no_grad():
            modules = zip(tokens.mask_modules, features, strict=True)
            mean = torch.stack([module.forward_mask(x).float().mean() for module, x in modules]).mean()
        return {**losses, "dice": dice, "_mean_mask": mean}

    trainer.run(step, loader, args.epochs, "tokens")
    if common.rank() == 0:
        tokens.save(args.out / "tokens.pth")
        features.clear()
        image = data[0][0].to(device)
        with torch.no_grad():
            teacher.eval()([image])
            for i, (module, x) in enumerate(zip(tokens.mask_modules, features, strict=True)):
                plot_masks(image, module.forward_mask(x)[0], args.out / f"masks_level_{i}.png")
    finish(args, trainer)


def distil(args: argparse.Namespace, device: torch.device) -> None:
    """``distil``: trains a student with one method, or alone."""
    data = Boxes(args.data, "train", args.flip)
    teacher, settings = load_detector(args.teacher, device, data.classes)
    architecture = settings["architecture"]
    student = build(architecture, args.student_backbone, args.backbone_weights).to(device).train()
    if args.inherit:
        inherit(student, teacher)
    taps = make_taps(args, architecture)
    module: nn.Module | None = None
    if taps:
        inputs = to(collate([data[0]]), device)
        if args.remember:
            if len(taps) > 1:
                raise ValueError("--remember: expected --box-weight 0, as pyramids alone are remembered")
            teacher = Remembered(teacher, data, args.teacher.with_name("pyramids.pth"), device)
        module = Distiller(student, teacher, taps, example_inputs=inputs).to(device).train()
        parameters = module.trainable_parameters()
    else:
        parameters = list(student.parameters())
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
        if not taps:
            return wrapped(*to(batch, device))
        task, distillation = wrapped(*to(batch, device))
        return {**task, **distillation}

    trainer.run(step, loader, args.epochs, args.method)
    finish(args, trainer)


def make_taps(args: argparse.Namespace, architecture: dict[str, Any]) -> list[Tap]:
    """What is compared: the pyramids, and the regressed boxes."""
    if args.method == "none":
        return []
    channels, levels = architecture["channels"], architecture["levels"]
    weight = args.weight
    if weight is None:
        weight = MASKD_RECIPES[architecture["detector"]][0] if args.method == "maskd" else 1.0
    aligns: Any = [nn.Conv2d(channels, channels, 1) for _ in range(levels)] if args.align else None
    loss = distillation_loss(args, architecture)
    taps = [Tap("backbone", "backbone", loss, align=aligns, name=args.method, weight=weight)]
    box_weight = BOX_WEIGHTS[architecture["detector"]] if args.box_weight is None else args.box_weight
    if box_weight:
        layer = BOX_REGRESSION[architecture["detector"]]
        taps.append(Tap(layer, layer, box_loss, align=None, name="boxes", weight=box_weight))
    return taps


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """``evaluate``: prints the mAP of a checkpoint and keeps it, with pictures, beside it."""
    data = Boxes(args.data, args.split)
    model, _ = load_detector(args.checkpoint, device, data.classes)
    result = mean_average_precision(model, data, device, args.batch, args.scale)
    if common.rank() == 0:
        path = args.checkpoint.parent / f"{args.split}.json"
        draw_boxes(model, data, device, path.with_suffix(".png"))
        path.write_text(json.dumps(result, indent=2) + "\n")
        print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))
    return result


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
        sub.add_argument("--data", type=Path, help="folder in COCO's format or VOC's (default: the generated set)")
        sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
        sub.add_argument("--batch", type=int, help="pictures per step, of all processes together")
        sub.add_argument("--runs", type=Path, default=Path("runs/detection"), help="where everything goes by default")
        if name == "evaluate":
            sub.add_argument("checkpoint", type=Path)
            sub.add_argument("--split", default="val")
            sub.add_argument("--scale", type=float, default=1.0, help="factor on the boxes for COCO's bounds of sizes")
            continue
        common.training_arguments(sub)
        if name == "teacher":
            sub.add_argument("--detector", choices=DETECTORS)
            sub.add_argument("--teacher-backbone")
            sub.add_argument("--channels", type=int, help="of the pyramid")
            sub.add_argument("--levels", type=int, help="of the pyramid")
            sub.add_argument("--anchor", type=int, help="pixels, at the finest level")
            sub.add_argument("--size", type=int, nargs=2, help="shorter side, and the most the longer may have")
            sub.add_argument("--frozen-norm", action=argparse.BooleanOptionalAction, help="with weights only")
        else:
            sub.add_argument("--teacher", type=Path, help="the teacher's checkpoint")
            sub.add_argument("--tokens-per-level", type=int, default=6)
            sub.add_argument("--weight-mask", action=argparse.BooleanOptionalAction, help="weight masks per picture")
        if name != "tokens":
            sub.add_argument("--backbone-weights", help="file of torchvision's ImageNet weights")
        if name == "distil":
            sub.add_argument("--method", choices=METHODS, required=True)
            sub.add_argument("--weight", type=float, help="of the feature loss (default: as released)")
            sub.add_argument(
                "--box-weight", type=float, help="of the regressed boxes' loss (default: as released); 0: none"
            )
            sub.add_argument("--tokens", type=Path, help="file of the learned tokens")
            sub.add_argument(
                "--warmup", type=int, help="steps before masks are customised (default: as released); -1: never"
            )
            sub.add_argument("--masked", type=float, help="MGD: share of the pixels (default: as released)")
            sub.add_argument(
                "--salient", type=float, default=1.0, help="AMD: attention from which on pixels are masked"
            )
            sub.add_argument("--student-backbone")
            sub.add_argument("--align", action=argparse.BooleanOptionalAction, help="a 1x1 convolution per level")
            sub.add_argument(
                "--remember", action="store_true", help="the teacher's pyramids are computed once; nothing may mirror"
            )
            sub.add_argument("--inherit", action=argparse.BooleanOptionalAction, default=True, help="neck and head")
    return main


def main(argv: list[str] | None = None) -> Any:
    """Runs a command."""
    args = parser().parse_args(argv)
    common.fill(args, PAPERS if args.data else SMALL)
    if args.data is None:
        args.data = write_digits(args.runs / "digits")
        if args.command == "distil" and args.weight is None:
            args.weight = SMALL_WEIGHTS.get(args.method)
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
