"""``python -m bench``: runs suites of cases, checks every provider before it times it, prints ratios, writes JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# glibc maps large blocks anew and the kernel zeroes them page by page. That is what users get by default, and what is
# measured by default; --keep-memory has glibc keep what is freed, for every provider alike.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
OURS = ("auto", "triton", "native", "reference")


def run_both(subject: Any, name: str) -> tuple[list[Any], list[Any]]:
    """Outputs and gradients of the leaves."""
    import torch

    outputs = subject.providers[name]()
    if not subject.differentiable:
        return outputs, []
    wanted = [*subject.leaves, *subject.also.get(name, [])]
    gradients = torch.autograd.grad(outputs, wanted, subject.upstream)
    return outputs, list(gradients[: len(subject.leaves)])


def error_of(subject: Any, name: str, expected: tuple[list[Any], list[Any]]) -> float:
    """The largest relative L2 distance of an output or gradient from the exact one."""
    got = run_both(subject, name)
    pairs = zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def exact_of(subject: Any) -> tuple[list[Any], list[Any]]:
    """Outputs and gradients in float64."""
    import torch

    leaves = [x.detach().double().requires_grad_(subject.differentiable) for x in subject.leaves]
    outputs = subject.exact(leaves)
    if not subject.differentiable:
        return list(outputs), []
    upstream = None if subject.upstream is None else [x.double() for x in subject.upstream]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [x.detach() for x in outputs], list(gradients)


def prepare(subject: Any, case: Any) -> tuple[dict[str, str], dict[str, float]]:
    """Drops providers that fail or are wrong; says why, and how far off each of the others is."""
    from torch._dynamo.exc import TorchDynamoException

    expected = exact_of(subject)
    # Half precision storage inside a composed formula loses bits on the way; ours may only lose the result's rounding.
    allowed = 1e-4 if case.dtype.itemsize == 4 else 5e-2
    dropped, errors = {}, {}
    for name in list(subject.providers):
        try:
            if name != "convolutions":
                errors[name] = error_of(subject, name, expected)
        except (RuntimeError, MemoryError, TorchDynamoException) as problem:
            memory = isinstance(problem, MemoryError) or "alloc" in str(problem) or "out of memory" in str(problem)
            dropped[name] = "out of memory" if memory else str(problem).splitlines()[0][:200]
        else:
            if name != "convolutions" and not errors[name] < allowed:
                dropped[name] = f"wrong by {errors[name]:.1e}"
        if name in dropped:
            del subject.providers[name]
    return dropped, errors


def build(case: Any, device: str) -> Any:
    """The subject of a case."""
    from bench import bench_generative, bench_maskd, bench_operators

    if case.subject == "maskd":
        return bench_maskd.build(case, device)
    if case.subject in ("mgd", "amd"):
        return bench_generative.build(case, device)
    return bench_operators.build(case, device)


def measure(case: Any, device: str, seconds: float, wanted: list[str]) -> dict[str, Any]:
    """All ways of running a case: forward and backward, cold and warm, and each pass alone, cold."""
    import torch

    from bench.subjects import autograd_alone, streaming_pass
    from bench.timing import Cold, interleaved, kernel_launches, peak_extra_bytes, time_once

    subject = build(case, device)
    if wanted:
        subject.providers = {n: f for n, f in subject.providers.items() if n in wanted}
    dropped, errors = prepare(subject, case)
    cold, calls = Cold(device), {}

    def both(name: str) -> Any:
        return lambda: run_both(subject, name)

    def forward(name: str) -> Any:
        return lambda: subject.providers[name]()

    def backward(name: str) -> float:
        outputs = subject.providers[name]()
        leaves = [*subject.leaves, *subject.also.get(name, [])]
        cold()
        return time_once(lambda: torch.autograd.grad(outputs, leaves, subject.upstream))

    def chilled(call: Any) -> Any:
        return lambda: (cold(), time_once(call))[1]

    def warmed(call: Any) -> Any:
        return lambda: (call(), time_once(call))[1]

    for name in subject.providers:
        calls[f"{name}/both/cold"] = chilled(both(name))
        calls[f"{name}/both/warm"] = warmed(both(name))
        if subject.differentiable:
            calls[f"{name}/forward/cold"] = chilled(forward(name))
            calls[f"{name}/backward/cold"] = lambda name=name: backward(name)
    floors = {
        f"streaming_{units:g}": streaming_pass(case, device, units) for units in sorted({3.0, float(subject.units)})
    }
    if subject.differentiable:
        floors["autograd_alone"] = autograd_alone(subject.leaves)
    for name, floor in floors.items():
        calls[f"{name}/both/cold"], calls[f"{name}/both/warm"] = chilled(floor), warmed(floor)
    # The ratios are made from what runs cold, forward and backward.
    timings = interleaved(
        calls,
        seconds,
        least=lambda name: 6 if name.endswith("both/cold") else 2,
        least_if_long=lambda name: 6 if name.endswith("both/cold") else 1,
    )
    providers: dict[str, Any] = {}
    for key, timing in timings.items():
        name, way, cache = key.split("/")
        providers.setdefault(name, {})[f"{way} {cache}"] = dataclasses.asdict(timing)
    for name in subject.providers:
        providers[name] |= {
            "peak_extra_bytes": peak_extra_bytes(both(name)),
            "kernel_launches": kernel_launches(both(name)),
            "error": errors.get(name),
        }
    return {
        "case": {**dataclasses.asdict(case), "dtype": str(case.dtype)},
        "title": case.title,
        "map_bytes": case.map_bytes,
        "units": subject.units,
        "device": device,
        "dropped": dropped,
        "providers": providers,
    }


def report(result: dict[str, Any]) -> str:
    """A case's results as text."""
    providers = result["providers"]
    ours = next((name for name in OURS if name in providers), None)
    mine = providers[ours]["both cold"]["median_ms"] if ours else float("nan")
    lines = [f"\n{result['case']['subject']}: {result['title']}"]
    columns = "".join(f"{name:>9s}" for name in ("p20", "p80", "warm", "forward", "backward"))
    lines.append(f"{'provider':22s}{'cold ms':>10s}{columns}{'x ours':>8s}{'peak, maps':>12s}")
    for name, p in providers.items():
        cells = [p["both cold"][key] for key in ("median_ms", "p20_ms", "p80_ms")] + [p["both warm"]["median_ms"]]
        cells += [p[way]["median_ms"] if way in p else float("nan") for way in ("forward cold", "backward cold")]
        peak = f"{p['peak_extra_bytes'] / result['map_bytes']:12.2f}" if "peak_extra_bytes" in p else ""
        lines.append(
            f"{name:22s}{cells[0]:10.3f}"
            + "".join(f"{x:9.3f}" for x in cells[1:])
            + f"{p['both cold']['median_ms'] / mine:8.2f}"
            + peak
        )
    lines += [f"{name:22s} not timed: {why}" for name, why in result["dropped"].items()]
    if ours:
        speed = result["units"] * result["map_bytes"] / (mine * 1e-3) / 1e9
        floor = providers["streaming_3"]["both cold"]["median_ms"]
        lines.append(
            f"{ours}: {mine / floor:.2f}x the time of a 3-unit streaming pass; "
            f"{speed:.0f} GB/s on the {result['units']:g}-unit count"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs the suites, or compares two result files."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", default="maskd,operators,generative", help="suites of bench/cases.py, by commas")
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--providers", default="", help="only these providers, by commas (default: all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=3, help="time per case for what is fast, once all have run")
    parser.add_argument("--json", type=Path, help="folder for results")
    parser.add_argument("--keep-memory", action="store_true", help="have the C library keep freed memory (Linux)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="compare two result files")
    parser.add_argument(
        "--gate", type=float, help="with --compare: fail where a ratio got worse by more than this share"
    )
    options = parser.parse_args()
    if options.compare:
        from bench.compare import compare

        return compare(*options.compare, options.gate)
    missing = {k: v for k, v in KEPT_MEMORY.items() if k not in os.environ}
    if missing and options.keep_memory and platform.system() == "Linux":
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**os.environ, **missing})

    import torch

    from bench.cases import SUITES
    from bench.timing import device_folder, machine
    from maskd_kernels import native

    torch.set_num_threads(options.threads)
    wanted = [name for name in options.providers.split(",") if name]
    for suite in options.suite.split(","):
        if suite not in SUITES:
            parser.error(f"--suite: expected some of {', '.join(SUITES)}, got {suite!r}")
        results = []
        for case in SUITES[suite]:
            if options.only in case.title:
                torch._dynamo.reset()
                native.release_memory()  # what an earlier case left would count as this one's
                results.append(measure(case, options.device, options.seconds, wanted))
                print(report(results[-1]), flush=True)
        if options.json:
            kept = "-keep-memory" if options.keep_memory else ""
            path = device_folder(options.json, options.device) / f"{suite}{kept}.json"
            path.write_text(json.dumps({"machine": machine(), "suite": suite, "results": results}, indent=1) + "\n")
            print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
