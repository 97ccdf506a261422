"""Before and after: two result files, case by case, by ratios to a floor of the same run, not by times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OURS = ("auto", "native", "triton")


def ratios(path: Path) -> dict[tuple[str, str, str], float]:
    """Our time over that of a 3-unit streaming pass, by subject, case and provider."""
    found: dict[tuple[str, str, str], float] = {}
    for result in json.loads(path.read_text())["results"]:
        providers: dict[str, Any] = result["providers"]
        floor = providers["streaming_3"]["both cold"]["median_ms"]
        for name in OURS:
            if name in providers:
                key = result["case"]["subject"], result["title"], name
                found[key] = providers[name]["both cold"]["median_ms"] / floor
    return found


def compare(before: Path, after: Path, gate: float | None) -> int:
    """Prints both ratios and their quotient; 1 where a gate is given and a case got worse by more than it."""
    old, new = ratios(before), ratios(after)
    failed = 0
    print(f"{'case':58s}{'before':>9s}{'after':>9s}{'change':>9s}   (times a 3-unit streaming pass)")
    for key in sorted(old.keys() & new.keys()):
        change = new[key] / old[key]
        worse = gate is not None and change > 1 + gate
        failed |= worse
        print(f"{' '.join(key):58s}{old[key]:9.2f}{new[key]:9.2f}{change - 1:+9.0%}{'  WORSE' if worse else ''}")
    for key in sorted(old.keys() ^ new.keys()):
        print(f"{' '.join(key):58s} only {'before' if key in old else 'after'}")
    return int(failed)
