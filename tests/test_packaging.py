"""What an installed package is: builds without Torch, works without a compiler, carries what it says."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import maskd_kernels

ROOT = Path(__file__).parent.parent


def copy_of_the_source(tmp_path):
    """What a fresh clone holds, with what has been changed in this one."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if files.returncode:
        pytest.skip("needs the git checkout: the copy takes the files that git tracks")
    source = tmp_path / "source"
    for name in files.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def install(target, source, **environment):
    """``pip install`` under build isolation, without dependencies."""
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


def run(target, code, **environment):
    """Python beside the checkout, with the installed copy first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(target), **environment}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=target, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


LOSS = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # a development install
import torch, maskd_kernels
from maskd_kernels import native
from maskd_kernels.commands import info
assert maskd_kernels.__file__.startswith({target!r}), maskd_kernels.__file__
student = torch.randn(2, 8, 5, 7, requires_grad=True)
maskd_kernels.MasKDLoss(8)(student, torch.randn(2, 8, 5, 7)).backward()
print(native.available())
print(info.text(info.collect()))
"""


@pytest.mark.slow
def test_install_builds_the_extension_without_torch(tmp_path):
    """From a source distribution. Build isolation has no Torch in it; the extension neither sees nor links it."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, copy_of_the_source(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    install(target, archive, CMAKE_BUILD_TYPE="None")  # compiles in a third of the time
    output = run(target, LOSS.format(target=str(target)))
    assert output.startswith("True")
    (extension,) = target.glob("maskd_kernels/_native*.so")
    needed = subprocess.run(["ldd", extension], capture_output=True, text=True, check=False).stdout
    assert "torch" not in needed
    assert (target / "maskd_kernels" / "py.typed").exists()
    assert list(target.glob("maskd_kernels-*.dist-info/licenses/LICENSE"))
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names >= {"LICENSE", "CITATION.cff", "CHANGELOG.md", "CMakeLists.txt", "tests/kernels/check.cpp"}


@pytest.mark.slow
def test_install_without_a_compiler(tmp_path):
    """It installs all the same, says what is slower, computes by the reference, and ``info`` says why."""
    target = tmp_path / "site"
    log = install(target, copy_of_the_source(tmp_path), CC="/nonexistent", CXX="/nonexistent")
    assert "the C++ kernels were not built" in log
    assert not list(target.glob("maskd_kernels/_native*"))
    output = run(target, LOSS.format(target=str(target)))
    assert output.startswith("False")
    assert "native     missing: the C++ extension could not be loaded" in output


def test_import_needs_nothing_optional():
    """No Triton, no torchvision, no matplotlib and no compiled kernel is touched by the import."""
    optional = ["triton", "torchvision", "matplotlib", "sklearn", "maskd_kernels._native"]
    code = f"import sys, torch, maskd_kernels; print([m for m in {optional} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_version_is_in_one_place():
    from importlib.metadata import version

    assert version("maskd-kernels") == maskd_kernels.__version__


def test_public_names_are_documented():
    for name in maskd_kernels.__all__:
        thing = getattr(maskd_kernels, name)
        if callable(thing):
            assert thing.__doc__, name


def test_docstring_examples():
    import doctest

    from maskd_kernels import backends, functional, streaming
    from maskd_kernels.distill import distiller, tokens
    from maskd_kernels.losses import amd, maskd, mgd

    attempted = 0
    for module in (backends, functional, streaming, distiller, tokens, maskd, mgd, amd):
        result = doctest.testmod(module)
        assert result.failed == 0, module.__name__
        attempted += result.attempted
    assert attempted > 30


def test_figures_come_from_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import document

    for path, text in document.pages().items():
        assert path.read_text() == text, "run python -m bench.document"
