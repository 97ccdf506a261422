"""What the study's runs show: paired differences, what the masks look like, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import torch
from detection_data import Boxes
from torch import Tensor, nn

from maskd_kernels import MasKDLoss, TokenTrainer, dice_diversity

NAMES = {
    "none": "student alone",
    "mse": "feature MSE",
    "maskd": "MasKD",
    "maskd_weighted": "MasKD, weighted masks",
    "mgd": "MGD",
    "amd": "AMD",
}


def paired(method: list[float], other: list[float]) -> dict[str, float]:
    """Mean of the paired differences with its 95 % intervals over the seeds: ``low`` and ``high`` by bootstrap,
    ``t_low`` and ``t_high`` by Student's t, which does not take the spread of a few seeds for that of all."""
    import numpy as np
    from scipy.stats import bootstrap, ttest_1samp

    differences = np.asarray(method) - np.asarray(other)
    interval = bootstrap((differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    values = [differences.mean(), *interval.confidence_interval, *ttest_1samp(differences, 0).confidence_interval()]
    return dict(zip(("mean", "low", "high", "t_low", "t_high"), map(float, values), strict=True))


def inside_boxes(target: dict[str, Tensor], size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Which pixels of a level ``[h, w]`` have their centre in a box, of a picture of ``size``."""
    inside = torch.zeros(shape, dtype=torch.bool)
    ys, xs = ((torch.arange(n) + 0.5) * extent / n for n, extent in zip(shape, size, strict=True))
    for left, top, right, bottom in target["boxes"].tolist():
        inside |= ((ys >= top) & (ys < bottom))[:, None] & ((xs >= left) & (xs < right))[None]
    return inside


def pyramid(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The features ``[1, C, h, w]`` of a detector for one picture, finest first."""
    with torch.no_grad():
        return list(model.backbone(model.transform([image])[0].tensors).values())


@torch.no_grad()
def measure(
    teacher: nn.Module, student: nn.Module, loss: MasKDLoss, data: Boxes, count: int = 200
) -> list[dict[str, Any]]:
    """What the masks look like, level by level, on the first pictures of ``data``.

    Returns:
        For each level the mean of the masks on objects and on background, of each token and of all as the loss combines
        them; the mean Dice coefficient between tokens; the background's share of the pixels, of the squared error
        between student and teacher, and of that error as the loss weighs it; how many times more a pixel on an object
        weighs in the loss than one on background (in a plain squared error: once); and the cosine between the loss's
        gradient of the student's features and that of the plain squared error (1: the masks change its size alone).
    """
    levels = []
    for level, module in enumerate(loss.mask_modules):
        inside, masks, combined, weight, error = [], [], [], [], []
        dice: list[float] = []
        cosine: list[float] = []
        for i in range(min(count, len(data))):
            image, target = data[i]
            t, s = (pyramid(model, image)[level] for model in (teacher, student))
            m = module.forward_mask(t)[0]  # [K, h, w]
            weights = torch.full((len(m),), 1 / len(m))
            if loss.weight_mask:
                weights = module.forward_prob(t).flatten()
            inside.append(inside_boxes(target, image.shape[1:], t.shape[2:]).flatten())
            masks.append(m.flatten(1))
            combined.append((weights[:, None, None] * m).sum(0).flatten())
            share = weights / m.sum((1, 2)).clamp_min(torch.finfo(m.dtype).tiny)  # each mask's mass is divided by
            pixel = (share[:, None, None] * m.square()).sum(0)
            weight.append(pixel.flatten())
            error.append(((s - t)[0].square().sum(0) * torch.stack([torch.ones_like(pixel), pixel])).flatten(1))
            dice.append(float(dice_diversity(m[None])))
            cosine.append(float(torch.cosine_similarity((s - t).flatten(), (pixel * (s - t)).flatten(), dim=0)))
        on, mask, both, wrong = torch.cat(inside), torch.cat(masks, 1), torch.cat(combined), torch.cat(error, 1)
        pixels = torch.cat(weight)
        background = wrong[:, ~on].sum(1) / wrong.sum(1)
        levels.append(
            {
                "tokens_objects": mask[:, on].mean(1).tolist(),
                "tokens_background": mask[:, ~on].mean(1).tolist(),
                "objects": float(both[on].mean()),
                "background": float(both[~on].mean()),
                "dice": sum(dice) / len(dice),
                "background_pixels": float((~on).float().mean()),
                "background_error": float(background[0]),
                "background_masked_error": float(background[1]),
                "emphasis": float(pixels[on].mean() / pixels[~on].mean()),
                "cosine": sum(cosine) / len(cosine),
            }
        )
    return levels


@torch.no_grad()
def token_quality(teacher: nn.Module, checkpoint: Path, data: Boxes, count: int = 200) -> dict[str, Any]:
    """How good the tokens of a ``tokens`` command are.

    Returns:
        What it reported, epoch by epoch; and on the first pictures of ``data`` the teacher's task loss as it is, under
        these tokens, and under tokens that have learned nothing.
    """
    state = common.load(checkpoint)
    settings = state["settings"]
    channels = [settings["architecture"]["channels"]] * settings["architecture"]["levels"]
    losses: dict[str, float] = {}
    for name in ("untrained", "learned", "teacher"):
        with TokenTrainer(
            teacher,
            "backbone",
            channels,
            num_tokens=settings["tokens_per_level"],
            weight_mask=settings["weight_mask"],
            teacher_training=True,
        ) as trainer:
            if name == "learned":
                trainer.load_state_dict(state["model"])
            total = 0.0
            for i in range(min(count, len(data))):
                image, target = data[i]
                output, _ = trainer([image], [target])
                if name == "teacher":  # in the mode that the trainer has set
                    output = teacher([image], [target])
                total += float(sum(output.values()))
            losses[name] = total / min(count, len(data))
    teacher.eval()
    return {"epochs": state["history"], "task_loss": losses}


def draw_differences(summary: dict[str, Any], path: Path) -> None:
    """A PNG of the paired differences with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, base in zip(figure.subplots(1, 2), ("none", "mse"), strict=True):
        rows = {variant: row for variant, row in summary["differences"][base].items() if variant != "none"}
        for y, (variant, row) in enumerate(rows.items()):
            axis.plot([row["low"], row["high"]], [y, y], color="tab:blue")
            axis.plot(row["mean"], y, "o", color="tab:blue")
            per_seed = [a - b for a, b in zip(summary["test"][variant], summary["test"][base], strict=True)]
            axis.plot(per_seed, [y + 0.18] * len(per_seed), "|", color="tab:grey")
        axis.set_yticks(range(len(rows)), [NAMES[variant] for variant in rows])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"test mAP against {NAMES[base]}", fontsize="medium")
        axis.invert_yaxis()
    figure.supxlabel("mean, 95 % interval; grey: single seeds", fontsize="medium")
    figure.savefig(path, dpi=140, format="png")


def scores(summary: dict[str, Any]) -> str:
    """A Markdown table: test mAP of each variant, and its paired differences."""
    seeds = len(summary["test"]["none"])
    columns = ("mAP50", "mAP small", "mAP medium")
    teacher = " | ".join(f"{summary['teacher'][key]:.1f}" for key in ("mAP", *columns))
    lines = [
        f"| model | loss weight | test mAP, % ({seeds} seeds) | mAP50 | small | medium | against alone | against MSE |",
        "|---|---|---|---|---|---|---|---|",
        f"| teacher | | {teacher} | | |",
    ]
    for variant, values in summary["test"].items():
        details = summary["details"][variant]
        cells = [sum(values) / seeds, *(sum(d[key] for d in details) / seeds for key in columns)]
        against = []
        for base in ("none", "mse"):
            row = summary["differences"][base].get(variant)
            against.append(f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if row else "")
        weight = f"{summary['weights'][variant]:g}" if variant != "none" else ""
        lines.append("| " + " | ".join([NAMES[variant], weight, *(f"{cell:.1f}" for cell in cells), *against]) + " |")
    return "\n".join(lines) + "\n"


def document(summary: dict[str, Any]) -> str:
    """The results as Markdown."""
    wide = [
        f"{NAMES[variant]} against {NAMES[base]} [{row['t_low']:+.2f}, {row['t_high']:+.2f}]"
        for base in ("none", "mse")
        for variant, row in summary["differences"][base].items()
        if variant != "none"
    ]
    lines = [
        scores(summary),
        f"In brackets: 95 % bootstrap intervals. By Student's t: {'; '.join(wide)}.",
        "",
        "| method | validation mAP, %, by loss weight |",
        "|---|---|",
    ]
    for variant, tried in summary["trials"].items():
        lines.append(f"| {NAMES[variant]} | {', '.join(f'{weight}: {value:.1f}' for weight, value in tried.items())} |")
    lines += [
        "",
        "| tokens | mean mask, by epoch | Dice, by epoch | task loss: untrained, learned | without masks |",
        "|---|---|---|---|---|",
    ]
    levels = {variant: len(found) for variant, found in summary["masks"].items()}
    for variant, found in summary["tokens"].items():
        mean = ", ".join(f"{epoch['mean_mask']:.2f}" for epoch in found["epochs"])
        dice = ", ".join(f"{epoch['dice'] / levels[variant]:.2f}" for epoch in found["epochs"])
        loss = found["task_loss"]
        lines.append(
            f"| {NAMES[variant]} | {mean} | {dice} | {loss['untrained']:.3f}, {loss['learned']:.3f} "
            f"| {loss['teacher']:.3f} |"
        )
    lines += [
        "",
        "| masks | level | objects | background | single tokens: objects / background | Dice | error on background "
        "| the same in the loss | a pixel's weight, object to background | cosine to MSE's gradient |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, masks in summary["masks"].items():
        for number, level in enumerate(masks):
            pairs = zip(level["tokens_objects"], level["tokens_background"], strict=True)
            single = ", ".join(f"{on:.2f} / {off:.2f}" for on, off in pairs)
            shares = " | ".join(f"{100 * level[key]:.0f} %" for key in ("background_error", "background_masked_error"))
            means = f"{level['objects']:.2f} | {level['background']:.2f} | {single} | {level['dice']:.2f}"
            lines.append(
                f"| {NAMES[variant]} | {number} | {means} | {shares} | {level['emphasis']:.1f} "
                f"| {level['cosine']:.2f} |"
            )
    return "\n".join(lines) + "\n"
