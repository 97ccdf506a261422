"""Runs the stages and reports: the table, how long the losses take, the pictures."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels import backends, reference
from maskd_kernels.demo.models import CHANNELS, PyramidSegmenter
from maskd_kernels.demo.pictures import draw_curves, draw_mask_kinds, draw_predictions
from maskd_kernels.demo.stages import METHODS, Demo, Settings
from maskd_kernels.demo.training import mean_iou
from maskd_kernels.distill import plot_masks
from maskd_kernels.losses import AMDLoss, MasKDLoss, MGDLoss


def time_loss(demo: Demo, teacher: PyramidSegmenter, student: nn.Module, loss: MasKDLoss) -> dict[str, float]:
    """Milliseconds, forward and backward, of the fused loss and of the published formula on this demo's features."""
    scenes = demo.data["train"].scenes[: demo.settings.batch]
    with torch.no_grad():
        t = list(teacher.fpn(teacher.backbone(scenes)).values())
        assert isinstance(student, PyramidSegmenter)
        s = [level.requires_grad_() for level in student.fpn(student.backbone(scenes)).values()]
    modules: list[Any] = list(loss.mask_modules)

    def fused() -> Tensor:
        result: Tensor = loss(s, t)
        return result

    def published() -> Tensor:
        levels = zip(s, t, modules, strict=True)
        return torch.stack(
            [reference.published_maskd_loss(a, b, m.mask_token, m.weighting) for a, b, m in levels]
        ).sum()

    times: dict[str, list[float]] = {"fused": [], "published": []}
    for _ in range(25):
        for name, function in (("fused", fused), ("published", published)):
            if demo.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(function(), s)
            if demo.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Markdown."""
    head = ("model", "loss weight", "test mIoU, %", "against student alone")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * 4, *rows))


def statistics(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) if len(values) > 1 else 0.0


def mask_kinds(demo: Demo, teacher: PyramidSegmenter, scenes: Tensor) -> dict[str, Tensor]:
    """What each method masks on the teacher's finest level, ``[n, h, w]`` in 0..1."""
    with torch.no_grad():
        finest = teacher.fpn(teacher.backbone(scenes))["0"]
        maskd, mgd, amd = (demo.loss(method).to(demo.device) for method in ("maskd", "mgd", "amd"))
        assert isinstance(maskd, MasKDLoss)
        assert isinstance(mgd, MGDLoss)
        assert isinstance(amd, AMDLoss)
        tokens: Any = maskd.mask_modules[0]
        masks = tokens.forward_mask(finest)  # [n, K, h, w]
        generator = torch.Generator(demo.device).manual_seed(0)
        kept = torch.rand(finest[:, 0].shape, device=demo.device, generator=generator) <= 1 - mgd.lambda_mgd
        return {
            **{f"MasKD: token {k + 1}": masks[:, k] for k in range(masks.shape[1])},
            "MasKD: mean of tokens": masks.mean(1),
            "MGD: random": kept,
            "AMD: salient masked": amd.keep(amd.attention(finest)),
        }


def chosen_weight(trials: dict[float, dict[str, Any]]) -> float:
    """The loss weight whose student does best on the validation scenes."""
    return max(trials, key=lambda weight: float(trials[weight]["validation"]))


def run(out: Path, settings: Settings | None = None) -> dict[str, Any]:
    """The whole demo; prints its table and writes ``results.json``, ``results.md`` and the PNGs under ``out``."""
    settings = settings or Settings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = backends.resolve(device, torch.float32)
    print(f"device {device}, kernels {backend}, results in {out}")
    start = time.perf_counter()
    demo = Demo(out, settings, device)
    teacher = demo.teacher()
    demo.tokens(teacher)

    students = {"alone": [demo.student(teacher, "alone", 0.0, seed) for seed in settings.seeds]}
    trials, weights = {}, {}
    for method in METHODS:
        trials[method] = {
            w: demo.student(teacher, method, w, settings.seeds[0], trial=True) for w in settings.loss_weights
        }
        weights[method] = chosen_weight(trials[method])
        students[method] = [demo.student(teacher, method, weights[method], seed) for seed in settings.seeds]

    names = {"alone": "student alone", **METHODS}
    iou = {"teacher": [mean_iou(teacher, demo.data["test"])]}
    for method, results in students.items():
        iou[names[method]] = [mean_iou(demo.loaded(r), demo.data["test"]) for r in results]
    base, _ = statistics(iou["student alone"])
    shown = {name: f"{weights[method]:g}" for method, name in METHODS.items()}
    rows = []
    for name, values in iou.items():
        mean, deviation = statistics(values)
        spread = f" ± {deviation:.2f}" if len(values) > 1 else ""
        rows.append(
            (name, shown.get(name, ""), f"{mean:.2f}{spread}", f"{mean - base:+.2f}" * (name != "student alone"))
        )
    maskd = demo.loss("maskd").to(device)
    assert isinstance(maskd, MasKDLoss)
    loss_ms = time_loss(demo, teacher, demo.loaded(students["maskd"][0]), maskd)
    minutes = (time.perf_counter() - start) / 60

    shapes = f"batch {settings.batch}, {CHANNELS} channels, 16x16, 8x8 and 4x4 pixels"
    text = "\n".join(
        [
            table(rows),
            "",
            f"Mean and standard deviation over {len(settings.seeds)} seeds; students start with the teacher's head.",
            f"Loss weights chosen on validation scenes from {', '.join(f'{w:g}' for w in settings.loss_weights)}, by "
            f"one run of {settings.trial_steps} steps each; final runs have {settings.student_steps}.",
            "Nothing augments the scenes, so the teacher's features are computed once per scene, by a prepared copy.",
            f"The MasKD loss, forward and backward ({shapes}): {loss_ms['fused']:.2f} ms fused ({backend}), "
            f"{loss_ms['published']:.2f} ms as published: {loss_ms['published'] / loss_ms['fused']:.1f} times.",
        ]
    )
    draw(demo, teacher, students, maskd)
    summary = {
        "settings": dataclasses.asdict(settings),
        "device": str(device),
        "backend": backend,
        "test_miou": iou,
        "validation_miou": {
            "teacher": demo.stage("teacher", dict)["validation"],
            "by loss weight": {m: {f"{w:g}": r["validation"] for w, r in t.items()} for m, t in trials.items()},
        },
        "loss_weights": weights,
        "loss_ms": loss_ms,
    }
    (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "results.md").write_text(text + "\n")
    print(f"\n{text}\n\n{minutes:.1f} minutes; pictures and results.json in {out}")
    return summary


def draw(demo: Demo, teacher: PyramidSegmenter, students: dict[str, list[dict[str, Any]]], maskd: MasKDLoss) -> None:
    """All pictures, of the first seed's students."""
    out, scenes = demo.out, demo.data["test"].scenes[:3]
    modules: list[Any] = list(maskd.mask_modules)
    with torch.no_grad():
        finest = teacher.fpn(teacher.backbone(scenes))["0"]
        for i, masks in enumerate(modules[0].forward_mask(finest)):
            title = "receptive tokens on the teacher's stride-4 level"
            plot_masks(scenes[i] + 0.5, masks, out / f"masks_{i}.png", title=title)
    draw_mask_kinds(scenes, mask_kinds(demo, teacher, scenes), out / "mask_kinds.png")
    names = {"alone": "student alone", **METHODS}
    models = {names[method]: demo.loaded(results[0]) for method, results in students.items()}
    draw_predictions(demo.data["test"], {"teacher": teacher, **models}, out / "predictions.png")
    draw_curves({names[method]: results[0]["curve"] for method, results in students.items()}, out / "curves.png")
