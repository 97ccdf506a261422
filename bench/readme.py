"""``python -m bench.readme``: writes the README's figures from the committed results. ``--check`` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DEMO = ROOT / "docs" / "demo" / "results.md"


def _row(result: dict[str, Any]) -> str:
    providers = result["providers"]
    mine = providers["native"]["median_ms"]
    cells = [result["case"]["name"]]
    for name in ("published_as_shipped", "published", "simplified_compiled"):
        cells.append(f"{providers[name]['median_ms'] / mine:.1f}×" if name in providers else "wrong")
    cells.append(f"{mine / providers['streaming']['median_ms']:.1f}×")
    for name in ("native", "published"):
        peak = providers[name]["peak_extra_bytes"] / result["map_bytes"] if name in providers else float("nan")
        cells.append(f"{peak:.2f}")
    return "| " + " | ".join(cells) + " |"


def bench_section() -> str:
    """The tables of the CPU benches, one per allocator setting."""
    lines = [
        "The loss of one level, forward and backward, two threads, tokens frozen. How many times faster than: the",
        "published formula as shipped (its module's parameters get gradients), the same frozen, and the simplified",
        "formula (no channel axis in the masks, no convolution) under `torch.compile`. Then our time over that of a",
        "pass that reads two maps, writes one into memory already at hand and does nothing else; and the peak of",
        "extra memory, in feature maps.",
    ]
    for path in sorted((ROOT / "bench" / "results").glob("*/receptive_stats*.json"), reverse=True):
        content = json.loads(path.read_text())
        machine = content["machine"]
        if machine["gpu"]:
            continue
        kept = "keep-memory" in path.name
        memory = "memory kept by the C library (`--keep-memory`)" if kept else "the C library's default memory mapping"
        lines += ["", f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}, {memory}:", ""]
        lines += [
            "| case | as shipped | published | simplified, compiled | over a streaming pass | peak, ours | published |"
        ]
        lines += ["|" + "---|" * 7] + [_row(result) for result in content["results"]]
    lines += ["", "`make bench` reproduces both; medians, spread, versions and commit are in `bench/results/`."]
    return "\n".join(lines)


def filled(text: str) -> str:
    """The README with both sections replaced."""
    sections = {"demo": DEMO.read_text().strip(), "bench": bench_section()}
    for name, section in sections.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, s=section: f"{m[1]}{s}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md: expected one section {name!r}, got {count}")
    return text


def main() -> int:
    text = README.read_text()
    if "--check" in sys.argv:
        return int(filled(text) != text)
    README.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
