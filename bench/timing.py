"""Providers interleaved in one run, medians and spread, peak memory, and what machine it was."""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass
class Timing:
    """Milliseconds of one provider in one way of running it."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int

    @staticmethod
    def of(values: list[float]) -> Timing:
        """From milliseconds."""
        ordered = sorted(values)
        at = [ordered[min(int(len(ordered) * q), len(ordered) - 1)] for q in (0.2, 0.8)]
        return Timing(statistics.median(values), *at, len(values))


HAS_GPU = torch.cuda.is_available()  # asked once: the question costs as much as a small operator


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if HAS_GPU:
        torch.cuda.synchronize()


class Cold:
    """Pushes what came before out of the caches: another one for every call."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.empty(64 << 20, device=device)  # 256 MiB

    def __call__(self) -> None:
        self.buffer.add_(1)
        synchronize()


def time_once(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


LONG_MS = 300.0  # what takes longer depends little on the caches and scatters little


def interleaved(
    calls: dict[str, Callable[[], float]],
    seconds: float,
    least: Callable[[str], int] = lambda _: 3,
    least_if_long: Callable[[str], int] = lambda _: 3,
) -> dict[str, Timing]:
    """Calls, which return their own milliseconds, round after round in a new random order: drift hits all alike.

    Each runs ``least(name)`` times, or ``least_if_long(name)`` where its first run took long. Then those that have not
    had more than their share of the time go on for ``seconds``: a slow one does not cost the fast ones their number.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, share = random.Random(0), seconds * 1e3 / len(calls)

    def run(due: list[str]) -> None:
        for name in order.sample(due, len(due)):
            times[name].append(calls[name]())

    def enough(name: str) -> int:
        return (least_if_long if times[name] and times[name][0] > LONG_MS else least)(name)

    while due := [name for name, taken in times.items() if len(taken) < enough(name)]:
        run(due)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline and (due := [name for name, taken in times.items() if sum(taken) < share]):
        run(due)
    return {name: Timing.of(values) for name, values in times.items()}


def kernel_launches(function: Callable[[], Any]) -> int | None:
    """How many kernels a call launches on the GPU; None where there is none."""
    if not HAS_GPU:
        return None
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """The most memory that tensors allocated by a call, not its first, hold at one time, its results included.

    What the native kernels take from their own pool is no event of PyTorch's allocator; it is counted as held at the
    peak, since gradients live to the end of a call.
    """
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from maskd_kernels import native

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


def _driver() -> str | None:
    if not HAS_GPU:
        return None
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
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
        "gpu": torch.cuda.get_device_name() if HAS_GPU else None,
        "isa": native.module().isa() if native.available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maskd_kernels": __version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")),
        "driver": _driver(),
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


def device_folder(root: Path, device: str) -> Path:
    """Where the results of this machine lie, named by its GPU, or by processor and instruction set."""
    info = machine()
    name = info["gpu"] if device == "cuda" else f"{info['cpu']} {info['isa']}"
    folder = root / re.sub(r"\W+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
