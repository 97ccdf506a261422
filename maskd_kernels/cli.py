"""The command line: ``maskd-kernels info`` and ``maskd-kernels demo``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from maskd_kernels import __version__, backends, native


def info() -> str:
    """What is installed, which backends run here, and why one does not."""
    lines = [f"maskd-kernels {__version__}", f"Python {platform.python_version()} on {platform.platform()}"]
    for package in ("torch", "triton", "torchvision", "numpy"):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    if torch.cuda.is_available():
        lines.append(f"GPU {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        lines.append(f"GPU none: no CUDA device that torch can use ({built})")
    lines.append(f"backend forced: {backends.current_backend()}")
    lines.append("reference  available: plain PyTorch, any device")
    if native.available():
        module = native.module()
        lines.append(
            f"native     available: C++ kernels for CPU tensors, {module.isa()} of {', '.join(module.isas())}, "
            f"{torch.get_num_threads()} thread(s)"
        )
    else:
        lines.append(f"native     missing: {native.why_unavailable()}")
    reason = backends.why_no_triton("cuda")
    if reason is None and not torch.cuda.is_available():
        reason = "there is no CUDA device" if not backends.interpreting() else None
    lines.append(f"triton     missing: {reason}" if reason else "triton     available: kernels for CUDA tensors")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point."""
    parser = argparse.ArgumentParser(prog="maskd-kernels", description="Fused kernels for masked feature distillation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, which backends run here, and why one does not")
    demo = commands.add_parser("demo", help="distil a segmenter through receptive tokens, start to end")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for results (default: demo_output)")
    demo.add_argument("--quick", action="store_true", help="a minute's run that only proves that everything works")
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    needed = ("torchvision", "sklearn", "matplotlib", "tqdm")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        print(f'the demo needs {", ".join(missing)}: pip install "maskd-kernels[demo]"', file=sys.stderr)
        return 1
    from maskd_kernels import demo as stages

    stages.run(options.out, stages.QUICK if options.quick else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
