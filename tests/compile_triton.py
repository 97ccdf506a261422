"""Compiles the kernels for several GPUs and prints, as JSON, what became of them. Run by test_triton_compilation.py.

``--record`` writes the registers each kernel takes to triton_registers.json instead, for a change that means to change
them.
"""

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

from maskd_kernels.triton import attention_stats, receptive_stats, scale_pixels, squared_error
from maskd_kernels.triton.common import STREAM_C, STREAM_P, STREAM_WARPS

REGISTERS = Path(__file__).parent / "triton_registers.json"
FEATURES = {"teacher", "student", "x", "y", "pred", "target", "grad_teacher", "grad_student"}
FEATURES |= {"grad_x", "grad_y", "grad_pred", "grad_target"}
POINTERS = FEATURES | {"tokens", "masks", "teacher_masks", "distance", "partials", "sums", "scale", "attention"}
POINTERS |= {"grad", "grad_masks", "grad_distance", "grad_mass", "grad_error", "grad_gram", "grad_sums", "grad_scale"}
POINTERS |= {"grad_attention", "grad_mean"}
KERNELS = {
    "forward": receptive_stats.forward_kernel,
    "backward": receptive_stats.backward_kernel,
    "backward_tokens": receptive_stats.backward_kernel,
    "scale_pixels_forward": scale_pixels.forward_kernel,
    "scale_pixels_backward": scale_pixels.backward_kernel,
    "squared_error_forward": squared_error.forward_kernel,
    "squared_error_backward": squared_error.backward_kernel,
    "attention_stats_forward": attention_stats.forward_kernel,
    "attention_stats_backward": attention_stats.backward_kernel,
}


def receptive_constants(kind, interleaved, dtype):
    """Constants and warps as the launcher of receptive_stats would have them."""
    tokens = kind == "backward_tokens"
    block_c, block_p, warps = receptive_stats.BLOCK_C, receptive_stats.BLOCK_P, receptive_stats.NUM_WARPS
    if kind != "forward":
        block_c, block_p, warps = receptive_stats.backward_tile(tokens, 4 if dtype == "fp32" else 2)
    constants = {"K": 6, "K_PAD": 16, "BLOCK_C": block_c, "BLOCK_P": block_p, "HAS_STUDENT": True, "CUSTOMIZE": False}
    if kind == "forward":
        constants |= {"SUMS": True}
    else:
        constants |= {"HAS_ERROR": True, "WANT_STUDENT": True, "HAS_MASKS": False, "HAS_DISTANCE": False}
        constants |= {name: tokens for name in ("HAS_MASS", "HAS_GRAM", "HAS_SUMS", "WANT_TEACHER", "WANT_TOKENS")}
    return constants, warps


def specialise(kind, interleaved, dtype, aligned):
    """The kernel with signature, constants, attributes and options as the launcher would have them."""
    kernel = KERNELS[kind]
    if kernel in (receptive_stats.forward_kernel, receptive_stats.backward_kernel):
        constants, warps = receptive_constants(kind, interleaved, dtype)
    else:
        constants, warps = {"BLOCK_C": STREAM_C, "BLOCK_P": STREAM_P, "HAS_SCALE": True}, STREAM_WARPS
        constants |= {"WANT_X": True, "WANT_SCALE": True, "WANT_PRED": True, "WANT_TARGET": False}
    constants |= {name: 8 if aligned else 1 for name in ("ALIGN", "C_ALIGN", "P_ALIGN")}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name.endswith("INTERLEAVED"):
            constants[name] = interleaved
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS or name == "customize":
            signature[name] = f"*{dtype}" if name in FEATURES else "*i1" if name == "customize" else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
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
        for kind in KERNELS:
            for layout in ("planar", "interleaved"):
                for dtype in ("fp32", "fp16", "bf16"):
                    name = f"{kind} {layout} {dtype} aligned sm_{architecture}"
                    jobs[name] = (kind, layout == "interleaved", dtype, True, architecture)
            jobs[f"{kind} planar fp32 odd sm_{architecture}"] = (kind, False, "fp32", False, architecture)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: inspect(*job), jobs.values()))
    if "--record" in sys.argv:
        registers = {name: result["registers"] for name, result in zip(jobs, results, strict=True)}
        content = {"triton": triton.__version__, "registers": registers}
        REGISTERS.write_text(json.dumps(content, indent=1) + "\n")
    else:
        json.dump(dict(zip(jobs, results, strict=True)), sys.stdout)


if __name__ == "__main__":
    main()
