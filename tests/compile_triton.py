"""Compiles what the Triton launchers launch, for architectures that are not there; prints what came out, as JSON.

``--record`` writes the register table.
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.compiled import (
    ARCHITECTURES,
    DTYPES,
    LAYOUTS,
    LEVELS,
    SCENARIOS,
    WALKS,
    compile_kernels,
    install,
    jit_functions,
    loss,
)
from bench.sass import resources
from bench.static import describe
from maskd_kernels import use_backend

COUNTED = [(90, "float32"), (90, "bfloat16")]  # of these every kernel's machine code is counted
HOSTED = ["loss", "scale", "error", "attention"]  # whose work on the host is counted
REGISTERS = Path(__file__).parent / "triton_registers.json"
OTHER_LEVELS = ((5, 5), (16, 16), (8, 10), (1, 1), (40, 40))
# PyTorch's operations that launch nothing on a GPU.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view", "reshape", "slice"}
NO_LAUNCH |= {"as_strided", "select", "unbind", "detach", "alias", "flatten", "expand", "unsqueeze"}


def launches_of_pytorch(call):
    """PyTorch's own operations that a call runs and that would launch a kernel on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    operations = [e for e in profile.events() if e.name.startswith("aten::")]
    outermost = [e for e in operations if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return [e.name for e in outermost if e.name.removeprefix("aten::") not in NO_LAUNCH]


def inspect(kernel):
    ptx, used = kernel.asm["ptx"], resources(kernel.asm["cubin"])
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        # Into registers, or 16 bytes at a time into shared memory.
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v(?:4\.[bf]32|8\.[bf]32|2\.[bf]64)|cp\.async\.cg", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v(?:4\.[bf]32|8\.[bf]32|2\.[bf]64)", ptx)),
    }


def compile_all(architecture, dtype, layout):
    """What each scenario launched, looked into; and what of it is counted."""
    found = list(compile_kernels(architecture, dtype, layout, SCENARIOS))
    walks = [c for c in found if f"{c.scenario} {c.name}" in WALKS and (architecture, dtype) in COUNTED]
    return {c.key: inspect(c.kernel) for c in found}, {c.key: describe(c) for c in walks}


def compiled_anew():
    """Kernels that a change of image sizes compiles again."""
    install(90)

    def count(sizes):
        for run in SCENARIOS.values():
            run(torch.bfloat16, False, sizes=sizes)()
        return {name: len(f.device_caches[90][0]) for name, f in jit_functions().items()}

    with use_backend("triton"):
        before, after = count(LEVELS), count(OTHER_LEVELS)
    return [name for name in before if before[name] != after[name]]


def launches_of_a_pyramid():
    """Everything that the loss over a pyramid launches, forward and backward: ours, and PyTorch's."""
    driver = install(90)
    with use_backend("triton"):
        others = launches_of_pytorch(loss(torch.bfloat16, False))
    return [*driver.launches, *others]


def calls_of_the_host():
    """Calls of Python functions in a call of each scenario, forward and backward, that is not the first."""
    install(90).launcher_cls = lambda source, metadata: lambda *arguments: None
    counts = {}
    for name in HOSTED:
        run, calls = SCENARIOS[name](torch.bfloat16, False), []
        with use_backend("triton"):
            run()
            sys.setprofile(lambda frame, event, _, calls=calls: calls.append(event))
            run()
            sys.setprofile(None)
        counts[name] = calls.count("call")
    return counts


def main():
    jobs = list(itertools.product(ARCHITECTURES, DTYPES, LAYOUTS))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        results, counts = {}, {}
        for kernels, counted in pool.map(compile_all, *zip(*jobs, strict=True)):
            results |= kernels
            counts |= counted
        functions = launches_of_a_pyramid, compiled_anew, calls_of_the_host
        launches, anew, calls = (pool.submit(function).result() for function in functions)
    if "--record" in sys.argv:
        content = {"triton": triton.__version__, "registers": {k: v["registers"] for k, v in results.items()}}
        REGISTERS.write_text(json.dumps(content, indent=1) + "\n")
    else:
        output = {"kernels": results, "counts": counts, "launches": launches, "compiled_anew": anew, "calls": calls}
        json.dump(output, sys.stdout)


if __name__ == "__main__":
    main()
