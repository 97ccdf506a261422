"""The pictures of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from maskd_kernels.demo.training import Data


def draw_predictions(data: Data, models: Mapping[str, nn.Module], path: Path, count: int = 6) -> None:
    """A PNG of test scenes, their labels, and what each model predicts."""
    from matplotlib.figure import Figure

    scenes, labels = data.scenes[:count], data.labels[:count]
    with torch.no_grad():
        rows = {"label": labels, **{name: model(scenes).argmax(1) for name, model in models.items()}}
    figure = Figure(figsize=(1.7 * count, 1.75 * (len(rows) + 1)), layout="constrained")
    axes = figure.subplots(len(rows) + 1, count)
    for column in range(count):
        axes[0, column].imshow((scenes[column].permute(1, 2, 0).cpu() + 0.5).clamp(0, 1).numpy())
        for row, (name, values) in enumerate(rows.items(), 1):
            axes[row, column].imshow(
                values[column].cpu().numpy(), cmap="tab20", vmin=0, vmax=19, interpolation="nearest"
            )
            axes[row, 0].set_ylabel(name, fontsize=9)
    axes[0, 0].set_ylabel("scene", fontsize=9)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=140, format="png")


def draw_curves(curves: dict[str, list[float]], path: Path) -> None:
    """A PNG of the students' task losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        window = max(len(curve) // 40, 1)
        smooth = torch.tensor(curve).unfold(0, window, 1).mean(-1)
        axis.plot(range(window - 1, len(curve)), smooth, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training cross entropy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140, format="png")


def draw_mask_kinds(scenes: Tensor, kinds: Mapping[str, Tensor], path: Path) -> None:
    """A PNG of scenes ``[n, 3, H, W]`` beside the masks ``[n, h, w]``, in 0..1, that each method lays over them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * (len(kinds) + 1), 1.95 * len(scenes)), layout="constrained")
    axes = figure.subplots(len(scenes), len(kinds) + 1, squeeze=False)
    height, width = scenes.shape[2:]
    for row, scene in enumerate(scenes):
        picture = (scene.permute(1, 2, 0).cpu() + 0.5).clamp(0, 1)
        axes[row, 0].imshow(picture.numpy())
        for column, masks in enumerate(kinds.values(), 1):
            axis = axes[row, column]
            axis.imshow(picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            image = axis.imshow(
                masks[row].float().cpu().numpy(),
                cmap="viridis",
                vmin=0,
                vmax=1,
                alpha=0.65,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
    axes[0, 0].set_title("scene", fontsize=9)
    for column, name in enumerate(kinds, 1):
        axes[0, column].set_title(name, fontsize=9)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.6, label="1: kept or weighted fully, 0: masked")
    figure.savefig(path, dpi=140, format="png")
