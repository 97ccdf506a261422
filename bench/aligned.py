"""``python -m bench.aligned``: the most that an align inside the loss's kernel could win on a CPU (docs/aligned.md).

PyTorch's 1x1 convolution, forward and backward, with the loss, over the three products that no kernel can do without.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch
from torch.nn.functional import conv2d

from maskd_kernels import MasKDLoss

SHAPES = ((512, 2048, 32, 32), (256, 256, 100, 168), (128, 256, 100, 168), (64, 64, 100, 168))


def ratios(student_channels: int, teacher_channels: int, height: int, width: int, rounds: int = 10) -> dict[str, float]:
    """Least processor times of interleaved runs on one thread, over that of the products; the first round warms up."""
    s = torch.randn(1, student_channels, height, width, requires_grad=True)
    a = torch.randn(teacher_channels, student_channels, 1, 1, requires_grad=True)
    aligned = torch.randn(1, teacher_channels, height, width, requires_grad=True)
    t = torch.randn(1, teacher_channels, height, width)
    loss = MasKDLoss([teacher_channels], custom_mask=False)
    loss.mask_modules[0].learned = True  # random tokens do to measure by
    g, x, weight = torch.randn(teacher_channels, height * width), s.detach()[0].flatten(1), a.detach()[:, :, 0, 0]
    calls = {
        "convolution and loss": lambda: torch.autograd.grad(loss([conv2d(s, a)], [t]), (s, a)),
        "products": lambda: (weight @ x, weight.T @ g, g @ x.T),
        "loss": lambda: torch.autograd.grad(loss([aligned], [t]), aligned),
    }
    least = dict.fromkeys(calls, float("inf"))
    for number in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            start = time.thread_time()
            calls[name]()
            if number:
                least[name] = min(least[name], time.thread_time() - start)
    return {name: value / least["products"] for name, value in least.items()}


def main(shapes: Sequence[tuple[int, int, int, int]] = SHAPES) -> None:
    """Prints the ratios of each align."""
    torch.set_num_threads(1)
    for cs, ct, height, width in shapes:
        found = ", ".join(f"{name} {value:.2f}" for name, value in ratios(cs, ct, height, width).items())
        print(f"{cs} -> {ct}, {height}x{width}: {found}")


if __name__ == "__main__":
    main()
