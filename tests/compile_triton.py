"""Compiles what the Triton launchers launch, for architectures that are not there; prints what came out, as JSON.

``--record`` writes the register table.
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
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
    compile_kernels,
    install,
    jit_functions,
    loss,
)
from bench.sass import tool
from maskd_kernels import use_backend

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


def inspect(kernel, architecture):
    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        assembler = tool("ptxas-blackwell") if architecture >= 100 else tool("ptxas")
        command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", usage).group(1)),
        "spills": sum(int(count) for count in re.findall(r"(\d+) bytes spill", usage)),
        "shared_bytes": kernel.metadata.shared,
        # Into registers, or 16 bytes at a time into shared memory.
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v(?:4\.[bf]32|8\.[bf]32|2\.[bf]64)|cp\.async\.cg", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v(?:4\.[bf]32|8\.[bf]32|2\.[bf]64)", ptx)),
    }


def compile_all(architecture, dtype, layout):
    """What each scenario launched, looked into."""
    return {c.key: inspect(c.kernel, architecture) for c in compile_kernels(architecture, dtype, layout, SCENARIOS)}


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


def main():
    jobs = list(itertools.product(ARCHITECTURES, DTYPES, LAYOUTS))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        results = {k: v for result in pool.map(compile_all, *zip(*jobs, strict=True)) for k, v in result.items()}
        launches, anew = pool.submit(launches_of_a_pyramid).result(), pool.submit(compiled_anew).result()
    if "--record" in sys.argv:
        content = {"triton": triton.__version__, "registers": {k: v["registers"] for k, v in results.items()}}
        REGISTERS.write_text(json.dumps(content, indent=1) + "\n")
    else:
        json.dump({"kernels": results, "launches": launches, "compiled_anew": anew}, sys.stdout)


if __name__ == "__main__":
    main()
