"""``python -m bench.scaling``: how time grows with pixels, images, tokens, threads, and the share of pixels kept.

Forward and backward with cold caches on a CPU; the points of a series run interleaved, beside a streaming pass that
says what the machine's memory allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case
from bench.subjects import features, streaming_pass
from bench.timing import Cold, device_folder, interleaved, machine, time_once
from maskd_kernels import MaskModule, maskd_loss, native
from maskd_kernels.ops.masked_conv import masked_conv

P4 = (50, 84)
SIZES = {"pixels": [(25, 42), (50, 84), (100, 168), (200, 336)], "images": [1, 2, 4, 8]}
TOKENS = [1, 2, 4, 8, 16, 32, 64]
MASKED = [0.15, 0.3, 0.45, 0.65, 0.75]
LARGE = Case("maskd", "RetinaNet P3, N=2", 2, 256, ((100, 168),))


def loss_step(case: Case) -> Callable[[], Any]:
    """MasKD's loss with frozen tokens, forward and backward."""
    (student,), (teacher,) = features(case, "cpu", 2)
    module = MaskModule(case.channels, case.tokens).requires_grad_(False)
    student.requires_grad_()

    def step() -> Any:
        loss = maskd_loss(student, teacher, module.mask_token, weighting=module.weighting)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, student)

    return step


def conv_steps(masked: float) -> dict[str, Callable[[], Any]]:
    """The convolution of a masked image: ours, and the library's in both layouts."""
    case = Case("masked_conv", "", 2, 256, (P4,))
    ((x,), (upstream,)) = features(case, "cpu", 2)
    weight, bias = torch.randn(256, 256, 3, 3) * 0.02, torch.zeros(256)
    keep = torch.rand(2, *P4) <= 1 - masked
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def step(convolve: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(convolve(), leaves, upstream)

    def library(layout: torch.memory_format) -> Tensor:
        image = x.contiguous(memory_format=layout)
        return F.conv2d(image * keep[:, None], weight, bias, padding=1)

    return {
        "maskd-kernels": step(lambda: masked_conv(x, keep, weight, bias)),
        "library": step(lambda: library(torch.contiguous_format)),
        "library, channels-last": step(lambda: library(torch.channels_last)),
    }


def series(threads: int) -> dict[str, list[dict[str, Any]]]:
    """The points: by name of the series, ``x`` and the calls to time."""
    loss, floor = "maskd-kernels", "streaming pass, 3 units"

    def point(x: float, case: Case, used: int = threads) -> dict[str, Any]:
        return {"x": x, "threads": used, "calls": {loss: loss_step(case), floor: streaming_pass(case, "cpu")}}

    base = dataclasses.replace(LARGE, levels=(P4,))
    pixels = [point(h * w, dataclasses.replace(LARGE, levels=((h, w),))) for h, w in SIZES["pixels"]]
    images = [point(n, dataclasses.replace(base, batch=n)) for n in SIZES["images"]]
    tokens = [point(k, dataclasses.replace(base, tokens=k)) for k in TOKENS]
    by_threads = [point(n, LARGE, n) for n in range(1, threads + 1)]
    masked = [{"x": share, "threads": threads, "calls": conv_steps(share)} for share in MASKED]
    return {"pixels": pixels, "images": images, "tokens": tokens, "threads": by_threads, "share masked": masked}


def main() -> None:
    """Measures and writes scaling.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--json", type=Path, help="folder for results")
    options = parser.parse_args()
    cold = Cold("cpu")

    def chilled(call: Callable[[], Any], threads: int) -> float:
        cold()
        torch.set_num_threads(threads)
        try:
            return time_once(call)
        finally:
            torch.set_num_threads(options.threads)

    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {}
    points = series(options.threads)
    for name, row in points.items():
        calls = {}
        for i, point in enumerate(row):
            for provider, call in point["calls"].items():
                call()
                calls[f"{i}/{provider}"] = lambda call=call, n=point["threads"]: chilled(call, n)
        timings = interleaved(calls, options.seconds / len(points))
        result[name] = []
        for i, point in enumerate(row):
            times = {p: dataclasses.asdict(timings[f"{i}/{p}"]) for p in point["calls"]}
            result[name].append({"x": point["x"], "times": times})
            print(f"{name:14s}{point['x']:10g}" + "".join(f"  {p}: {t['median_ms']:.3f} ms" for p, t in times.items()))
        native.release_memory()  # what the sizes of this series needed
    about = (
        "MasKD's loss, forward and backward, caches cold, C=256, float32, weighted: pixels at N=2, K=6; images at "
        "50x84, K=6; tokens at 50x84, N=2; threads at 100x168, N=2, K=6. Share masked: the 3x3 convolution of an image "
        "of 256 channels, 50x84, N=2, of whose pixels this share is zero."
    )
    if options.json:
        content = {"machine": machine(), "about": about, "series": result}
        path = device_folder(options.json, "cpu") / "scaling.json"
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
