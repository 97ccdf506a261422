"""The papers' claim on a small scale: what do masks add to distilling a detector?

    python examples/study.py

One teacher, its tokens (weighted and not), students by every method and alone. Every loss weight is chosen by the mAP
on validation pictures, with a seed that is used for nothing else; test pictures are looked at by the students of the
chosen weights alone. Students of one seed start from the same parameters and see the same batches whatever the method,
so that differences are taken in pairs. Each run has a folder under ``--runs`` and is a command of ``detection.py`` that
can be repeated by hand; what is finished there is not done again. Writes ``results.json``, ``results.md``, pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import detection
import torch
from detection_data import Boxes
from torch import Tensor, nn

from maskd_kernels import MasKDLoss, dice_diversity, plot_masks

HERE = Path(__file__).parent
TRIAL_SEED = 1000  # chooses loss weights, and nothing else
SCALE = 2.0  # of the boxes, for COCO's sizes: small is below 16 pixels, medium from there on
STEP = 4.0  # between the loss weights that are tried
MOST_TRIALS = 5

VARIANTS: dict[str, tuple[str, list[str], float]] = {
    # what it is called, how detection.py is told, the first loss weight tried (and one STEP to either side of it)
    "mse": ("feature MSE", ["--method", "mse"], 0.25),
    "maskd": ("MasKD", ["--method", "maskd", "--no-weight-mask", "--warmup", "-1"], 0.25),
    "maskd_weighted": ("MasKD, weighted masks", ["--method", "maskd", "--warmup", "-1"], 0.25),
    "mgd": ("MGD", ["--method", "mgd", "--masked", "0.3"], 1.0),
    "amd": ("AMD", ["--method", "amd", "--salient", "1.5"], 1.0),
}
NAMES = {"none": "student alone", **{key: name for key, (name, _, _) in VARIANTS.items()}}


def command(arguments: list[str], log: Path, threads: int) -> None:
    """A command of detection.py, in this process; its output goes to the end of ``log``."""
    torch.set_num_threads(threads)
    with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print("detection.py", *arguments)
        detection.main(arguments)


class Study:
    """The runs, each in a folder of its own under ``runs``; commands run in ``jobs`` processes."""

    def __init__(self, runs: Path, epochs: int, jobs: int, device: str | None) -> None:
        self.runs, self.epochs, self.jobs = runs, epochs, jobs
        self.device = ["--device", device] if device else []
        self.threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        self.side = 1  # commands under way side by side
        self.processes = ProcessPoolExecutor(jobs, get_context("spawn"))

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.shutdown(cancel_futures=True)

    def call(self, *arguments: str) -> None:
        """A command of detection.py; its output is kept in ``runs/log.txt``."""
        line = [arguments[0], "--runs", str(self.runs), *self.device, *arguments[1:]]
        threads = max(self.threads // self.side, 1)
        self.processes.submit(command, line, self.runs / "log.txt", threads).result()

    def trained(self, out: Path, *arguments: str) -> Path:
        """The checkpoint of a training command, finished or gone on with where it is not."""
        marker = out / "curves.png"
        if not marker.exists():
            resume = ["--resume"] if (out / "last.pth").exists() else []
            self.call(*arguments, "--out", str(out), *resume)
        return out / "last.pth"

    def scored(self, checkpoint: Path, split: str) -> dict[str, float]:
        """The mAP of a checkpoint."""
        path = checkpoint.with_name(f"{split}.json")
        if not path.exists():
            self.call("evaluate", str(checkpoint), "--split", split, "--scale", str(SCALE))
        return json.loads(path.read_text())

    def tokens(self, weighted: bool) -> Path:
        """The file of learned tokens."""
        out = self.runs / f"tokens{'_weighted' * weighted}"
        self.trained(out, "tokens", *([] if weighted else ["--no-weight-mask"]))
        return out / "tokens.pth"

    def student(self, variant: str, weight: float, seed: int) -> Path:
        """A student's checkpoint."""
        arguments = ["--method", "none"]
        if variant != "none":
            arguments = [*VARIANTS[variant][1], "--weight", f"{weight:g}", "--remember"]
        if variant.startswith("maskd"):
            arguments += ["--tokens", str(self.tokens(variant == "maskd_weighted"))]
        arguments += ["--epochs", str(self.epochs), "--seed", str(seed)]
        return self.trained(self.runs / f"{variant}-{weight:g}-{seed}", "distil", *arguments)

    def side_by_side(self, tasks: list[Any]) -> list[Any]:
        """Calls them, as many at a time as there are jobs."""
        self.side = min(self.jobs, len(tasks))
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                return [future.result() for future in [pool.submit(task) for task in tasks]]
        finally:
            self.side = 1

    def trials(self) -> dict[str, dict[float, float]]:
        """Each variant's validation mAP by loss weight; others are tried while the best is at an end of those tried."""
        found: dict[str, dict[float, float]] = {variant: {} for variant in VARIANTS}
        due = [(variant, first * step) for variant, (_, _, first) in VARIANTS.items() for step in (1 / STEP, 1, STEP)]

        def trial(variant: str, weight: float) -> float:
            return self.scored(self.student(variant, weight, TRIAL_SEED), "val")["mAP"]

        while due:
            values = self.side_by_side([lambda v=variant, w=weight: trial(v, w) for variant, weight in due])
            for (variant, weight), value in zip(due, values, strict=True):
                found[variant][weight] = value
            due = []
            for variant, tried in found.items():
                found[variant] = tried = dict(sorted(tried.items()))
                best, least, most = max(tried, key=lambda w: tried[w]), min(tried), max(tried)
                if len(tried) < MOST_TRIALS and best in (least, most):
                    due.append((variant, least / STEP if best == least else most * STEP))
                print(f"{NAMES[variant]}: {', '.join(f'{w:g}: {m:.2f}' for w, m in tried.items())}", flush=True)
        return found


