"""Triton's kernels compiled ahead of time, without a GPU: wide loads, no spills, resources within limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore")

ARCHITECTURES = [80, 90, 100]
SHARED_MEMORY_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

KERNELS = ["forward", "backward", "backward_tokens"]  # of receptive_stats
KERNELS += [
    f"{op}_{way}" for op in ("scale_pixels", "squared_error", "attention_stats") for way in ("forward", "backward")
]
ONE_READ = {"attention_stats_forward", "attention_stats_backward", "scale_pixels_forward"}

# In a process of its own: the interpreter, which other tests run, replaces what the compiler needs.
SCRIPT = Path(__file__).parent / "compile_triton.py"


@pytest.fixture(scope="module")
def compiled():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    output = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr[-4000:]
    return json.loads(output.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_aligned(compiled, kernel, layout, dtype, architecture):
    entry = compiled[f"{kernel} {layout} {dtype} aligned sm_{architecture}"]
    assert entry["wide_loads"] >= (1 if kernel in ONE_READ else 2), f"features are not read 128 bits at a time: {entry}"
    assert entry["spills"] == 0, entry
    assert entry["shared_bytes"] <= SHARED_MEMORY_BYTES[architecture]
    assert 0 < entry["registers"] <= 255


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_odd_sizes(compiled, kernel, architecture):
    entry = compiled[f"{kernel} planar fp32 odd sm_{architecture}"]
    assert entry["spills"] == 0, entry


def test_writes_are_wide(compiled):
    for architecture in ARCHITECTURES:
        for kernel in ("backward", "scale_pixels_forward", "squared_error_backward", "attention_stats_backward"):
            entry = compiled[f"{kernel} planar fp32 aligned sm_{architecture}"]
            assert entry["wide_stores"] >= 1, (kernel, entry)


def test_registers_are_the_recorded_ones(compiled):
    """More registers, fewer warps at a time: a change of them is made knowingly."""
    recorded = json.loads((SCRIPT.parent / "triton_registers.json").read_text())
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"recorded with triton {recorded['triton']}, this is {triton.__version__}")
    found = {name: entry["registers"] for name, entry in compiled.items()}
    changed = {name: (recorded["registers"].get(name), n) for name, n in found.items()}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    assert not changed, f"recorded, now: {changed}; if meant: python tests/compile_triton.py --record"
    assert found.keys() == recorded["registers"].keys()
