"""Batches, the training loop, and the measure of success."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels.demo.scenes import CLASSES


@dataclasses.dataclass
class Data:
    """Scenes and labels of one split, on the device."""

    scenes: Tensor  # [n, 3, H, W]
    labels: Tensor  # [n, H, W], uint8

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``steps`` shuffled batches: scenes, labels, and the scenes' numbers."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.scenes), generator=generator)])
            chosen, order = order[:size].to(self.scenes.device), order[size:]
            yield self.scenes[chosen], self.labels[chosen].long(), chosen


@torch.no_grad()
def mean_iou(model: nn.Module, data: Data) -> float:
    """Mean over the classes of intersection over union, in percent."""
    model.eval()
    confusion = torch.zeros(CLASSES * CLASSES, dtype=torch.int64, device=data.labels.device)
    for scenes, labels in zip(data.scenes.split(50), data.labels.split(50), strict=True):
        predicted = model(scenes).argmax(1)
        confusion += torch.bincount((labels.long() * CLASSES + predicted).flatten(), minlength=CLASSES * CLASSES)
    matrix = confusion.reshape(CLASSES, CLASSES).double()
    hit = matrix.diagonal()
    return float((hit / (matrix.sum(0) + matrix.sum(1) - hit).clamp_min(1)).mean() * 100)


def progress(iterable: Any, total: int, text: str) -> Any:
    """A progress bar."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=f"{text:32s}", leave=False, mininterval=0.5)


def fit(
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    parameters: Mapping[float, Sequence[nn.Parameter]],
    data: Data,
    batch: int,
    steps: int,
    seed: int,
    text: str,
) -> list[float]:
    """AdamW under a one-cycle schedule; ``step`` gets a batch, returns the task loss and what is to be added to it.

    ``parameters`` are given by their learning rate. Returns the task loss of each step.
    """
    groups = [{"params": list(group), "lr": rate} for rate, group in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(parameters), total_steps=steps, pct_start=0.15)
    curve = []
    for scenes, labels, numbers in progress(data.batches(batch, steps, seed), steps, text):
        task, extra = step(scenes, labels, numbers)
        optimizer.zero_grad(set_to_none=True)
        (task + extra).backward()
        optimizer.step()
        schedule.step()
        curve.append(task.detach())
    return torch.stack(curve).tolist()
