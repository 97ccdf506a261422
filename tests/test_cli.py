"""The command line, as somebody types it."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import call, fails

from maskd_kernels import backends, cli, native
from maskd_kernels.commands import verify

COMMANDS = ("info", "verify", "bench", "masks", "convert", "demo")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "maskd_kernels.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


# ---- info, and the line itself -----------------------------------------------------------------


def test_info():
    result = run("info", TRITON_INTERPRET="0", MASKD_KERNELS_ISA="baseline")
    assert result.returncode == 0, result.stderr
    for word in ("maskd-kernels", "torch", "MASKD_KERNELS_ISA=baseline", "reference  available", "native", "triton"):
        assert word in result.stdout
    if native.available():
        assert "baseline of" in result.stdout
    if not torch.cuda.is_available():
        assert "GPU none: no CUDA device that torch can use (torch is built " in result.stdout
        if importlib.util.find_spec("triton"):
            assert "triton     missing: there is no CUDA device" in result.stdout


def test_info_for_programs(capsys):
    code, out, _ = call(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["backends"]["native"]["available"] == native.available()
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_commands(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = re.findall(r"maskd-kernels (.*?)(?:  |$)", examples, re.M)
    assert lines
    for line in lines:
        assert cli.parser().parse_args(shlex.split(line)).command == command


@pytest.mark.parametrize(
    "line",
    [
        *("", "nonsense", "bench --size 3", "bench --size ²x3", "bench --batch 0", "bench --seconds nan"),
        *("bench --seconds -1", "bench --seconds ten", "convert", "convert x --to onnx", "verify --backend cuda"),
    ],
)
def test_what_is_no_command_line(capsys, line):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "usage: maskd-kernels" in message
    assert "invalid _" not in message


def test_wrong_environment_is_named(capsys, monkeypatch):
    result = run("info", MASKD_KERNELS_BACKEND="cuda")
    message = "MASKD_KERNELS_BACKEND: expected one of auto, reference, native, triton, got 'cuda'"
    assert (result.returncode, result.stderr) == (1, f"maskd-kernels info: {message}\n")
    if not native.available():
        return
    isas = ", ".join(native.module().isas())
    monkeypatch.setenv("MASKD_KERNELS_ISA", "cuda")
    native._load.cache_clear()
    try:
        assert fails(capsys, "info") == f"MASKD_KERNELS_ISA: expected one of {isas}, got 'cuda'"
    finally:
        native._load.cache_clear()


def test_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "maskd_kernels.cli", "info"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(("where", "code"), [(">&-", 0), (">/dev/full", 1)])
def test_there_is_no_output(where, code):
    command = f"exec {shlex.quote(sys.executable)} -m maskd_kernels.cli info {where}"
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == code
    assert result.stderr == ("maskd-kernels info: No space left on device\n" if code else "")


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="there is nothing long enough to interrupt")
def test_interrupted():
    command = [sys.executable, "-m", "maskd_kernels.cli", "verify", "--backend", "reference", "--backend", "native"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def listen():  # who starts the tests in the background may have them ignore interruptions, and so their children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=listen, **pipes) as process:
        assert process.stdout.readline().startswith("reference")
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (130, "")


# ---- verify ------------------------------------------------------------------------------------


@pytest.fixture
def few_cases(monkeypatch):
    """Two operators, so that a test takes a second."""
    cases = [case for case in verify.cases() if case.name in ("maskd_loss, frozen tokens", "scale_pixels")]
    assert len(cases) == 2
    monkeypatch.setattr(verify, "cases", lambda: cases)


def test_verify(capsys):
    code, out, err = call(capsys, "verify", "--backend", "reference")
    assert (code, err) == (0, "")
    assert re.match(r"reference +62 calls right, the worst other error is \d+% of what is allowed", out)


@pytest.mark.parametrize("fault", ["a value", "a bit", "an error"])
def test_verify_finds_a_broken_kernel(capsys, monkeypatch, few_cases, fault):
    if not native.available():
        pytest.skip(native.why_unavailable())
    calls = []

    class Broken:
        def __getattr__(self, name):
            return getattr(module, name)

        def scale_pixels_forward(self, **arguments):
            module.scale_pixels_forward(**arguments)
            calls.append(1)
            address, code, (n, c, p), *_ = arguments["y"]
            if fault == "an error":
                raise RuntimeError("no such instruction")
            if code == 0 and (fault == "a value" or len(calls) % 2):
                memory = (numpy.ctypeslib.ctypes.c_float * (n * c * p)).from_address(address)
                memory[7] *= 1.001 if fault == "a value" else 1 + 2**-23

    module = native.module()
    monkeypatch.setattr(native, "module", Broken)
    code, out, _ = call(capsys, "verify", "--backend", "native")
    assert code == 1
    expected = {"a value": "off by", "a bit": "a second run gave other bits", "an error": "RuntimeError: no such instr"}
    assert re.search(rf"scale_pixels, float32: .*{expected[fault]}", out)
    assert "maskd_loss, frozen" not in out
    assert out.endswith("something is off: please report it with `maskd-kernels info`\n")


def test_verify_where_a_backend_is_missing(capsys, monkeypatch, few_cases):
    monkeypatch.setattr(native, "why_unavailable", lambda: "no compiler")
    monkeypatch.setattr(backends, "why_no_triton", lambda device: "no GPU")
    code, out, _ = call(capsys, "verify")
    assert code == 0
    assert "skipped: no compiler" in out
    code, out, _ = call(capsys, "verify", "--backend", "native")
    assert code == 1
    assert "missing: no compiler" in out
    assert out.endswith("not all that was asked for runs here\n")


# ---- bench -------------------------------------------------------------------------------------


def test_bench(capsys, tmp_path):
    small = ("--device", "cpu", "--channels", "5", "--size", "6x7", "--seconds", "0")
    code, out, _ = call(capsys, "bench", *small, "--json", tmp_path / "bench.json")
    assert code == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    names = {"published formula", "ours, reference"} | ({"ours, native"} if native.available() else set())
    assert set(written["results"]) == names
    assert not written["dropped"]
    assert all(result["calls"] == 5 and name in out for name, result in written["results"].items())
    message = fails(capsys, "bench", "--device", "cuda") if not torch.cuda.is_available() else "no CUDA device"
    assert "no CUDA device" in message
    assert fails(capsys, "bench", *small, "--json", tmp_path) == f"{tmp_path}: Is a directory"


# ---- demo --------------------------------------------------------------------------------------


def test_demo_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name in ("tqdm", "sklearn") else name)
    assert fails(capsys, "demo") == 'the demo needs sklearn, tqdm: pip install "maskd-kernels[demo]"'


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