def paired(method: list[float], other: list[float]) -> dict[str, float]:
    """Mean of the paired differences and its 95 % bootstrap interval over the seeds."""
    import numpy as np
    from scipy.stats import bootstrap

    differences = np.asarray(method) - np.asarray(other)
    interval = bootstrap((differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    low, high = interval.confidence_interval
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}


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
        them; the mean Dice coefficient between tokens; and the background's share of the pixels, of the squared error
        between student and teacher, and of that error under the masks.
    """
    levels = []
    for level, module in enumerate(loss.mask_modules):
        inside, masks, combined, error = [], [], [], []
        dice: list[float] = []
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
            under = (weights[:, None, None] * m.square()).sum(0)
            error.append(((s - t)[0].square().sum(0) * torch.stack([torch.ones_like(under), under])).flatten(1))
            dice.append(float(dice_diversity(m[None])))
        on, mask, both, wrong = torch.cat(inside), torch.cat(masks, 1), torch.cat(combined), torch.cat(error, 1)
        share = wrong[:, ~on].sum(1) / wrong.sum(1)
        levels.append(
            {
                "tokens_objects": mask[:, on].mean(1).tolist(),
                "tokens_background": mask[:, ~on].mean(1).tolist(),
                "objects": float(both[on].mean()),
                "background": float(both[~on].mean()),
                "dice": sum(dice) / len(dice),
                "background_pixels": float((~on).float().mean()),
                "background_error": float(share[0]),
                "background_masked_error": float(share[1]),
            }
        )
    return levels


def draw_differences(summary: dict[str, Any], path: Path) -> None:
    """A PNG of the paired differences with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axis, base in zip(figure.subplots(1, 2), ("none", "mse"), strict=True):
        rows = summary["differences"][base]
        for y, (variant, row) in enumerate(rows.items()):
            axis.plot([row["low"], row["high"]], [y, y], color="tab:blue")
            axis.plot(row["mean"], y, "o", color="tab:blue")
            per_seed = [a - b for a, b in zip(summary["test"][variant], summary["test"][base], strict=True)]
            axis.plot(per_seed, [y + 0.18] * len(per_seed), "|", color="tab:grey")
        axis.set_yticks(range(len(rows)), [NAMES[variant] for variant in rows])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"test mAP against {NAMES[base]}: mean, 95 % interval, seeds")
        axis.invert_yaxis()
    figure.savefig(path, dpi=140, format="png")


