"""Compiles the kernels for several GPUs and prints, as JSON, what became of them. Run by test_triton_compilation.py."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskd_kernels.triton import receptive_stats as kernels

POINTERS = {
    "forward": ["teacher", "student", "tokens", "customize", "masks", "teacher_masks", "distance", "partials", "sums"],
    "backward": [
        "teacher",
        "student",
        "tokens",
        "masks",
        "teacher_masks",
        "distance",
        "grad_masks",
        "grad_distance",
        "grad_mass",
        "grad_error",
        "grad_gram",
        "grad_sums",
        "grad_teacher",
        "grad_student",
        "partials",
    ],
}
FEATURES = {"teacher", "student", "grad_teacher", "grad_student"}


def specialise(kind, interleaved, dtype, aligned):
    """The kernel with signature, constants, attributes and options as the launcher would have them."""
    family = kind.split("_")[0]
    kernel = kernels.forward_kernel if family == "forward" else kernels.backward_kernel
    align = 8 if aligned else 1
    tokens = kind == "backward_tokens"
    block_c, block_p, warps = kernels.BLOCK_C, kernels.BLOCK_P, kernels.NUM_WARPS
    if family == "backward":
        block_c, block_p, warps = kernels.backward_tile(tokens, 4 if dtype == "fp32" else 2)
    constants = {
        "K": 6,
        "K_PAD": 16,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "ALIGN": align,
        "C_ALIGN": align,
        "P_ALIGN": align,
        "TEACHER_INTERLEAVED": interleaved,
        "STUDENT_INTERLEAVED": interleaved,
        "HAS_STUDENT": True,
        "CUSTOMIZE": False,
    }
    if family == "forward":
        constants |= {"SUMS": True}
    else:
        constants |= {"GRAD_INTERLEAVED": interleaved, "HAS_ERROR": True, "WANT_STUDENT": True}
        constants |= {name: tokens for name in ("HAS_MASS", "HAS_GRAM", "HAS_SUMS", "WANT_TEACHER", "WANT_TOKENS")}
        constants |= {"HAS_MASKS": False, "HAS_DISTANCE": False}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS[family]:
            signature[name] = f"*{dtype}" if name in FEATURES else "*i1" if name == "customize" else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return ASTSource(kernel, signature, constants, attributes), {"num_warps": warps}


def tool(name):
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect(kind, interleaved, dtype, aligned, architecture):
    source, options = specialise(kind, interleaved, dtype, aligned)
    binary = triton.compile(source, GPUTarget("cuda", architecture, 32), options=options)
    ptx = binary.asm["ptx"]
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
        "shared_bytes": binary.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v(?:4\.[bf]32|8\.[bf]32|2\.[bf]64)", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v(?:4\.[bf]32|8\.[bf]32|2\.[bf]64)", ptx)),
    }


def main():
    jobs = {}
    for architecture in (80, 90, 100):
        for kind in ("forward", "backward", "backward_tokens"):
            for layout in ("planar", "interleaved"):
                for dtype in ("fp32", "fp16", "bf16"):
                    name = f"{kind} {layout} {dtype} aligned sm_{architecture}"
                    jobs[name] = (kind, layout == "interleaved", dtype, True, architecture)
            jobs[f"{kind} planar fp32 odd sm_{architecture}"] = (kind, False, "fp32", False, architecture)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: inspect(*job), jobs.values()))
    json.dump(dict(zip(jobs, results, strict=True)), sys.stdout)


if __name__ == "__main__":
    main()
