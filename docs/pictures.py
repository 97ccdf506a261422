"""``python docs/pictures.py``: draws docs/how-it-works/traffic.png, counting what each operation reads and writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskd_kernels.reference import published_maskd_loss

FOLDER = Path(__file__).parent / "how-it-works"
BATCH, TOKENS, CHANNELS, SIZE = 2, 6, 256, (100, 168)  # RetinaNet's P3 of two images of 800x1344
LEAST = 0.5  # maps: what moves less has no line of its own
FORWARD = (
    "masks",
    "student times masks",
    "teacher times masks",
    "difference",
    "square",
    "sum over the pixels",
    "3×3 convolution of the weighting",
    "its pooling",
)
BACKWARD = (
    "backward: the square's base",
    "times 2",
    "times the upstream gradient",
    "times masks",
    "sum over the tokens",
)
READ, WRITE, TEXT = "#4c78a8", "#f58518", "#333333"


class Step(NamedTuple):
    """What one operation moves, in feature maps (batch x channels x pixels elements)."""

    name: str
    read: float
    written: float


# What the kernels of this package read and write while tokens are frozen (csrc/maskd_loss.h).
OURS = (
    Step("masks, their mass, the weighting", 1, 0),
    Step("loss and the student's gradient", 2, 1),
)


class _Traffic(TorchDispatchMode):
    """Counts, for every operation that is no view, the elements of the tensors that it takes and returns."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit, self.steps = unit, list[Step]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.steps.append(Step(str(function), self._maps((args, kwargs)), self._maps(result)))
        return result

    def _maps(self, tensors: Any) -> float:
        found = [x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)]
        # An expanded axis holds nothing more to read.
        return sum(math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s) for x in found) / self.unit


def published(train_tokens: bool = False) -> list[Step]:
    """The published formula in PyTorch, forward and backward, step by step; on meta tensors, so nothing is computed.

    Args:
        train_tokens: whether the parameters of the mask module have gradients, as in the authors' code.
    """
    with torch.device("meta"):
        student = torch.empty(BATCH, CHANNELS, *SIZE, requires_grad=True)
        teacher = torch.empty_like(student, requires_grad=False)
        tokens, *weighting = (
            torch.empty(shape, requires_grad=train_tokens)
            for shape in ((TOKENS, CHANNELS), (CHANNELS, CHANNELS, 3, 3), CHANNELS, (TOKENS, CHANNELS, 1, 1), TOKENS)
        )
        with _Traffic(student.numel()) as traffic:
            published_maskd_loss(student, teacher, tokens, weighting).backward()
    return traffic.steps


def maps(steps: Any) -> float:
    """All that is read and written, in feature maps."""
    return sum(step.read + step.written for step in steps)


def draw_traffic(path: Path) -> None:
    """Every operation from where the one before it has ended; ours on the same axis."""
    from matplotlib.figure import Figure

    names = iter((*FORWARD, *BACKWARD))
    large = [step for step in published() if step.read + step.written > LEAST]
    before = [step._replace(name=name) for step, name in zip(large, names, strict=True)]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=[len(before), len(OURS)])
    titles = (
        f"As published: {maps(before):.0f} maps are read or written",
        f"Here, tokens frozen: {maps(OURS):.0f} maps, and the gradient is there already",
    )
    for axis, steps, title in zip(axes, (before, OURS), titles, strict=True):
        left = 0.0
        for row, step in enumerate(steps):
            axis.barh(row, step.read, left=left, height=0.72, color=READ, label="read" if row == 0 else None)
            axis.barh(row, step.written, left=left + step.read, height=0.72, color=WRITE)
            left += step.read + step.written
            axis.text(left + 0.6, row, f"{step.read + step.written:.0f}", va="center", fontsize=8, color=TEXT)
        axis.set_yticks(range(len(steps)), [step.name for step in steps], fontsize=8)
        axis.set_title(title, fontsize=10, loc="left", color=TEXT)
        axis.invert_yaxis()
        axis.grid(axis="x", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[0].barh(0, 0, color=WRITE, label="written")
    axes[0].legend(frameon=False, fontsize=9, loc="upper right")
    axes[1].set_xlabel("feature maps moved so far, one after another", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


if __name__ == "__main__":
    draw_traffic(FOLDER / "traffic.png")
    print(f"published: {maps(published()):.0f} maps, with gradients of its parameters {maps(published(True)):.0f}")
    print(f"here: {maps(OURS):.0f} maps")
