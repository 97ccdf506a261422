"""What the documentation shows runs as it stands, and what it refers to is there."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maskd_kernels
from maskd_kernels import cli

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
BROUGHT_ALONG = {"maskd_kernels", "torch", "random", "time"}


def blocks(page, language):
    """A page's blocks of a language, each with so many lines above it that errors name the page's own."""
    text = (ROOT / page).read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]


def packages(page):
    """What a page imports beside this package, PyTorch and the standard library."""
    nodes = [node for block in blocks(page, "python") for node in ast.walk(ast.parse(block, page))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return sorted({name.split(".")[0] for name in names} - BROUGHT_ALONG)


def run_blocks(page, folder, monkeypatch):
    """A page's Python, in its order, as one reader runs it: what is defined in the end.

    In a folder of its own, beside a copy of the files that ``examples/`` has under the page's name.
    """
    for name in packages(page):
        pytest.importorskip(name, reason="by `make test-models`")
    files = ROOT / "examples" / Path(page).stem
    if files.is_dir():
        shutil.copytree(files, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    names, threads = {"__name__": "page"}, torch.get_num_threads()
    try:
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), names)
    finally:
        torch.set_num_threads(threads)
    return names


@pytest.mark.slow
def test_readme(tmp_path, monkeypatch):
    assert run_blocks("README.md", tmp_path, monkeypatch)["losses"]["maskd"] > 0


@pytest.mark.slow
def test_frameworks(tmp_path, monkeypatch):
    names = run_blocks("docs/frameworks.md", tmp_path, monkeypatch)
    assert all(loss > 0 for loss in names["losses"].values())
    assert (tmp_path / "student" / "model.safetensors").exists()
    trained = names["module"].distiller
    assert all(p.grad is None for p in trained.teacher.parameters())


@pytest.mark.slow
def test_training(tmp_path):
    """As one process of `torchrun`; gloo's threads do not outlive it."""
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks("docs/training.md", "python"), "import os", "os._exit(0)"]))
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, script], cwd=tmp_path, env={**os.environ, **ranks, "PYTHONPATH": path}, check=True)


BY_THEMSELVES = ("README.md", "docs/frameworks.md", "docs/training.md")
OTHERS = [page for page in PAGES if page not in BY_THEMSELVES and blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", OTHERS)
def test_page(page, tmp_path, monkeypatch):
    run_blocks(page, tmp_path, monkeypatch)


def commands(block):
    """The simple commands of a shell block, as words."""
    text = re.sub(r"\\\n", " ", block)
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if not re.match(r"\s*\w+=\$\(", line)]
    for words in filter(None, lines):
        while re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        yield words


def check_program(words):
    """The program that a command starts is there, and knows the options."""
    script = next(word for word in words if word.endswith(".py"))
    sources = [ROOT / script, *(ROOT / script).parent.glob("common.py")]
    text = "".join(path.read_text() for path in sources)
    for option in words[words.index(script) :]:
        assert not option.startswith("--") or f'"{option}"' in text, f"{script} has no {option}"


def check_command(words):
    """What a reader may type from our pages, and nothing else."""
    program, *rest = words
    if program == "pip":
        assert rest[0] == "install"
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), rest[0]
    elif program == "maskd-kernels":
        with pytest.raises(SystemExit, match="0"):
            cli.main([rest[0], "--help"])
    elif program == "python" and rest[0] == "-m":
        assert (ROOT / rest[1].replace(".", "/")).with_suffix(".py").exists() or (ROOT / rest[1]).is_dir(), rest[1]
    else:
        assert program in ("python", "torchrun", "srun"), program
        check_program(rest)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands(page):
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for words in commands(block):
            check_command(words)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links(page):
    """Links to files lead to files, headings included; the site makes them its own (docs/hooks.py)."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", (ROOT / page).read_text(), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor


def test_every_page_is_in_the_site():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        name = page.removeprefix("docs/")
        assert f": {name}\n" in config or name == "demo/results.md", f"{page}: mkdocs.yml has no line for it under nav"


def test_every_public_name_is_in_the_reference():
    reference = "".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/reference/"))
    shown = re.findall(r"^::: maskd_kernels\.(\w+)$", reference, re.M)
    assert sorted(shown) == sorted(set(maskd_kernels.__all__) - {"__version__"})


def test_messages_that_troubleshooting_quotes():
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("| message |")[1]
    sources = "".join(path.read_text() for path in (ROOT / "maskd_kernels" / "distill").glob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(quoted) > 5
    for message in quoted:
        assert message.removesuffix(" …") in sources, message


def test_the_counts_of_traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    published, as_shipped, ours = (
        round(pictures.maps(steps)) for steps in (pictures.published(), pictures.published(True), pictures.OURS)
    )
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    assert re.search(rf"makes {published} maps\..*it is {as_shipped}\. Here it is {ours}\.", page, re.S)
