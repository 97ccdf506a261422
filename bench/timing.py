"""Providers interleaved in one run, medians and spread, peak memory, and what machine it was."""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass
class Timing:
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_extra_bytes: int | None = None
    error: str | None = None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(providers: dict[str, Callable[[], Any]], seconds: float, least: int = 5) -> dict[str, Timing]:
    """Each provider once per round, round after round, until the time is spent: drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for function in providers.values():
        for _ in range(3):
            function()
    deadline = time.perf_counter() + seconds
    rounds, order = 0, random.Random(0)
    while rounds < least or time.perf_counter() < deadline:
        rounds += 1
        # In a new order each round: nobody always finds what the same neighbour left in the caches.
        for name in order.sample(list(providers), len(providers)):
            _synchronize()
            start = time.perf_counter()
            providers[name]()
            _synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    result = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=10)
        result[name] = Timing(statistics.median(values), cuts[1], cuts[7])
    return result


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """The most memory that tensors allocated by a call hold at one time, its results included.

    What the native kernels take from their own pool is no event of PyTorch's allocator; it is counted as held at the
    peak, since gradients live to the end of a call.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from maskd_kernels import native

    function()
    pooled = native.module().pool_state()[0] if native.available() else 0
    # Events in the order of time; each allocation and release carries its size.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    pooled = (native.module().pool_state()[0] if native.available() else 0) - pooled
    del kept
    return peak + pooled


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Hardware, versions, commit: what a result means nothing without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    from maskd_kernels import __version__, native

    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": native.module().isa() if native.available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maskd_kernels": __version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")),
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }
