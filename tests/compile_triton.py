"""Compiles what the Triton launchers launch, for architectures that are not there; prints what came out, as JSON.

The operators run as they would on a GPU, with a stand-in for Triton's driver that compiles and launches nothing: what
is looked at are the very kernels, arguments and specialisations that users get. ``--record`` writes the register table.
"""

import concurrent.futures
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from maskd_kernels import MaskModule, backends, functional, use_backend
from maskd_kernels import triton as kernels
from maskd_kernels.ops.attention_stats import attention_stats
from maskd_kernels.ops.scale_pixels import scale_pixels
from maskd_kernels.ops.squared_error import squared_error

REGISTERS = Path(__file__).parent / "triton_registers.json"
LEVELS = ((8, 16), (4, 8), (5, 5), (3, 3), (1, 2))  # some in rows of whole vectors, some not
OTHER_LEVELS = ((5, 5), (16, 16), (8, 10), (1, 1), (40, 40))
CHANNELS = 256
# PyTorch's operations that launch nothing on a GPU.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view", "reshape", "slice"}
NO_LAUNCH |= {"as_strided", "select", "unbind", "detach", "alias", "flatten", "expand", "unsqueeze"}


def jit_functions():
    """Every Triton kernel, by name."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]
    modules = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    return {
        f"{name}.{attribute}": value
        for name, module in modules.items()
        for attribute, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.module == module.__name__
    }


class Driver:
    """What Triton asks of its driver. Compiles for ``architecture``, and remembers what was launched."""

    def __init__(self, architecture):
        self.architecture, self.launches = architecture, []
        limits = {"max_shared_mem": 1 << 30}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits, load_binary=lambda *_: (object(), 0, 0, 0, 1024)
        )

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *_: self.launches.append(source.fn.__name__)


def pyramid(dtype, interleaved, grad=False, sizes=LEVELS):
    maps = [torch.zeros(2, CHANNELS, *size, dtype=dtype) for size in sizes]
    if interleaved:
        maps = [x.to(memory_format=torch.channels_last) for x in maps]
    return [x.requires_grad_(grad) for x in maps]


def loss(dtype, interleaved, train_all=False, sizes=LEVELS):
    modules = [MaskModule(CHANNELS, 6).requires_grad_(train_all) for _ in sizes]
    weighting = [m.weighting for m in modules]
    tokens = [m.mask_token for m in modules]
    student, teacher = (pyramid(dtype, interleaved, grad, sizes) for grad in (True, train_all))
    return lambda: functional.maskd_loss(student, teacher, tokens, weighting=weighting).backward()


def scale(dtype, interleaved, sizes=LEVELS):
    factors = [torch.ones(2, *size, requires_grad=True) for size in sizes]
    x, gradients = (pyramid(dtype, interleaved, grad, sizes) for grad in (True, False))
    return lambda: torch.autograd.backward(scale_pixels(x, factors), gradients)


def error(dtype, interleaved, sizes=LEVELS):
    factors = [torch.ones(2, CHANNELS, requires_grad=True) for _ in sizes]
    pred, target = (pyramid(dtype, interleaved, grad, sizes) for grad in (True, False))
    return lambda: squared_error(pred, target, factors).sum().backward()


def attention(dtype, interleaved, sizes=LEVELS):
    x = pyramid(dtype, interleaved, True, sizes)
    gradients = [torch.ones(2, *size) for size in sizes] + [torch.ones(2, CHANNELS) for _ in sizes]
    return lambda: torch.autograd.backward([y for level in attention_stats(x) for y in level], gradients)


SCENARIOS = {
    "loss": loss,
    "tokens": functools.partial(loss, train_all=True),
    "scale": scale,
    "error": error,
    "attention": attention,
}


def launches_of_pytorch(call):
    """PyTorch's own operations that a call runs and that would launch a kernel on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    operations = [e for e in profile.events() if e.name.startswith("aten::")]
    outermost = [e for e in operations if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return [e.name for e in outermost if e.name.removeprefix("aten::") not in NO_LAUNCH]


def tool(name):
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


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
    backends.why_no_triton = lambda device_type: None
    driver.set_active(Driver(architecture))
    results = {}
    for scenario, run in SCENARIOS.items():
        for function in jit_functions().values():
            function.device_caches.clear()
        with use_backend("triton"):
            run(getattr(torch, dtype), layout == "interleaved")()
        for name, function in jit_functions().items():
            for i, kernel in enumerate(function.device_caches[architecture][0].values()):
                key = f"{scenario} {name}{i or ''} {layout} {dtype} sm_{architecture}"
                results[key] = inspect(kernel, architecture)
    return results


def compiled_anew():
    """Kernels that a change of image sizes compiles again."""
    backends.why_no_triton = lambda device_type: None
    driver.set_active(Driver(90))

    def count(sizes):
        for run in SCENARIOS.values():
            run(torch.bfloat16, False, sizes=sizes)()
        return {name: len(f.device_caches[90][0]) for name, f in jit_functions().items()}

    with use_backend("triton"):
        before, after = count(LEVELS), count(OTHER_LEVELS)
    return [name for name in before if before[name] != after[name]]


def launches_of_a_pyramid():
    """Everything that the loss over a pyramid launches, forward and backward: ours, and PyTorch's."""
    backends.why_no_triton = lambda device_type: None
    driver.set_active(Driver(90))
    with use_backend("triton"):
        others = launches_of_pytorch(loss(torch.bfloat16, False))
    return [*driver.active.launches, *others]


def main():
    jobs = list(itertools.product((80, 90, 100), ("float32", "float16", "bfloat16"), ("planar", "interleaved")))
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
