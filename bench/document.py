"""``python -m bench.document``: writes docs/benchmarks.md, the README's figures and docs/study.md's from the results.

``--check`` only compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
STUDY = ROOT / "docs" / "study.md"
RESULTS_OF_RUNS = ("demo/results.md", "study/results.md", "study/short.md")
RESULTS = ROOT / "bench" / "results"
STATIC = RESULTS / "static.json"
SMALL = 2 << 20  # bytes of a map: a second-level cache
STEP = [
    "torchvision's models with random weights, forward and backward without the optimizer, the student in float32.",
    "Share: what is added to the step without distillation, of the whole step. Teacher and loss are measured by",
    "themselves, in the same rounds. A prepared teacher: batch norms folded, channels-last.",
    "",
]
STATIC_ABOUT = [
    "No GPU was there: `python -m bench.static --json bench/results/static.json` compiles the kernels for GPUs that",
    "are not there, with Triton {triton}, and counts the machine code. Instructions of a warp's lane per element of a",
    "feature map, or per pair where two maps are read, in the loop over channels or pixels: where rows are whole",
    "vectors, in brackets where not. Barriers and shuffles of a step; warps that fit an SM, and what their loads then",
    "have under way. Six tokens where nothing else is said; `tokens`: they and the teacher are trained as well. On",
    "sm_90; the file has the other architectures, float16 and the classes of instructions.",
]
# Instructions per element or pair at most, where rows are whole vectors; 8 where nothing is said.
GOALS = {
    "loss receptive_stats.forward_kernel": 16,
    "tokens receptive_stats.forward_kernel": 16,
    "tokens receptive_stats.backward_kernel": 25,
}
GOALS_ABOUT = [
    "Goals for these counts of compiled code, on every architecture, in float32 and half types, where rows are whole",
    "vectors: `receptive_stats` of six tokens at most 16 instructions per pair forward, with at least 16 warps and",
    "32 KiB under way on an SM, and 25 backward with tokens; every other kernel at most 8; no spills.",
]
WARPS_GOAL, FLIGHT_GOAL = 16, 32 << 10  # of the forward pass of six tokens: resident warps, bytes under way on an SM
PREDICTED = [
    "Microseconds, **predicted from compiled code, not measured**: the largest of three terms, which is named. Memory:",
    "every byte once, at peak bandwidth. Issue: instructions over issue slots. Latency: bytes over those under way, by",
    "Little's law. Formulas, peak figures and what is left out: `bench/model.py`. C=256, each kernel by itself,",
    "nothing in the L2 cache, without the launch.",
]
OURS = ("auto", "triton", "native")
COMPETITORS = {
    "published_as_shipped": "published, as shipped",
    "published": "published",
    "published_compiled": "published, compiled",
    "simplified": "simplified",
    "simplified_compiled": "simplified, compiled",
    "simplified_cudagraphs": "simplified, CUDA graphs",
    "auto_weight_changes": "ours, weight changing",
    "eager": "eager",
    "eager_channels_last": "eager, channels-last",
    "compiled": "compiled",
}


def load(suite: str) -> list[tuple[Path, dict[str, Any]]]:
    """The committed results of a suite, one per device."""
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob(f"*/{suite}.json"))]


def ours(result: dict[str, Any]) -> str:
    """The backend of ours that counts: the fastest kind that ran."""
    return next(name for name in OURS if name in result["providers"])


def millis(result: dict[str, Any], provider: str, caches: str = "cold") -> float | None:
    """Median of forward and backward; None where the provider did not run."""
    entry = result["providers"].get(provider)
    return None if entry is None else float(entry[f"both {caches}"]["median_ms"])


def _cell(value: float | None, why: str = "") -> str:
    return why if value is None else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def ratio_row(result: dict[str, Any], competitors: list[str], with_subject: bool = False, caches: str = "cold") -> str:
    """One row: how many times faster than each competitor, our time over the floors, memory."""
    mine = millis(result, ours(result), caches)
    assert mine is not None
    cells = [f"{result['case']['subject']}: {result['title']}" if with_subject else result["title"]]
    for name in competitors:
        theirs = millis(result, name, caches)
        cells.append(_cell(None if theirs is None else theirs / mine, result["dropped"].get(name, "")[:24]))
    floor = millis(result, "streaming_3", caches)
    compulsory = millis(result, f"streaming_{result['units']:g}", caches)
    cells += [f"{mine / x:.1f}×" for x in (floor, compulsory) if x]
    peak = result["providers"][ours(result)]["peak_extra_bytes"] / result["map_bytes"]
    cells.append(f"{peak:.2f}")
    return "| " + " | ".join(cells) + " |"


def ratio_table(results: list[dict[str, Any]], with_subject: bool = False, caches: str = "cold") -> list[str]:
    """A table of the cases of one suite."""
    present = [name for name in COMPETITORS if any(name in (*r["providers"], *r["dropped"]) for r in results)]
    head = ["case", *(COMPETITORS[name] for name in present), "over 3 units", "over all units", "peak, maps"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + [ratio_row(r, present, with_subject, caches) for r in results]


def _device(content: dict[str, Any]) -> str:
    machine = content["machine"]
    if machine["gpu"]:
        return f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}"
    return f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"


def readme_section() -> str:
    """The README's tables: MasKD's loss and the operators, with the C library's default memory mapping."""
    lines = [
        "How many times faster than the published formula (its module's parameters with gradients, as shipped; then",
        "frozen) and than the simplified one (no channel axis in the masks, no convolution), forward and backward,",
        "tokens frozen, caches cold. Then our time over that of a pass that reads two feature maps, writes one into",
        "memory already at hand and does nothing else (3 units), and over one that moves what our kernels must (4, or",
        "5 where masks depend on the student); and the peak of extra memory, in feature maps. Weight changing: ours,",
        "where the loss's weight is another one in every step, and no gradient can be prepared with the loss.",
    ]
    for _, content in load("maskd"):
        lines += ["", f"{_device(content)}:", "", *ratio_table(content["results"])]
        small = [r for r in content["results"] if r["map_bytes"] < SMALL]
        if small:
            lines += ["", "Where all maps fit the caches, and are still there from what computed them:", ""]
            lines += ratio_table(small, caches="warm")
    for _, content in load("end_to_end"):
        retinanet = content["models"][0]
        lines += ["", f"A whole training step, {retinanet['title']}, {_device(content)}:", ""]
        lines += step_table(retinanet["rows"])
    lines += [
        "",
        "A teacher in bfloat16 pays where the processor has instructions for it (AVX-512-BF16, AMX). The machine with",
        "avx512 above has, the one with avx2 has not, and computes it many times slower than float32.",
    ]
    lines += ["", "More, and how to reproduce it: [docs/benchmarks.md](docs/benchmarks.md)."]
    return "\n".join(lines)