def document(summary: dict[str, Any]) -> str:
    """The results as Markdown."""
    seeds = len(summary["test"]["none"])
    lines = [
        f"| model | loss weight | test mAP, % ({seeds} seeds) | mAP50 | small | medium | against alone | against MSE |",
        "|---|---|---|---|---|---|---|---|",
        f"| teacher | | {summary['teacher']['mAP']:.2f} | {summary['teacher']['mAP50']:.2f} "
        f"| {summary['teacher']['mAP small']:.2f} | {summary['teacher']['mAP medium']:.2f} | | |",
    ]
    for variant, values in summary["test"].items():
        details = summary["details"][variant]
        cells = [sum(d[key] for d in details) / len(details) for key in ("mAP50", "mAP small", "mAP medium")]
        against = []
        for base in ("none", "mse"):
            row = summary["differences"][base].get(variant)
            against.append(f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if row else "")
        weight = f"{summary['weights'][variant]:g}" if variant in VARIANTS else ""
        lines.append(
            f"| {NAMES[variant]} | {weight} | {sum(values) / len(values):.2f} | "
            + " | ".join(f"{cell:.2f}" for cell in cells)
            + f" | {against[0]} | {against[1]} |"
        )
    lines += [
        "",
        "| masks | level | mean on objects | on background | Dice | error on background | the same under the masks |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, levels in summary["masks"].items():
        for number, level in enumerate(levels):
            shares = " | ".join(f"{100 * level[key]:.0f} %" for key in ("background_error", "background_masked_error"))
            means = f"{level['objects']:.2f} | {level['background']:.2f} | {level['dice']:.2f}"
            lines.append(f"| {NAMES[variant]} | {number} | {means} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "study", help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=detection.SMALL["epochs"]["distil"], help="of every student")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--device")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)

    with Study(args.runs, args.epochs, args.jobs, args.device) as study:
        teacher_path = study.trained(args.runs / "teacher", "teacher")
        print(f"teacher: validation mAP {study.scored(teacher_path, 'val')['mAP']:.2f}", flush=True)
        kinds = {"maskd": False, "maskd_weighted": True}
        paths = study.side_by_side([lambda w=weighted: study.tokens(w) for weighted in kinds.values()])
        trials = study.trials()
        chosen = {"none": 0.0, **{variant: max(tried, key=lambda w: tried[w]) for variant, tried in trials.items()}}
        tasks = {
            (variant, seed): lambda v=variant, w=weight, s=seed: study.scored(study.student(v, w, s), "test")
            for seed in range(args.seeds)
            for variant, weight in chosen.items()
        }
        results = dict(zip(tasks, study.side_by_side(list(tasks.values())), strict=True))
        teacher_score = study.scored(teacher_path, "test")
        alone_path = study.student("none", 0.0, 0)

    details = {variant: [results[variant, seed] for seed in range(args.seeds)] for variant in chosen}
    test = {variant: [one["mAP"] for one in found] for variant, found in details.items()}
    data = Boxes(args.runs / "digits", "val")
    teacher, settings = detection.load_detector(teacher_path, torch.device("cpu"))
    alone, _ = detection.load_detector(alone_path, torch.device("cpu"))
    channels = [settings["architecture"]["channels"]] * settings["architecture"]["levels"]
    losses = {
        variant: MasKDLoss(channels, weight_mask=weighted, pretrained=path)
        for (variant, weighted), path in zip(kinds.items(), paths, strict=True)
    }
    summary = {
        "command": "make study",
        "settings": {"seeds": args.seeds, "epochs": args.epochs, "trial seed": TRIAL_SEED},
        "torch": torch.__version__,
        "teacher": teacher_score,
        "trials": {variant: {f"{w:g}": m for w, m in tried.items()} for variant, tried in trials.items()},
        "weights": chosen,
        "test": test,
        "details": details,
        "differences": {
            base: {variant: paired(values, test[base]) for variant, values in test.items() if variant != base}
            for base in ("none", "mse")
        },
        "masks": {variant: measure(teacher, alone, loss, data) for variant, loss in losses.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "results.md").write_text(document(summary))
    draw_differences(summary, args.out / "differences.png")
    image = data[0][0]
    with torch.no_grad():
        finest = pyramid(teacher, image)[0]
        for variant, loss in losses.items():
            masks = loss.mask_modules[0].forward_mask(finest)[0]
            plot_masks(image, masks, args.out / f"{variant}.png", title=f"{NAMES[variant]}: tokens, finest level")
    print(document(summary))


if __name__ == "__main__":
    main()
