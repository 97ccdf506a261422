"""What the documentation shows runs as it stands."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_blocks(page):
    """A page's Python, in its order, as one reader runs it: what is defined in the end, and the number of blocks."""
    text, names = (ROOT / page).read_text(), {}
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.S))
    for block in blocks:
        lines_above = "\n" * text[: block.start(1)].count("\n")  # so that errors name the page's lines
        exec(compile(lines_above + block[1], page, "exec"), names)
    return names, len(blocks)


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    names, count = run_blocks("README.md")
    assert count == 5
    assert names["losses"]["maskd"] > 0


@pytest.mark.slow
def test_frameworks(tmp_path, monkeypatch):
    for name in ("transformers", "timm", "lightning"):
        pytest.importorskip(name, reason="by `make test-models`")
    monkeypatch.chdir(tmp_path)
    names, count = run_blocks("docs/frameworks.md")
    assert count == 4
    assert (tmp_path / "student" / "model.safetensors").exists()
    trained = names["module"].distiller
    assert all(p.grad is None for p in trained.teacher.parameters())


@pytest.mark.slow
def test_ultralytics(tmp_path, monkeypatch):
    pytest.importorskip("ultralytics", reason="by `make test-models`")
    monkeypatch.chdir(tmp_path)
    names, count = run_blocks("docs/integrations/ultralytics.md")
    assert count == 6
    assert names["losses"]["mgd"] > 0
    assert names["run"].trainer.start_epoch == 1


@pytest.mark.slow
def test_torchdistill(tmp_path, monkeypatch):
    pytest.importorskip("torchdistill", reason="by `make test-models`")
    shutil.copytree(ROOT / "examples/torchdistill", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names, count = run_blocks("docs/integrations/torchdistill.md")
    assert count == 3
    assert names["box"].student_model.blocks["maskd"].loss._iter == 2