def detail_table(result: dict[str, Any]) -> list[str]:
    """Every provider of a case."""
    lines = [
        "| provider | cold, ms | p20 | p80 | warm, ms | forward, ms | backward, ms | GB/s | peak, maps | launches |",
        "|" + "---|" * 10,
    ]
    for name, entry in result["providers"].items():
        cold = entry["both cold"]
        units = float(name.removeprefix("streaming_")) if name.startswith("streaming_") else result["units"]
        speed = units * result["map_bytes"] / cold["median_ms"] / 1e6
        cells = [name, *(f"{cold[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms"))]
        cells += [f"{entry[way]['median_ms']:.3f}" if way in entry else "" for way in ("both warm", "forward cold")]
        cells += [f"{entry['backward cold']['median_ms']:.3f}" if "backward cold" in entry else ""]
        cells += ["" if name == "autograd_alone" else f"{speed:.1f}"]
        peak, launches = entry.get("peak_extra_bytes"), entry.get("kernel_launches")
        cells += [
            "" if peak is None else f"{peak / result['map_bytes']:.2f}",
            "" if launches is None else str(launches),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | {why} |" + " |" * 8 for name, why in result["dropped"].items()]
    return lines


def scaling_table(name: str, points: list[dict[str, Any]]) -> list[str]:
    """A series: what grows, each provider's time, and that time over the first point's."""
    providers = list(points[0]["times"])
    head = [name, *(x for p in providers for x in (f"{p}, ms", "of the first"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point in points:
        cells = [f"{point['x']:g}"]
        for p in providers:
            first, time = points[0]["times"][p]["median_ms"], point["times"][p]["median_ms"]
            cells += [f"{time:.3f}", f"{time / first:.2f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """Training steps, by kind of distillation."""
    head = ["distillation", "step, ms", "p20", "p80", "share of the step", "added, of what the published adds"]
    head += ["teacher, ms", "loss, ms", "peak memory, MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["name"], *(f"{row[key]:.0f}" for key in ("median_ms", "p20_ms", "p80_ms"))]
        cells.append(f"{100 * row['share']:.1f} %" if "share" in row else "")
        cells.append(f"{row['added_ratio']:.2f}×" if "added_ratio" in row else "")
        cells += [f"{row[key]:.1f}" if key in row else "" for key in ("teacher_ms", "loss_ms")]
        lines.append("| " + " | ".join([*cells, f"{row['peak_mib']:.0f}"]) + " |")
    return lines


def _kernels(content: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of float32 and bfloat16: each kernel's entries, by architecture."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, entry in content["kernels"].items():
        name, architecture = key.rsplit(" ", 1)
        if not name.endswith("float16") or name.endswith("bfloat16"):
            found.setdefault(name, {})[architecture] = entry
    return found


def goals_missed(content: dict[str, Any]) -> dict[str, list[str]]:
    """The goals that a kernel misses, by its key. Other numbers of tokens than six have none."""
    missed: dict[str, list[str]] = {}
    for key, entry in content["kernels"].items():
        name, wide = " ".join(key.split()[:2]), entry["wide"]
        if name.startswith("K="):
            continue
        found = []
        if wide["per_element"] > GOALS.get(name, 8):
            found.append(f"{wide['per_element']:.1f} instructions, not {GOALS.get(name, 8)}")
        if entry["spill_bytes"]:
            found.append(f"{entry['spill_bytes']} bytes spilled")
        if name.endswith("receptive_stats.forward_kernel"):
            if entry["resident_warps"] < WARPS_GOAL:
                found.append(f"{entry['resident_warps']} warps, not {WARPS_GOAL}")
            if wide["bytes_in_flight"] < FLIGHT_GOAL:
                found.append(f"{wide['bytes_in_flight'] / 1024:.0f} KiB under way, not {FLIGHT_GOAL >> 10}")
        if found:
            missed[key] = found
    return missed


def static_section(content: dict[str, Any]) -> list[str]:
    """What the Triton kernels are made of, and the times predicted from it."""
    lines = ["", "## Triton kernels, predicted from compiled code, not measured", ""]
    lines += [line.format(triton=content["triton"]) for line in STATIC_ABOUT]
    head = ["kernel", "instructions", "barriers", "shuffles", "registers", "warps", "KiB under way"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    kernels = _kernels(content)
    for name, of in kernels.items():
        entry = of["sm_90"]
        wide = entry["wide"]
        narrow = f" ({entry['narrow']['per_element']:.1f})" if "narrow" in entry else ""
        cells = [name, f"{wide['per_element']:.1f}{narrow}", wide["barriers"], wide["shuffles"], entry["registers"]]
        cells += [entry["resident_warps"], f"{wide['bytes_in_flight'] / 1024:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *GOALS_ABOUT]
    missed = goals_missed(content)
    lines += ["", "Missed:" if missed else "None is missed."]
    if missed:
        lines += ["", *(f"- {key}: {', '.join(found)}" for key, found in missed.items())]
    lines += ["", *PREDICTED]
    gpus = content["gpus"]
    for workload in next(iter(content["kernels"].values()))["predicted"]:
        lines += ["", f"{workload}:", "", "| kernel | " + " | ".join(gpus) + " |", "|" + "---|" * (1 + len(gpus))]
        for name, of in kernels.items():
            times = [of[f"sm_{gpu['architecture']}"]["predicted"][workload][label] for label, gpu in gpus.items()]
            cells = [f"{t[t['binding'] + '_us']:.0f}, {t['binding']}" for t in times]
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def page() -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.document` from the files in `bench/results/`; nothing here is typed by hand.",
        "",
        "`make bench` reproduces the CPU figures, `make gpu` those of a GPU; `python -m bench --help` has the rest.",
        "Providers of a case run interleaved, in a new random order each round, and each is checked against float64",
        "before it is timed: one that is wrong, or runs out of memory, is listed and not timed. Cold: 256 MiB are",
        "written before each call; warm: the same call has just run. Times of different machines or runs do not",
        "compare; the ratios within a case do. GB/s counts each input read once per pass that needs it and each result",
        "written once (the case's units), whatever a provider really moves. `streaming_n` moves n feature maps, that",
        "is all; `autograd_alone` is an operator that computes nothing, forward and backward: what PyTorch itself",
        "takes for one.",
        "`python -m bench --compare before.json after.json --gate 0.1` says what a change did.",
        "",
        "![Ratios](benchmarks/ratios.png)",
        "",
        "![Memory](benchmarks/memory.png)",
        "",
        "![Roofline](benchmarks/roofline.png)",
    ]
    for path in sorted(RESULTS.glob("*/*.json")):
        content = json.loads(path.read_text())
        if "results" not in content or "suite" not in content:
            continue
        machine = content["machine"]
        kept = ", memory kept by the C library" if path.stem.endswith("keep-memory") else ""
        dirty = ", with uncommitted changes" if machine["dirty"] else ""
        lines += [
            "",
            f"## {content['suite']} on {_device(content)}{kept}",
            "",
            f"At commit {machine['commit']}{dirty}.",
        ]
        results = content["results"]
        lines += ["", "Caches cold:", "", *ratio_table(results, with_subject=True)]
        lines += ["", "Caches warm:", "", *ratio_table(results, with_subject=True, caches="warm")]
        for result in results:
            lines += ["", f"### {result['case']['subject']}: {result['title']}", "", *detail_table(result)]
    for path in sorted(RESULTS.glob("*/scaling.json")):
        content = json.loads(path.read_text())
        lines += [
            "",
            f"## Scaling, on {_device(content)}",
            "",
            content["about"],
            "",
            "![Scaling](benchmarks/scaling.png)",
        ]
        for name, points in content["series"].items():
            lines += ["", *scaling_table(name, points)]
    for path in sorted(RESULTS.glob("*/end_to_end.json")):
        content = json.loads(path.read_text())
        lines += ["", f"## A training step, end to end, on {_device(content)}", "", *STEP]
        lines.append(f"![Training steps](benchmarks/end_to_end-{path.parent.name}.png)")
        for model in content["models"]:
            lines += ["", f"### {model['title']}", "", *step_table(model["rows"])]
    lines += static_section(json.loads(STATIC.read_text()))
    return "\n".join(lines) + "\n"


def filled(text: str, sections: Mapping[str, str]) -> str:
    """A page with its generated sections replaced."""
    for name, section in sections.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, s=section: f"{m[1]}{s}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"expected one section {name!r}, got {count}")
    return text


def pages() -> dict[Path, str]:
    """What each page should say."""
    demo, study, short = ((ROOT / "docs" / path).read_text().strip() for path in RESULTS_OF_RUNS)
    return {
        README: filled(README.read_text(), {"demo": demo, "study": short, "bench": readme_section()}),
        STUDY: filled(STUDY.read_text(), {"study": study}),
        PAGE: page(),
    }


def main() -> int:
    """Writes the pages, or says whether they are what the results say."""
    if "--check" in sys.argv:
        return int(any(path.read_text() != text for path, text in pages().items()))
    for path, text in pages().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
