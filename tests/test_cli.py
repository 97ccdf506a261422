"""The command line, as somebody types it."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch


def run(*arguments, **environment):
    import os

    command = [sys.executable, "-m", "maskd_kernels.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_info():
    result = run("info", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    for word in ("maskd-kernels", "torch", "reference  available", "native", "triton"):
        assert word in result.stdout
    if not torch.cuda.is_available():
        assert "GPU none: no CUDA device that torch can use (torch is built " in result.stdout
        if importlib.util.find_spec("triton"):
            assert "triton     missing: there is no CUDA device" in result.stdout


def test_info_says_which_instruction_set():
    result = run("info", MASKD_KERNELS_ISA="baseline")
    if "native     available" not in result.stdout:
        pytest.skip(result.stdout)
    assert "baseline of" in result.stdout


def test_wrong_environment_is_named():
    result = run("info", MASKD_KERNELS_BACKEND="cuda")
    assert result.returncode != 0
    assert "MASKD_KERNELS_BACKEND: expected one of auto, reference, native, triton, got 'cuda'" in result.stderr


@pytest.mark.slow
def test_demo_runs_and_resumes(tmp_path):
    result = run("demo", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["test_miou"]) == {"teacher", "student alone", "feature MSE", "MasKD", "MGD", "AMD"}
    assert all(0 <= v <= 100 for values in results["test_miou"].values() for v in values)
    for name in ("masks_0.png", "mask_kinds.png", "predictions.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    stages = sorted(p.name for p in (tmp_path / "stages").iterdir())
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "stages").iterdir())]
    again = run("demo", "--quick", "--out", str(tmp_path))
    assert again.returncode == 0, again.stderr[-3000:]
    assert stages == sorted(p.name for p in (tmp_path / "stages").iterdir())
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "stages").iterdir())]
    assert json.loads((tmp_path / "results.json").read_text())["test_miou"] == results["test_miou"]
