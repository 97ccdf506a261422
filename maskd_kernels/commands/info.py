"""``maskd-kernels info``: what is installed, which backends run here, and why one does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from maskd_kernels import __version__, backends, native

NEEDED = ("torch", "numpy", "triton")  # named also where they are missing
BESIDE = (
    *("torchvision", "matplotlib", "ultralytics", "torchdistill", "mmengine", "mmdet", "mmrazor"),
    *("transformers", "timm", "lightning"),
)
VARIABLES = (
    *("MASKD_KERNELS_BACKEND", "MASKD_KERNELS_ISA", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found
    ]


def collect() -> dict[str, Any]:
    """Everything, as JSON takes it."""
    forced = backends.current_backend()
    missing = native.why_unavailable()
    about_native: dict[str, Any] = {"available": missing is None, "reason": missing}
    if missing is None:
        module = native.module()
        about_native |= {"isa": module.isa(), "isas": list(module.isas())}
    reason = backends.why_no_triton("cuda")
    if reason is None and not torch.cuda.is_available() and not backends.interpreting():
        reason = "there is no CUDA device"
    return {
        "maskd-kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in NEEDED}
        | {n: v for n in BESIDE if (v := _version(n)) is not None},
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "forced": forced,
        "backends": {
            "reference": {"available": True, "reason": None},
            "native": about_native,
            "triton": {
                "available": reason is None,
                "reason": reason,
                "interpreted": reason is None and backends.interpreting(),
            },
        },
    }


def text(found: dict[str, Any]) -> str:
    """The same for reading."""
    lines = [f"maskd-kernels {found['maskd-kernels']}", f"Python {found['python']} on {found['platform']}"]
    lines += [f"{name} {version or 'not installed'}" for name, version in found["packages"].items()]
    lines.append(f"processor {found['processor']}, {found['threads']} thread(s)")
    for gpu in found["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(f"GPU {gpu['name']}, capability {gpu['capability']}, {memory}, CUDA {found['cuda']}")
    if not found["gpus"]:
        built = f"torch is built for CUDA {found['cuda']}" if found["cuda"] else "torch is built without CUDA"
        lines.append(f"GPU none: no CUDA device that torch can use ({built})")
    lines += [f"{name}={value}" for name, value in found["environment"].items()]
    lines.append(f"backend forced: {found['forced']}")
    about, triton = found["backends"]["native"], found["backends"]["triton"]
    lines.append("reference  available: plain PyTorch, any device")
    if about["available"]:
        lines.append(f"native     available: C++ kernels for CPU tensors, {about['isa']} of {', '.join(about['isas'])}")
    else:
        lines.append(f"native     missing: {about['reason']}")
    if triton["available"]:
        how = "by Triton's interpreter, slowly" if triton["interpreted"] else "for CUDA tensors"
        lines.append(f"triton     available: kernels {how}")
    else:
        lines.append(f"triton     missing: {triton['reason']}")
    return "\n".join(lines)
