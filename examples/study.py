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
from study_report import NAMES, document, draw_differences, measure, paired, pyramid, scores, token_quality

from maskd_kernels import MasKDLoss, plot_masks

HERE = Path(__file__).parent
TRIAL_SEED = 1000  # chooses loss weights, and nothing else
SCALE = 2.0  # of the boxes, for COCO's sizes: small is below 16 pixels, medium from there on
STEP = 4.0  # between the loss weights that are tried
MOST_TRIALS = 5

# What detection.py is told, and the first loss weight tried, with one STEP to either side of it.
VARIANTS: dict[str, tuple[list[str], float]] = {
    "mse": (["--method", "mse"], 0.25),
    "maskd": (["--method", "maskd"], 0.25),
    "maskd_weighted": (["--method", "maskd", "--weight-mask"], 0.25),
    "mgd": (["--method", "mgd"], 1.0),
    "amd": (["--method", "amd"], 1.0),
}


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
        self.trained(out, "tokens", "--weight-mask" if weighted else "--no-weight-mask")
        return out / "tokens.pth"

    def student(self, variant: str, weight: float, seed: int) -> Path:
        """A student's checkpoint."""
        arguments = ["--method", "none"]
        if variant != "none":
            arguments = [*VARIANTS[variant][0], "--weight", f"{weight:g}", "--remember"]
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
        due = [(variant, first * step) for variant, (_, first) in VARIANTS.items() for step in (1 / STEP, 1, STEP)]

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
        "tokens": {
            variant: token_quality(teacher, path.with_name("last.pth"), data)
            for variant, path in zip(kinds, paths, strict=True)
        },
        "masks": {variant: measure(teacher, alone, loss, data) for variant, loss in losses.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "results.md").write_text(document(summary))
    (args.out / "short.md").write_text(scores(summary))
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
