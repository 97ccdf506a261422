"""``python -m bench.static``: what the compiled kernels are made of, on any machine, without a GPU.

Counts of the loops over channels, per lane and element (where two maps are read, per pair), by class of instruction.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

REGISTER_FILE, REGISTER_UNIT, MAX_WARPS, MAX_BLOCKS = 65536, 256, 64, 32
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of an SM; each block takes 1 KiB more than it says


def resident_warps(architecture: int, registers: int, shared_bytes: int, warps: int) -> int:
    """That fit an SM at a time."""
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        REGISTER_FILE // of_a_warp // warps, SHARED_BYTES[architecture] // (shared_bytes + 1024), MAX_WARPS // warps
    )
    return min(blocks, MAX_BLOCKS) * warps


def describe(compiled: Any) -> dict[str, Any]:
    """A compiled kernel's counts."""
    from bench.compiled import WALKS
    from bench.sass import count

    walk = WALKS.get(f"{compiled.scenario} {compiled.name}")
    code = count(compiled.kernel, walk.reads if walk else 0, 4 if compiled.dtype == "float32" else 2)
    warps = resident_warps(compiled.architecture, code.registers, code.shared_bytes, code.warps)
    names = ("wide", "narrow") if len(code.loops) > 1 else ("wide",)
    return {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "shared_bytes": code.shared_bytes,
        "warps": code.warps,
        "resident_warps": warps,
        "instructions_outside": code.instructions,
        **{
            name: {
                "per_element": round(loop.instructions / loop.elements, 2),
                "elements": loop.elements,
                "classes": loop.classes,
                "barriers": loop.barriers,
                "shuffles": loop.classes.get("shuffle", 0),
                "bytes_in_flight": loop.bytes_in_flight * 32 * warps,
            }
            for name, loop in zip(names, code.loops, strict=False)
        },
    }


def count_job(architecture: int, dtype: str, layout: str, only: str) -> dict[str, dict[str, Any]]:
    """The kernels with a loop over channels whose scenario and name contain ``only``."""
    from bench.compiled import SCENARIOS, TOKEN_SCENARIOS, WALKS, compile_kernels

    walks = [key for key in WALKS if only in key]
    found = {key.split()[0] for key in walks}
    scenarios = [name for name in [*SCENARIOS, *TOKEN_SCENARIOS] if name in found]
    kernels = compile_kernels(architecture, dtype, layout, scenarios, lambda n: any(k.endswith(n) for k in walks))
    return {c.key: describe(c) for c in kernels if f"{c.scenario} {c.name}" in walks}


def table(counts: dict[str, dict[str, Any]]) -> str:
    """Counts as text: where rows are whole vectors, then in brackets where not."""
    classes = ["global", "shared", "constant", "float32", "half", "integer", "convert", "shuffle", "tensor"]
    lines = [f"{'per lane and element':66s}{'all':>7s}{'':8s}" + "".join(f"{c[:7]:>9s}" for c in classes)]
    lines[0] += f"{'barriers':>10s}{'registers':>10s}{'spills':>7s}{'shared':>8s}{'warps':>6s}{'KiB':>6s}"
    for key, entry in counts.items():
        wide = entry["wide"]
        narrow = f"({entry['narrow']['per_element']:.1f})" if "narrow" in entry else ""
        line = f"{key:66s}{wide['per_element']:7.1f}{narrow:>8s}"
        line += "".join(f"{wide['classes'].get(c, 0) / wide['elements']:9.2f}" for c in classes)
        line += f"{wide['barriers']:10d}{entry['registers']:10d}{entry['spill_bytes']:7d}{entry['shared_bytes']:8d}"
        line += f"{entry['resident_warps']:6d}{wide['bytes_in_flight'] / 1024:6.0f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Counts, prints, writes."""
    from bench.compiled import ARCHITECTURES, DTYPES, LAYOUTS

    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--only", default="", help="scenarios and kernels that contain this: receptive_stats.forward")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="one architecture (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype (default: all)")
    parser.add_argument("--layout", choices=LAYOUTS, help="one layout (default: both)")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    jobs = [
        (architecture, dtype, layout, options.only)
        for architecture in ARCHITECTURES
        for dtype in DTYPES
        for layout in LAYOUTS
        if options.arch in (None, architecture) and options.dtype in (None, dtype) and options.layout in (None, layout)
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), mp_context=context) as pool:
        counts = {k: v for result in pool.map(count_job, *zip(*jobs, strict=True)) for k, v in result.items()}
    print(table(counts))
    if options.json:
        options.json.write_text(json.dumps({"kernels": counts}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.exit(main())
