"""``maskd-kernels convert`` and ``masks``, as somebody types them."""

import concurrent.futures
import io
import os
import shlex
import sys
from pathlib import Path

import numpy
import pytest
import torch
from helpers import call, fails

from maskd_kernels import MasKDLoss, MasKDSegLoss, MaskModule
from maskd_kernels.losses.checkpoints import FORMATS, as_checkpoint, read_tokens

CITYSCAPES = Path(__file__).parent / "golden/maskd_seg_deeplabv3_r101_cityscapes_tokens.pth"

# ---- convert -----------------------------------------------------------------------------------


def trained(channels, **options):
    """A loss with parameters that nothing else has."""
    loss = MasKDLoss(channels, **options)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter)
    return loss


@pytest.fixture
def pyramid(tmp_path):
    """Tokens of two levels, weighted, inside a larger checkpoint."""
    loss = trained([4, 3], num_tokens=5)
    path = tmp_path / "pyramid.pth"
    state = {f"model.distill.{key}": value for key, value in loss.state_dict().items()}
    torch.save({"state_dict": {**state, "model.prob.0.weight": torch.zeros(2)}, "epoch": 3}, path)
    return path, loss


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def test_convert_says_what_is_there(capsys, pyramid):
    code, out, _ = call(capsys, "convert", pyramid[0])
    assert code == 0
    assert out == (
        "level 0: 5 tokens of 4 channels, float32, with a weighting of masks\n"
        "level 1: 5 tokens of 3 channels, float32, with a weighting of masks\n"
    )


@pytest.mark.parametrize("form", ["detection", "loss"])
def test_convert_a_pyramid(capsys, tmp_path, pyramid, form):
    path, loss = pyramid
    out = tmp_path / "out.pth"
    code, text, _ = call(capsys, "convert", path, "--to", form, "--out", out)
    assert code == 0
    assert text.endswith(f"written to {out}, format {form}\n")
    if form == "loss":
        again = MasKDLoss([4, 3], num_tokens=5)
        again.load_state_dict(torch.load(out, weights_only=True))
        assert_same_state(again.state_dict(), loss.state_dict())
    else:
        state = torch.load(out, weights_only=True)["state_dict"]
        assert all(key.startswith("mask_modules.") for key in state)
        assert_same_state(MasKDLoss([4, 3], num_tokens=5, pretrained=out).state_dict(), loss.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pth", "pyramid.pth"]


def test_convert_the_released_tokens(capsys, tmp_path):
    """There and back, by way of every format."""
    released, source = torch.load(CITYSCAPES, map_location="cpu", weights_only=True), CITYSCAPES
    for form in (*FORMATS, "segmentation"):
        assert call(capsys, "convert", source, "--to", form, "--out", tmp_path / f"{form}.pth")[0] == 0
        source = tmp_path / f"{form}.pth"
    assert_same_state(torch.load(source, weights_only=True), released)
    loss = MasKDSegLoss(19)
    loss.load_state_dict(torch.load(tmp_path / "segmentation-loss.pth", weights_only=True))
    assert torch.equal(loss.mask_module.mask_token, released["mask_token"])
    unweighted = MasKDLoss(19, num_tokens=8, weight_mask=False)
    unweighted.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))


def test_convert_single_levels(capsys, tmp_path, pyramid):
    path, loss = pyramid
    for level in (0, 1):
        out = tmp_path / f"{level}.pth"
        assert call(capsys, "convert", path, "--level", level, "--out", out)[0] == 0
    assert call(capsys, "convert", tmp_path / "0.pth", tmp_path / "1.pth", "--to", "loss", "--out", path)[0] == 0
    assert_same_state(torch.load(path, weights_only=True), loss.state_dict())
    alone = tmp_path / "alone.pth"
    options = ("--level", 1, "--drop-weighting", "--to", "segmentation", "--out", alone)
    assert call(capsys, "convert", path, *options)[0] == 0
    assert_same_state(
        torch.load(alone, weights_only=True), {"mask_token": loss.state_dict()["mask_modules.1.mask_token"]}
    )


