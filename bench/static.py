"""``python -m bench.static``: what the compiled kernels are made of, and how long they will take, without a GPU.

Counts of the loops over channels, per lane and element (where two maps are read, per pair), by class of instruction;
and the times that ``bench.model`` predicts from them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from bench.model import GPUS, Launch, Part, predict, resident_warps


def describe(compiled: Any) -> dict[str, Any]:
    """A compiled kernel's counts, and its predicted times for each workload that it was launched for."""
    from bench.compiled import WALKS, itemsize
    from bench.sass import count

    walk = WALKS[f"{compiled.scenario} {compiled.name}"]
    try:
        code = count(compiled.kernel, *walk, itemsize(compiled))
    except ValueError as error:
        raise ValueError(f"{compiled.key}: {error}") from error
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
        "predicted": {name: times(launch_of(compiled, code, warps, name), compiled) for name in compiled.launches},
    }


def launch_of(compiled: Any, code: Any, resident: int, workload: str) -> Launch:
    """A launch for this workload, as the model takes it."""
    from bench.compiled import CHANNELS, WALKS, WORKLOADS, itemsize

    images, sizes = WORKLOADS[workload]
    reads = WALKS[f"{compiled.scenario} {compiled.name}"].reads
    parts = []
    for size in sizes:
        # The first loop where rows are whole vectors of eight elements, the last where not.
        row = CHANNELS if compiled.layout == "interleaved" else math.prod(size)
        loop, elements = code.loops[-(row % 8 > 0)], images * CHANNELS * math.prod(size)
        read_bytes = reads * elements * itemsize(compiled)
        parts.append(Part(elements, loop.instructions / loop.elements, read_bytes, loop.bytes_in_flight))
    grid, total_bytes = compiled.launches[workload]
    # Each program runs one loop, and what goes with it.
    outside = code.instructions / len(code.loops)
    return Launch(math.prod(grid), code.warps, resident, outside, total_bytes, parts)


def times(launch: Launch, compiled: Any) -> dict[str, Any]:
    """On each GPU of the architecture, in microseconds."""
    found = {name: predict(launch, gpu) for name, gpu in GPUS.items() if gpu.architecture == compiled.architecture}
    return {
        "blocks": launch.blocks,
        "total_bytes": launch.total_bytes,
        **{
            name: {
                "binding": terms.binding,
                **{f"{term}_us": round(1e6 * value, 2) for term, value in terms._asdict().items()},
            }
            for name, terms in found.items()
        },
    }


def count_job(architecture: int, dtype: str, layout: str, only: str) -> dict[str, dict[str, Any]]:
    """The kernels with a loop over channels whose scenario and name contain ``only``."""
    from bench.compiled import SCENARIOS, TOKEN_SCENARIOS, WALKS, WORKLOADS, compile_kernels

    walks = [key for key in WALKS if only in key]
    found = {key.split()[0] for key in walks}
    scenarios = [name for name in [*SCENARIOS, *TOKEN_SCENARIOS] if name in found]
    wanted = {key.split()[1] for key in walks}
    kernels = compile_kernels(architecture, dtype, layout, scenarios, wanted.__contains__, WORKLOADS)
    return {c.key: describe(c) for c in kernels if f"{c.scenario} {c.name}" in walks}


def table(counts: dict[str, dict[str, Any]]) -> str:
    """Counts as text: where rows are whole vectors, then in brackets where not."""
    classes = ["global", "shared", "constant", "float32", "half", "integer", "convert", "shuffle", "tensor"]
    lines = [f"{'per lane and element':66s}{'all':>7s}{'':8s}" + "".join(f"{c[:7]:>9s}" for c in classes)]
    lines[0] += f"{'barriers':>10s}{'registers':>10s}{'spills':>7s}{'shared':>8s}{'warps':>6s}{'KiB':>6s}"
    lines[0] += "  predicted, us"
    for key, entry in counts.items():
        wide = entry["wide"]
        narrow = f"({entry['narrow']['per_element']:.1f})" if "narrow" in entry else ""
        line = f"{key:66s}{wide['per_element']:7.1f}{narrow:>8s}"
        line += "".join(f"{wide['classes'].get(c, 0) / wide['elements']:9.2f}" for c in classes)
        line += f"{wide['barriers']:10d}{entry['registers']:10d}{entry['spill_bytes']:7d}{entry['shared_bytes']:8d}"
        line += f"{entry['resident_warps']:6d}{wide['bytes_in_flight'] / 1024:6.0f}"
        for of_gpus in entry["predicted"].values():
            line += "".join(f"  {gpu} {cell(of_gpus[gpu])}" for gpu in GPUS if gpu in of_gpus)
        lines.append(line)
    return "\n".join(lines)


def cell(terms: dict[str, Any]) -> str:
    """A predicted time with its binding term."""
    return f"{terms[terms['binding'] + '_us']:.0f} {terms['binding']}"


def write(path: Path, counts: dict[str, dict[str, Any]]) -> None:
    """One line for each kernel, so that changes can be read."""
    import triton

    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in counts.items())
    gpus = ",\n".join(f"  {json.dumps(name)}: {json.dumps(gpu._asdict())}" for name, gpu in GPUS.items())
    head = f'"triton": {json.dumps(triton.__version__)}'
    path.write_text(f'{{\n {head},\n "gpus": {{\n{gpus}\n }},\n "kernels": {{\n{lines}\n }}\n}}\n')


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
        write(options.json, counts)
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.exit(main())
