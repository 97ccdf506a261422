"""Looking at the masks."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F


def plot_masks(image: Tensor, masks: Tensor, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Writes a PNG of the K masks over an image.

    Args:
        image: ``[3, H, W]`` or ``[1, H, W]``, or a NumPy image ``[H, W, 3]``; uint8, or floating: its smallest value
            becomes black, its largest white.
        masks: ``[K, h, w]`` with values from 0 to 1, of any size; they are interpolated to the image's.
        path: where the PNG goes.
        title: a line above.

    Raises:
        ValueError: shapes other than these.
        ImportError: matplotlib is not installed (``pip install "maskd-kernels[plot]"``).
    """
    image, masks = torch.as_tensor(image), torch.as_tensor(masks)
    if image.dim() == 3 and image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
        image = image.movedim(-1, 0)
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: expected [3, H, W] or [1, H, W], got {list(image.shape)}")
    if masks.dim() != 3 or masks.shape[0] < 1:
        raise ValueError(f"masks: expected [K, h, w], got {list(masks.shape)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_masks needs matplotlib: pip install "maskd-kernels[plot]"') from error

    pixels = image.detach().float().cpu()
    low, high = (0.0, 255.0) if image.dtype == torch.uint8 else (pixels.min().item(), pixels.max().item())
    pixels = ((pixels - low) / max(high - low, 1e-12)).expand(3, -1, -1).permute(1, 2, 0)
    size = image.shape[1:]
    resized = F.interpolate(masks.detach().float().cpu()[None], size=size, mode="bilinear", align_corners=False)[0]

    columns = min(len(resized) + 1, 5)
    rows = -(-(len(resized) + 1) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows * size[0] / size[1] + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(pixels.numpy())
    axes[0].set_title("image", fontsize=9)
    for k, mask in enumerate(resized):
        axes[k + 1].imshow(pixels.mean(-1).numpy(), cmap="gray")
        axes[k + 1].imshow(mask.numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
        axes[k + 1].set_title(f"token {k}: mean {mask.mean():.2f}", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")