def test_convert_leaves_what_is_there_where_writing_fails(capsys, tmp_path, pyramid, monkeypatch):
    path, loss = pyramid
    (tmp_path / "link.pth").symlink_to(path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        message = fails(capsys, "convert", path, "--out", tmp_path / "link.pth")
    assert message == f"{tmp_path / 'link.pth'}: No space left on device"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.pth", "pyramid.pth"]
    assert call(capsys, "convert", path, "--to", "loss", "--out", tmp_path / "link.pth")[0] == 0
    assert (tmp_path / "link.pth").is_symlink()
    assert_same_state(torch.load(path, weights_only=True), loss.state_dict())
    os.mkfifo(tmp_path / "pipe")  # as any device: it is written to, and stays
    with concurrent.futures.ThreadPoolExecutor() as pool:
        content = pool.submit((tmp_path / "pipe").read_bytes)
        assert call(capsys, "convert", path, "--to", "loss", "--out", tmp_path / "pipe")[0] == 0
    assert_same_state(torch.load(io.BytesIO(content.result()), weights_only=True), loss.state_dict())
    assert (tmp_path / "pipe").is_fifo()


def test_tokens_of_a_module_alone(tmp_path):
    module = MaskModule(4, num_tokens=2)
    (level,) = read_tokens(module.state_dict())
    assert_same_state(level, module.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth"], "tokens: no such file: missing.pth"),
        (["."], "tokens: expected a checkpoint file, got a folder: ."),
        (["text.pth"], "tokens: text.pth cannot be read as a checkpoint of tensors alone (weights_only=True): "),
        (["code.pth"], "tokens: code.pth cannot be read as a checkpoint of tensors alone (weights_only=True): "),
        (["list.pth"], "tokens: expected a mapping of names to tensors in list.pth, got list"),
        (["student.pth"], "tokens: no receptive tokens (mask_token) in student.pth, which holds weight"),
        (["two.pth"], "tokens: two.pth holds several tokens of level 0, b.mask_token among them"),
        (["gap.pth"], "tokens: expected levels from 0 on in gap.pth, got 1"),
        (["flat.pth"], "tokens: level 0 of flat.pth: expected mask_token [K, C], floating, got [3]"),
        (["half.pth"], "tokens: level 0 of half.pth: prob.0.bias is missing beside mask_token, prob.0.weight"),
        (["other.pth"], "tokens: level 0 of other.pth: prob.2.bias: expected [2] for 2 tokens of 4 channels, got [3]"),
        (["tokens.pth", "--level", "1"], "--level: expected a level from 0 to 0, got 1"),
        (["tokens.pth", "--to", "segmentation", "--out", "x.pth"], "format: segmentation has no weighting of masks, "),
        (["tokens.pth", "tokens.pth", "--to", "segmentation", "--out", "x.pth"], "format: segmentation holds one lev"),
        (["tokens.pth", "--out", "nowhere/x.pth"], "nowhere/x.pth: No such file or directory"),
        (["tokens.pth", "--out", "."], ".: "),
    ],
)
def test_convert_says_what_is_wrong(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no checkpoint")
    tokens = MaskModule(4, num_tokens=2).state_dict()
    contents = {
        "tokens": tokens,
        "code": {"mask_token": shlex.quote},
        "list": [torch.zeros(2)],
        "student": {"weight": torch.zeros(2)},
        "two": {"a.mask_token": torch.zeros(2, 3), "b.mask_token": torch.zeros(2, 3)},
        "gap": {"mask_modules.1.mask_token": torch.zeros(2, 3)},
        "flat": {"mask_token": torch.zeros(3)},
        "half": {key: tokens[key] for key in ("mask_token", "prob.0.weight")},
        "other": {**tokens, "prob.2.bias": torch.zeros(3)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    before = sorted(tmp_path.iterdir())
    assert fails(capsys, "convert", *arguments).startswith(message)
    assert sorted(tmp_path.iterdir()) == before


# ---- masks -------------------------------------------------------------------------------------

TAUGHT = "single.pth photo.png out.png --teacher"
TEACHER = """
import torch

class Teacher(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.neck = torch.nn.Conv2d(3, 4, 3, 2)
        self.head = torch.nn.Conv2d(4, 2, 1)

    def forward(self, x):
        assert x.min() >= 0 and x.max() <= 1 and not self.training
        return self.head(self.neck(x))

def broken():
    raise KeyError("weights")

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tokens of two levels, features, an image, a teacher."""
    matplotlib = pytest.importorskip("matplotlib.image")
    monkeypatch.chdir(tmp_path)
    levels = [{"mask_token": torch.randn(3, 4)} for _ in range(2)]
    torch.save(as_checkpoint(levels, "detection"), "tokens.pth")
    torch.save(as_checkpoint(levels[:1], "segmentation"), "single.pth")
    torch.save([torch.randn(2, 4, 8, 6), torch.randn(2, 4, 4, 3)], "features.pt")
    torch.save({"p3": torch.randn(2, 4, 8, 6).half(), "p4": torch.randn(2, 4, 4, 3).half()}, "named.pt")
    numpy.save("level.npy", torch.randn(4, 8, 6).numpy())
    matplotlib.imsave("photo.png", numpy.random.default_rng(0).random((20, 30, 3)))
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "a_teacher.py").write_text(TEACHER)
    torch.save(torch.zeros(3), "flat.pt")
    torch.save(torch.randn(2, 5, 8, 6), "wide.pt")
    yield tmp_path
    sys.modules.pop("a_teacher", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("tokens.pth features.pt out.png", "out.png: 3 masks of 8x6 pixels, level 0 of 2"),
        (
            "tokens.pth named.pt out.png --level 1 --index 1 --image photo.png",
            "out.png: 3 masks of 4x3 pixels, level",
        ),
        ("single.pth level.npy out.png", "out.png: 3 masks of 8x6 pixels, level 0 of 1"),
        ("tokens.pth level.npy out.png --level 1", "out.png: 3 masks of 8x6 pixels, level 1 of 2"),
        ("TAUGHT a_teacher:Teacher --layer neck", "out.png: 3 masks of 9x14 pixels"),
    ],
)
def test_masks(capsys, folder, arguments, said):
    code, out, err = call(capsys, "masks", *arguments.replace("TAUGHT", TAUGHT).split())
    assert (code, err) == (0, "")
    assert out.startswith(said)
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.pth features.pt out.png", "tokens: no such file: missing.pth"),
        ("features.pt features.pt out.png", "tokens: expected a mapping of names to tensors in features.pt, got list"),
        ("tokens.pth missing.pt out.png", "missing.pt: No such file or directory"),
        ("tokens.pth text.npy out.png", "text.npy: cannot be read as saved features: "),
        ("tokens.pth text.txt out.png", "text.txt: expected an image, or features in a file that ends in .pt, "),
        ("tokens.pth flat.pt out.png", "flat.pt: expected features of at least three axes"),
        ("tokens.pth level.npy out.png", "the tokens have 2 level(s), the features 1"),
        ("single.pth features.pt out.png", "the tokens have 1 level(s), the features 2"),
        ("tokens.pth features.pt out.png --level 2", "--level: the tokens have levels 0 to 1, got 2"),
        ("tokens.pth features.pt out.png --index 2", "--index: the features hold 2 image(s), got 2"),
        ("single.pth wide.pt out.png", "level 0: expected features [N, 4, H, W] for these tokens, got [2, 5, 8, 6]"),
        ("tokens.pth features.pt nowhere/out.png", "nowhere/out.png: No such file or directory"),
        ("tokens.pth features.pt out.png --image text.txt", "text.txt: expected an image"),
        ("tokens.pth features.pt out.png --layer neck", "--teacher, --layer: features.pt holds features already"),
        ("tokens.pth photo.png out.png", "photo.png is an image: --teacher and --layer say whose features"),
        (
            "TAUGHT a_teacher --layer neck",
            "--teacher: expected package.module:function",
        ),
        (
            "TAUGHT nowhere:x --layer neck",
            "--teacher: nowhere:x: No module named 'nowhe",
        ),
        (
            "TAUGHT a_teacher:x --layer neck",
            "--teacher: a_teacher:x: module 'a_teacher",
        ),
        (
            "TAUGHT a_teacher:broken --layer neck",
            "--teacher: a_teacher:broken raised K",
        ),
        (
            "TAUGHT a_teacher:number --layer neck",
            "--teacher: a_teacher:number: expecte",
        ),
        (
            "TAUGHT a_teacher:Teacher --layer nick",
            "--layer: no layer 'nick' in Teacher",
        ),
    ],
)
def test_masks_says_what_is_wrong(capsys, folder, arguments, message):
    assert fails(capsys, "masks", *arguments.replace("TAUGHT", TAUGHT).split()).startswith(message)
    assert not (folder / "out.png").exists()


def test_masks_without_matplotlib(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = fails(capsys, "masks", "tokens.pth", "features.pt", "out.png")
    assert message == 'plot_masks needs matplotlib: pip install "maskd-kernels[plot]"'
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = fails(capsys, "masks", "single.pth", "photo.png", "out.png", "--teacher", "a_teacher:Teacher")
    assert message == 'reading images needs Pillow: pip install "maskd-kernels[plot]"'
