"""``maskd-kernels bench``: the MasKD loss on this machine, as published and by each backend.

Short, and with nothing but what is installed. The figures of the documentation come from ``make bench`` in a checkout,
which measures more: all losses, other formulas under ``torch.compile``, cold caches, memory, whole training steps.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskd_kernels import backends, functional, reference, use_backend
from maskd_kernels.commands import info
from maskd_kernels.mask_weighting import MaskWeighting

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FEWEST, MOST = 5, 200  # calls that a median is taken of
Ways = dict[str, Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: one map of a student and one of a teacher, NCHW; tokens frozen, masks weighted."""

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 2
    channels: int = 256
    height: int = 100
    width: int = 136
    tokens: int = 6
    seconds: float = 15.0

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.channels} channels, {self.height}x{self.width} pixels, {self.tokens} tokens, "
            f"{self.dtype}"
        )


def ways(settings: Settings) -> Ways:
    """The student's gradient, by each way of computing it that this machine has."""
    generator = torch.Generator().manual_seed(0)
    n, c, k = settings.batch, settings.channels, settings.tokens

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(settings.device)

    student, teacher = (drawn(n, c, settings.height, settings.width).to(DTYPES[settings.dtype]) for _ in range(2))
    student.requires_grad_()
    tokens = drawn(k, c) / c**0.5
    weighting = MaskWeighting(drawn(c, c, 3, 3) / (3 * c**0.5), drawn(c), drawn(k, c, 1, 1) / c**0.5, drawn(k))
    rounded = [x.to(student.dtype) for x in (tokens, *weighting)]

    def published() -> Tensor:
        return torch.autograd.grad(reference.published_maskd_loss(student, teacher, rounded[0], rounded[1:]), student)[
            0
        ]

    def ours(backend: str) -> Tensor:
        with use_backend(backend):
            return torch.autograd.grad(functional.maskd_loss(student, teacher, tokens, weighting=weighting), student)[0]

    found: Ways = {"published formula": published}
    for backend in backends.BACKENDS[1:]:
        interpreted = backend == "triton" and backends.interpreting()
        if backends.why_unavailable(backend, settings.device, torch.float32) is None and not interpreted:
            found[f"ours, {backend}"] = functools.partial(ours, backend)
    return found


def _dropped(found: Ways, dtype: str) -> dict[str, str]:
    """Ways that are not timed, and why; each runs once, whereby kernels are compiled and memory is taken."""
    expected, problems = found["ours, reference"]().double(), {}
    for name, way in found.items():
        try:
            off = ((way().double() - expected).norm() / expected.norm()).item()
        except RuntimeError as error:
            memory = "alloc" in str(error) or "out of memory" in str(error)
            problems[name] = "out of memory" if memory else str(error).splitlines()[0]
        else:
            if not off < (1e-3 if dtype == "float32" else 5e-2):
                problems[name] = f"wrong by {off:.1e}: maskd-kernels verify says more"
    return problems


def _milliseconds(call: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    low, high = (ordered[min(int(len(ordered) * q), len(ordered) - 1)] for q in (0.2, 0.8))
    return {"median_ms": statistics.median(values), "p20_ms": low, "p80_ms": high, "calls": len(values)}


def measure(settings: Settings) -> dict[str, Any]:
    """Median and spread of each way, which take turns in random order; what could not be timed, and why."""
    found = ways(settings)
    dropped = _dropped(found, settings.dtype)
    timed = [name for name in found if name not in dropped]
    times: dict[str, list[float]] = {name: [] for name in timed}
    end, rounds = time.perf_counter() + settings.seconds, 0
    while rounds < FEWEST or (time.perf_counter() < end and rounds < MOST):
        random.shuffle(timed)
        for name in timed:
            times[name].append(_milliseconds(found[name], settings.device == "cuda"))
        rounds += 1
    return {
        "settings": dataclasses.asdict(settings),
        "machine": info.collect(),
        "results": {name: _spread(values) for name, values in times.items()},
        "dropped": dropped,
    }


def text(settings: Settings, measured: dict[str, Any]) -> str:
    """A table."""
    machine, results = measured["machine"], measured["results"]
    cuda = settings.device == "cuda"
    where = machine["gpus"][0]["name"] if cuda else f"{machine['processor']}, {machine['threads']} thread(s)"
    fastest = min(result["median_ms"] for result in results.values())
    lines = [
        f"MasKD loss and its gradient: {settings}",
        where,
        f"{'':20s}{'median ms':>11s}{'p20':>10s}{'p80':>10s}{'calls':>7s}{'of the fastest':>16s}",
    ]
    for name, result in results.items():
        spread = f"{result['median_ms']:11.3f}{result['p20_ms']:10.3f}{result['p80_ms']:10.3f}{result['calls']:7d}"
        lines.append(f"{name:20s}{spread}{result['median_ms'] / fastest:15.1f}x")
    lines += [f"{name:20s} not timed: {why}" for name, why in measured["dropped"].items()]
    lines.append("The same maps in every call: what caches hold, they hold. `make bench` in a checkout says more.")
    return "\n".join(lines)
