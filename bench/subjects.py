"""What the benches of losses and operators share: features, providers of one computation, what each must equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from maskd_kernels import backends, native, use_backend

Outputs = Sequence[Tensor]


@dataclasses.dataclass
class Subject:
    """One computation at one shape, by several providers.

    ``exact`` computes the outputs in float64 from float64 copies of the leaves. ``units`` is the compulsory traffic of
    forward and backward in feature maps: each input read once per pass that needs it, each result written once.
    """

    leaves: list[Tensor]
    upstream: list[Tensor] | None
    providers: dict[str, Callable[[], Outputs]]
    exact: Callable[[list[Tensor]], Outputs]
    units: float
    differentiable: bool = True
    also: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)  # what else a provider differentiates


def features(case: Case, device: str, count: int) -> list[list[Tensor]]:
    """``count`` feature maps, each a list of levels."""
    torch.manual_seed(0)
    result = []
    for _ in range(count):
        levels = []
        for spatial in case.levels:
            x = torch.randn(case.batch, case.channels, *spatial, device=device).to(case.dtype)
            if case.channels_last:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            levels.append(x)
        result.append(levels)
    return result


def by_backend(function: Callable[[], Outputs], device: str) -> dict[str, Callable[[], Outputs]]:
    """Our function, once per backend that runs here, and as users get it (``auto``)."""

    def forced(backend: str) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with use_backend(backend):
                return function()

        return run

    names = [n for n in ("reference", "native", "triton") if backends.why_unavailable(n, device, torch.float32) is None]
    return {**{n: forced(n) for n in names}, "auto": function}


def streaming_pass(case: Case, device: str, units: float = 3) -> Callable[[], Any]:
    """Moves ``units`` feature maps, two thirds read and one third written past the caches, and does nothing else."""
    count = int(case.map_bytes * units / 3) // 4  # floats
    a, b = torch.randn(count, device=device), torch.randn(count, device=device)
    out = torch.empty_like(a)
    if device == "cpu" and native.available():
        stream, threads = native.module().streaming_difference, torch.get_num_threads
        return lambda: (stream(a.data_ptr(), b.data_ptr(), out.data_ptr(), count, threads()), a, b)[0]
    return lambda: torch.sub(a, b, out=out)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return gradients[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *ctx.gradients


def autograd_alone(leaves: list[Tensor]) -> Callable[[], Any]:
    """An operator that computes nothing, forward and backward: what PyTorch takes for any operator outside of it."""
    gradients = [torch.empty_like(x) for x in leaves]
    return lambda: torch.autograd.grad(_Nothing.apply(gradients, *leaves), leaves)
