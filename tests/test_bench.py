"""The benchmark instrument: it refuses wrong providers, counts what it says, and its gate can fail."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import aligned, scaling
from bench.__main__ import build, measure, prepare, report
from bench.cases import SUITES, Case
from bench.compare import compare
from bench.document import scaling_table
from bench.timing import interleaved

TINY = {
    "maskd": Case("maskd", "tiny", 2, 8, ((9, 7), (4, 3))),
    "mgd": Case("mgd", "tiny", 2, 8, ((9, 7),)),
    "amd": Case("amd", "tiny", 2, 32, ((9, 7),)),
    "scale_pixels": Case("scale_pixels", "tiny", 2, 8, ((9, 7),)),
    "squared_error": Case("squared_error", "tiny", 2, 8, ((9, 7),)),
    "masked_conv": Case("masked_conv", "tiny", 2, 8, ((9, 7),)),
    "attention_stats": Case("attention_stats", "tiny", 2, 8, ((9, 7),)),
}
UNCOMPILED = [
    "published_as_shipped",
    "published",
    "simplified",
    "eager",
    "eager_channels_last",
    "reference",
    "native",
    "convolutions",
]


@pytest.mark.parametrize("name", list(TINY))
def test_every_provider_is_right_and_reported(name):
    result = measure(TINY[name], "cpu", 0.05, UNCOMPILED)
    assert not result["dropped"]
    assert {"reference", "streaming_3"} <= result["providers"].keys()
    assert ("autograd_alone" in result["providers"]) == (name != "attention_stats")
    assert all(p["both cold"]["median_ms"] > 0 for p in result["providers"].values())
    assert result["providers"]["reference"]["peak_extra_bytes"] > 0
    assert f"{name}: tiny, float32" in report(result)
    json.dumps(result)


def test_wrong_providers_are_dropped():
    subject = build(TINY["maskd"], "cpu")
    right = subject.providers["reference"]
    subject.providers = {"right": right, "wrong": lambda: [right()[0] * 1.01]}

    def exhausted():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    subject.providers["large"] = exhausted
    dropped, errors = prepare(subject, TINY["maskd"])
    assert list(subject.providers) == ["right"]
    assert dropped["wrong"].startswith("wrong by 1.0e-02")
    assert dropped["large"] == "out of memory"
    assert errors["right"] < 1e-5


def test_suites_cover_the_papers_shapes():
    everything = [case for cases in SUITES.values() for case in cases]
    assert {(c.batch, c.channels) for c in everything} >= {
        (2, 256),
        (16, 256),
        (2, 19),
        (2, 2048),
        (8, 768),
        (256, 512),
    }
    assert {c.dtype for c in SUITES["maskd"]} == {torch.float32, torch.bfloat16}
    assert {c.channels_last for c in SUITES["maskd"]} == {False, True}
    assert Case("maskd", "", 2, 19, ((64, 128),)).map_bytes == 2 * 19 * 64 * 128 * 4


def test_scaling(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "P4", (5, 4))
    monkeypatch.setattr(scaling, "SIZES", {"pixels": [(3, 4), (5, 4)], "images": [1, 2]})
    monkeypatch.setattr(scaling, "TOKENS", [1, 3])
    monkeypatch.setattr(scaling, "MASKED", [0.5])
    monkeypatch.setattr(scaling, "LARGE", Case("maskd", "tiny", 2, 8, ((5, 4),)))
    monkeypatch.setattr(sys, "argv", ["scaling", "--seconds", "0.01", "--json", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        scaling.main()
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*/scaling.json")
    series = json.loads(path.read_text())["series"]
    assert [p["x"] for p in series["pixels"]] == [12, 20]
    assert [p["x"] for p in series["threads"]] == [1, 2]
    assert set(series["share masked"][0]["times"]) == {"maskd-kernels", "library", "library, channels-last"}
    table = scaling_table("tokens", series["tokens"])
    assert table[2].startswith("| 1 | ")
    assert "| 1.00× |" in table[2]
    assert len(table) == 4


def test_the_bound_of_an_aligned_kernel():
    found = aligned.ratios(4, 8, 5, 7, rounds=2)
    assert found["products"] == 1
    assert found["convolution and loss"] > 0


def result_file(path, ours, floor):
    providers = {
        "native": {"both cold": {"median_ms": ours}},
        "streaming_3": {"both cold": {"median_ms": floor}},
    }
    path.write_text(json.dumps({"results": [{"case": {"subject": "s"}, "title": "t", "providers": providers}]}))
    return path


def test_gate(tmp_path, capsys):
    before = result_file(tmp_path / "before.json", 6.0, 2.0)
    assert compare(before, result_file(tmp_path / "same.json", 9.0, 3.0), 0.1) == 0, "only ratios count"
    assert compare(before, result_file(tmp_path / "slower.json", 7.0, 2.0), None) == 0
    assert compare(before, tmp_path / "slower.json", 0.1) == 1
    assert "WORSE" in capsys.readouterr().out


def test_slow_calls_leave_time_to_fast_ones():
    def takes(milliseconds):
        return lambda: (time.sleep(milliseconds / 1e3), milliseconds)[1]

    timings = interleaved({"slow": takes(50.0), "fast": takes(0.1)}, 0.05, lambda name: 2)
    assert timings["slow"].samples == 2
    assert timings["fast"].samples > 20
    # Milliseconds are what a call returns.
    calls = {"long": lambda: 301.0, "longest": lambda: 1e6, "short": lambda: 299.0}
    timings = interleaved(calls, 0, lambda name: 4, lambda name: 1 if name == "longest" else 3)
    assert {name: t.samples for name, t in timings.items()} == {"long": 3, "longest": 1, "short": 4}
