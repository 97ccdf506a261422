"""``python -m bench``: runs the cases, checks every provider before it times it, prints ratios, writes JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

# glibc maps every block above 32 MiB anew and the kernel zeroes it page by page. That is what users get by default, and
# what is measured by default; --keep-memory has glibc keep what is freed, for every provider alike.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def measure(case: Any, device: str, seconds: float) -> dict[str, Any]:
    from bench.bench_receptive_stats import build
    from bench.timing import interleaved, peak_extra_bytes

    providers, exact = build(case, device)
    loss, gradient = exact()
    wrong = {}
    # Half precision storage of the published formula loses bits on the way; ours may only lose the result's rounding.
    allowed = 1e-4 if case.dtype.itemsize == 4 else 5e-2
    for name in list(providers):
        if name == "streaming":
            continue
        got_loss, got_gradient = providers[name]()
        error = max(
            abs(got_loss.item() - loss.item()) / abs(loss.item()),
            ((got_gradient.double() - gradient).norm() / gradient.norm()).item(),
        )
        if not error < allowed:
            wrong[name] = error
            del providers[name]
    timings = interleaved(providers, seconds)
    for name, timing in timings.items():
        timing.peak_extra_bytes = peak_extra_bytes(providers[name])
    return {
        "case": {**dataclasses.asdict(case), "dtype": str(case.dtype)},
        "map_bytes": case.map_bytes,
        "device": device,
        "wrong": wrong,
        "providers": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }


def report(result: dict[str, Any]) -> str:
    providers = result["providers"]
    ours = "triton" if "triton" in providers else "native" if "native" in providers else "reference"
    mine = providers[ours]["median_ms"]
    unit = result["map_bytes"]
    lines = [f"\n{result['case']['name']} ({result['case']['dtype'][6:]}), forward and backward"]
    lines.append(f"{'provider':22s}{'median ms':>11s}{'p20':>9s}{'p80':>9s}{'x ours':>9s}{'peak, maps':>12s}")
    for name, p in providers.items():
        peak = p["peak_extra_bytes"] / unit
        times = f"{p['median_ms']:11.3f}{p['p20_ms']:9.3f}{p['p80_ms']:9.3f}{p['median_ms'] / mine:9.2f}"
        lines.append(f"{name:22s}{times}{peak:12.2f}")
    for name, error in result["wrong"].items():
        lines.append(f"{name:22s} WRONG by {error:.1e}: not timed")
    floor = providers["streaming"]["median_ms"]
    ratios = [f"{mine / floor:.2f}x the time of a 3-unit streaming pass"]
    for name in ("published_as_shipped", "published", "simplified_compiled"):
        if name in providers:
            ratios.append(f"{providers[name]['median_ms'] / mine:.1f}x faster than {name}")
    speed = 5 * unit / (mine * 1e-3) / 1e9
    lines.append(f"{ours}: {', '.join(ratios)}; {speed:.0f} GB/s on the 5-unit count")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=25, help="time per case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="folder for results")
    parser.add_argument("--keep-memory", action="store_true", help="have the C library keep freed memory (Linux)")
    options = parser.parse_args()
    missing = {k: v for k, v in KEPT_MEMORY.items() if k not in os.environ}
    if missing and options.keep_memory and platform.system() == "Linux":
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**os.environ, **missing})

    import torch

    from bench.bench_receptive_stats import CASES
    from bench.timing import machine

    torch.set_num_threads(options.threads)
    results = []
    for case in CASES:
        if options.only in case.name:
            results.append(measure(case, options.device, options.seconds))
            print(report(results[-1]), flush=True)
    if options.json:
        about = machine()
        device = about["gpu"] if options.device == "cuda" else about["cpu"]
        folder = options.json / re.sub(r"\W+", "-", device.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        name = "receptive_stats-keep-memory.json" if options.keep_memory else "receptive_stats.json"
        (folder / name).write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
        print(f"\nwritten to {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
