"""The programs in examples/, with nothing beyond what the demo needs: VOC, since COCO's reader wants pycocotools."""

from __future__ import annotations

import json
import os
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("torchvision", reason="the examples build on torchvision")
pytest.importorskip("sklearn", reason="the generated set is made of scikit-learn's digits")

import common  # noqa: E402
import detection  # noqa: E402
import detection_data  # noqa: E402
import detection_scores  # noqa: E402
import detectors  # noqa: E402
import generated  # noqa: E402
import remembered  # noqa: E402
import study  # noqa: E402
import study_report  # noqa: E402
from PIL import Image  # noqa: E402

# After --data, whose defaults are the papers'.
# fmt: off
SMALL = [
    "--batch", "2", "--epochs", "2", "--device", "cpu", "--optimizer", "sgd", "--lr", "0.001", "--milestones", "1",
    "--no-flip", "--seed", "3",
]
SHAPE = [
    "--teacher-backbone", "mobilenet_v3_small", "--channels", "16", "--levels", "2",
    "--anchor", "8", "--size", "96", "96",
]
# fmt: on


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated.write_digits(tmp_path_factory.mktemp("data") / "digits", {"train": 6, "val": 3})


@pytest.fixture(scope="module")
def voc(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated set as a VOC folder, digits under the names of VOC's first ten classes."""
    root = tmp_path_factory.mktemp("voc")
    year = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        for image in content["images"]:
            name = f"{split}{image['id']}"
            Image.open(coco / split / image["file_name"]).save(year / "JPEGImages" / f"{name}.jpg", format="PNG")
            objects = ""
            for a in content["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
                    label = detection_data.VOC_CLASSES[a["category_id"] - 1]
                    objects += f"<object><name>{label}</name><bndbox>{box}</bndbox></object>"
            (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        names = [f"{split}{image['id']}" for image in content["images"]]
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights, were they trained: with them, batch norm is frozen, as several processes need it."""
    import torchvision

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(voc: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a teacher and tokens."""
    runs = tmp_path_factory.mktemp("runs")
    common_arguments = ["--data", str(voc), "--runs", str(runs), *SMALL]
    detection.main(["teacher", *common_arguments, *SHAPE, "--backbone-weights", str(weights)])
    detection.main(["tokens", *common_arguments])
    return runs


def distil(voc: Path, trained: Path, weights: Path, out: Path, method: str, *more: str) -> dict[str, torch.Tensor]:
    student = ["--student-backbone", "mobilenet_v3_small", "--backbone-weights", str(weights), "--warmup", "2"]
    where = ["--data", str(voc), "--runs", str(trained), "--out", str(out)]
    detection.main(["distil", "--method", method, *where, *student, *SMALL, *more])
    return torch.load(out / "last.pth", weights_only=True)


def test_token_training_reports_and_draws(trained: Path) -> None:
    history = torch.load(trained / "tokens" / "last.pth", weights_only=True)["history"]
    assert len(history) == 2
    for epoch in history:
        assert {"classification", "bbox_regression", "dice", "mean_mask", "total"} <= epoch.keys()
        assert epoch["mean_mask"] == pytest.approx(0.5, abs=0.2)  # tokens begin near 0
        # The mean mask is shown, not minimised.
        parts = [v for k, v in epoch.items() if k not in ("mean_mask", "total")]
        assert epoch["total"] == pytest.approx(sum(parts), rel=1e-4)
    for level in (0, 1):
        assert (trained / "tokens" / f"masks_level_{level}.png").read_bytes().startswith(b"\x89PNG")


def test_digits_are_small_and_boxed_tightly(coco: Path) -> None:
    content = json.loads((coco / "annotations" / "instances_train.json").read_text())
    ink = []
    for image in content["images"]:
        label = np.asarray(Image.open(coco / "train_labels" / image["file_name"]))
        digits = (label > 0) & (label < 255)
        ink.append(digits.mean())
        for a in content["annotations"]:
            if a["image_id"] == image["id"]:
                left, top, width, height = a["bbox"]
                inside = label[top : top + height, left : left + width] == a["category_id"]
                assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
                digits[top : top + height, left : left + width] = False
        assert not digits.any(), "ink outside of every box"
    assert 0.01 < np.mean(ink) < 0.2


def test_sampler_gives_processes_what_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = common.EpochSampler(10, 4, seed=5)
    alone.epoch = 2
    whole = list(alone)
    assert len(whole) == len(alone) == 8
    shares = []
    monkeypatch.setattr(common, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(common, "rank", lambda number=number: number)
        sampler = common.EpochSampler(10, 4, seed=5)
        sampler.epoch = 2
        shares.append(list(sampler))
    assert shares[0][:2] + shares[1][:2] + shares[0][2:] + shares[1][2:] == whole
    alone.epoch = 3
    assert list(alone) != whole
    with pytest.raises(ValueError, match=r"--batch: expected a multiple of the 2 processes, got 5"):
        common.EpochSampler(10, 5, seed=0)


def test_full_disk_leaves_the_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pth"
    common.save({"model": {}, "settings": {}, "epoch": 1}, path)

    def full(_state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        common.save({"epoch": 2}, path)
    assert common.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*last\.pth"):
        common.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"expected a checkpoint of these examples .* found state_dict"):
        common.load(path)
    common.save({"model": {}, "settings": {"method": "mgd", "seed": 1}}, path)
    with pytest.raises(ValueError, match=r"method: expected 'maskd', found 'mgd'$"):
        common.load(path, {"method": "maskd", "seed": 1})


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"instances_train\*\.json.*ImageSets/Main/train\.txt.*pictures"):
        detection_data.Boxes(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        detection_data.Boxes(tmp_path / "nowhere", "train")


def test_package_for_coco(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pycocotools is missing, faster-coco-eval stands in for it."""
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"pip install pycocotools .or faster-coco-eval"):
        detection_data.coco_package()
    other = types.ModuleType("faster_coco_eval")
    other.init_as_pycocotools = lambda: sys.modules.update(pycocotools=other)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faster_coco_eval", other)
    assert detection_data.coco_package() == "faster_coco_eval"
    assert detection_data.coco_package() == "faster_coco_eval"
    monkeypatch.setitem(sys.modules, "pycocotools", types.ModuleType("pycocotools"))
    assert detection_data.coco_package() == "pycocotools"


def test_classes_that_do_not_fit(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"last\.pth knows 20 classes .*, --data has 2"):
        detection.load_detector(trained / "teacher" / "last.pth", torch.device("cpu"), ["a", "b"])


def test_remembered_teacher_is_the_teacher(voc: Path, trained: Path, weights: Path, tmp_path: Path) -> None:
    device, path = torch.device("cpu"), tmp_path / "pyramids.pth"
    teacher, _ = detection.load_detector(trained / "teacher" / "last.pth", device)
    data = detection_data.Boxes(voc, "train")
    images, targets = detection_data.collate([data[i] for i in (4, 0, 3)])
    with torch.no_grad():
        for factor in (1.0, 2.0):  # a teacher that has changed is asked again
            next(teacher.backbone.fpn.parameters()).mul_(factor)
            expected = teacher.backbone(teacher.transform(images)[0].tensors)
            for _ in range(2):  # computed, then read
                levels = remembered.Remembered(teacher, data, path, device)(images, targets)
                assert levels.keys() == expected.keys()
                for name, level in expected.items():
                    torch.testing.assert_close(levels[name], level)
                    spread = (level - level.flip(0)).abs().max()
                    assert (levels[name] - level).abs().max() < spread / 100
    more = ("--box-weight", "0", "--epochs", "1")
    asked = distil(voc, trained, weights, tmp_path / "asked", "mse", *more)
    learned = distil(voc, trained, weights, tmp_path / "learned", "mse", *more, "--remember")
    assert learned["history"][0] == pytest.approx(asked["history"][0], rel=1e-4)
    with pytest.raises(ValueError, match="--remember: expected --no-flip"):
        distil(voc, trained, weights, tmp_path / "flipped", "mse", *more, "--remember", "--flip")
    with pytest.raises(ValueError, match="--remember: expected --box-weight 0"):
        distil(voc, trained, weights, tmp_path / "boxes", "mse", "--box-weight", "1", "--remember")


def test_voc_boxes_and_their_mirror(voc: Path) -> None:
    data, mirrored = (detection_data.Boxes(voc, "train", flip) for flip in (False, True))
    (image, target), (other, flipped) = data[0], mirrored[0, 0.2]
    assert torch.equal(image.flip(2), other)
    assert len(target["boxes"]) > 0
    for box, mirror in zip(target["boxes"].int().tolist(), flipped["boxes"].int().tolist(), strict=True):
        left, top, right, bottom = box
        assert mirror == [96 - right, top, 96 - left, bottom]
    assert torch.equal(mirrored[0, 0.7][0], image)


@pytest.mark.parametrize("detector", detectors.DETECTORS)
def test_student_inherits_neck_and_head(detector: str) -> None:
    architecture = {
        "detector": detector,
        "classes": ["a", "b"],
        "channels": 32,
        "levels": 5,
        "anchor": 8,
        "size": (64, 64),
        "frozen_norm": False,
    }
    teacher, student = detectors.build(architecture, "resnet18"), detectors.build(architecture, "mobilenet_v3_small")
    levels = student.eval().backbone(torch.zeros(1, 3, 64, 64))
    finest = 16 if detector == "faster_rcnn" else 8
    assert [x.shape[2] for x in levels.values()] == [finest // 2**i or 1 for i in range(5)]
    detectors.inherit(student, teacher)
    theirs = teacher.state_dict()
    for key, value in student.state_dict().items():
        if key.startswith(detectors.HEADS[detector]):
            assert torch.equal(value, theirs[key]), key
    body = next(k for k in student.state_dict() if k.startswith("backbone.body."))
    assert body not in theirs or not torch.equal(student.state_dict()[body], theirs[body])


@pytest.mark.parametrize("method", ["maskd", "mgd"])
def test_resumed_run_is_the_uninterrupted_one(
    method: str, voc: Path, trained: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distil(voc, trained, weights, tmp_path / "whole", method)
    kept = common.save

    def interrupted(state: dict, path: Path) -> None:
        kept(state, path)
        if state["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(voc, trained, weights, tmp_path / "parts", method)
    monkeypatch.undo()
    parts = distil(voc, trained, weights, tmp_path / "parts", method, "--resume")
    assert parts["epoch"] == 2
    for part in ("model", "module"):
        assert parts[part].keys() == whole[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(parts[part][key], value), key
    assert parts["history"] == whole["history"]
    with pytest.raises(ValueError, match=r"method: expected 'amd', found '" + method):
        distil(voc, trained, weights, tmp_path / "parts", "amd", "--resume")


@pytest.mark.parametrize("detector", detectors.DETECTORS)
def test_every_detector_is_distilled(detector: str, voc: Path, weights: Path, tmp_path: Path) -> None:
    """Pyramid and boxes, under autocast and clipped: a step moves the student, and the losses are finite."""
    architecture = {
        "detector": detector,
        "classes": detection_data.VOC_CLASSES,
        "channels": 32,
        "levels": 2,
        "anchor": 8,
        "size": (96, 96),
        "frozen_norm": True,
    }
    torch.manual_seed(0)
    teacher = detectors.build(architecture, "mobilenet_v3_small", str(weights))
    settings = {"architecture": architecture, "backbone": "mobilenet_v3_small"}
    common.save({"model": teacher.state_dict(), "settings": settings}, tmp_path / "teacher" / "last.pth")
    more = ["--epochs", "1", "--batch", "6", "--amp", "bf16", "--clip", "1", "--box-weight", "1"]
    state = distil(voc, tmp_path, weights, tmp_path / "amd", "amd", *more)
    (losses,) = state["history"]
    assert {"amd", "boxes", "total"} < losses.keys()
    assert all(np.isfinite(value) and value >= 0 for value in losses.values())
    moved = sum(float((state["model"][k].float() - v.float()).norm()) for k, v in teacher.state_dict().items())
    assert moved > 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _two(number: int, port: int, runs: list[list[str]]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE="2")
    torch.set_num_threads(1)
    for arguments in runs:
        detection.main(arguments)
    common.stop()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(voc: Path, trained: Path, weights: Path, tmp_path: Path) -> None:
    """Tokens and student after four steps on the same global batches, gradients averaged over two gloo ranks."""
    where = ["--data", str(voc), "--runs", str(trained), *SMALL]
    student = ["--student-backbone", "mobilenet_v3_small", "--backbone-weights", str(weights), "--warmup", "2"]

    def runs(folder: str) -> list[list[str]]:
        return [
            ["tokens", *where, "--out", str(tmp_path / folder / "tokens")],
            ["distil", "--method", "maskd", *where, *student, "--out", str(tmp_path / folder / "maskd")],
        ]

    for arguments in runs("one"):
        detection.main(arguments)
    multiprocessing.spawn(_two, (free_port(), runs("two")), nprocs=2)
    for name in ("tokens", "maskd"):
        one, two = (torch.load(tmp_path / f / name / "last.pth", weights_only=True) for f in ("one", "two"))
        for key, value in one["model"].items():
            torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: key + m)
        if name == "maskd":
            assert all(torch.equal(two["module"][k], v) for k, v in one["module"].items() if k.endswith("_iter"))


class Oracle(torch.nn.Module):
    """Finds what is on a picture, but on the last two loses the first digit and shifts the others."""

    def __init__(self, data: detection_data.Boxes) -> None:
        super().__init__()
        self.known = [data[i] for i in range(len(data))]

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for image in images:
            (i,) = (i for i, (other, _) in enumerate(self.known) if torch.equal(image, other))
            boxes, labels = (self.known[i][1][key] for key in ("boxes", "labels"))
            if i > 0:
                boxes, labels = boxes[1:] + 1.5, labels[1:]
            found.append({"boxes": boxes, "labels": labels, "scores": torch.linspace(0.9, 0.5, len(boxes))})
        return found


def _measure(data: detection_data.Boxes) -> dict[str, float]:
    return detection.mean_average_precision(Oracle(data), data, torch.device("cpu"), batch=1)


def _measure_two(number: int, port: int, data: detection_data.Boxes, path: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE="2")
    torch.set_num_threads(1)
    common.start("cpu")
    result = _measure(data)
    if number == 0:
        path.write_text(json.dumps(result))
    common.stop()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(voc: Path, tmp_path: Path) -> None:
    """Of three pictures, one process has two."""
    for package in ("torchmetrics", "pycocotools"):
        pytest.importorskip(package, reason='mAP needs pip install "maskd-kernels[examples]"')
    data = detection_data.Boxes(voc, "val")
    one = _measure(data)
    assert 5 < one["mAP"] < one["mAP50"] < 95
    multiprocessing.spawn(_measure_two, (free_port(), data, tmp_path / "two.json"), nprocs=2)
    assert json.loads((tmp_path / "two.json").read_text()) == pytest.approx(one)


def test_study_chooses_inside_of_what_it_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beside the best one are tried, on validation pictures and with a seed that nothing else has."""
    first = {variant: weight for variant, (_, weight) in study.VARIANTS.items()}
    steps = {"mse": 2, "maskd": -1, "maskd_weighted": 9, "mgd": 4, "amd": -9}  # from the lowest weight to the best
    noise = dict(zip(study.TRIAL_SEEDS, (0.0, 20.0, -20.0), strict=True))  # without the mean every seed's best differs
    seen = []

    def scored(student: tuple[str, float, int], split: str) -> dict[str, float]:
        variant, weight, seed = student
        seen.append((seed, split))
        away = np.log(weight / first[variant]) / np.log(study.STEP) - steps[variant]
        return {"mAP": -abs(away) + noise[seed] * (round(away) % 2)}

    with study.Study(tmp_path, epochs=1, jobs=2, device=None) as runs:
        monkeypatch.setattr(runs, "student", lambda variant, weight, seed: (variant, weight, seed))
        monkeypatch.setattr(runs, "scored", scored)
        trials = runs.trials()
    tried = {
        variant: [round(np.log(w / first[variant]) / np.log(study.STEP)) for w in trials[variant]] for variant in trials
    }
    assert tried == {
        "mse": [0, 1, 2, 3, 4],
        "maskd": [-2, -1, 0, 1, 2, 3, 4],
        "maskd_weighted": [0, 1, 2, 3, 4, 5, 6],  # seven at most
        "mgd": [0, 1, 2, 3, 4, 5],
        "amd": [-2, -1, 0, 1, 2, 3, 4],
    }
    assert set(seen) == {(seed, "val") for seed in study.TRIAL_SEEDS}
    assert not set(study.TRIAL_SEEDS) & set(range(100))


def test_study_takes_differences_in_pairs() -> None:
    """The mean of 1, 1, 1, 2 drawn with replacement is 1 + k/4, k binomial: 1.75 is where 97.5 % are reached."""
    row = study_report.paired([11.0, 21.0, 31.0, 42.0], [10.0, 20.0, 30.0, 40.0])
    half = 3.1824463 * 0.5 / 2  # the quantile of t with three degrees of freedom, standard deviation by the root of 4
    assert row == pytest.approx({"mean": 1.25, "low": 1, "high": 1.75, "t_low": 1.25 - half, "t_high": 1.25 + half})


def test_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    with study.Study(tmp_path, epochs=1, jobs=1, device=None) as runs:
        monkeypatch.setattr(runs, "call", lambda *arguments: calls.append(arguments))
        for name, files in (("new", []), ("begun", ["last.pth"]), ("finished", ["last.pth", "curves.png"])):
            (tmp_path / name).mkdir()
            for file in files:
                (tmp_path / name / file).touch()
            assert runs.trained(tmp_path / name, "distil") == tmp_path / name / "last.pth"
        (tmp_path / "finished" / "val.json").write_text('{"mAP": 12.5}')
        assert runs.scored(tmp_path / "finished" / "last.pth", "val") == {"mAP": 12.5}
    assert calls == [
        ("distil", "--out", str(tmp_path / "new")),
        ("distil", "--out", str(tmp_path / "begun"), "--resume"),
    ]


def test_study_knows_objects_from_background() -> None:
    target = {"boxes": torch.tensor([[8.0, 16.0, 24.0, 32.0]])}
    inside = study_report.inside_boxes(target, (32, 48), (4, 6))
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[2:4, 1:3] = True
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_masks_measured_against_their_definition(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pictures:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return torch.full((3, 8, 8), float(i)), {"boxes": torch.tensor([[0.0, 0.0, 4.0, 8.0]])}

    generator = torch.Generator().manual_seed(0)
    features = {(model, i): torch.randn(1, 4, 2, 2, generator=generator) for model in "ts" for i in (0, 1)}
    monkeypatch.setattr(study_report, "pyramid", lambda model, image: [features[model, int(image[0, 0, 0])]])
    loss = study_report.MasKDLoss(4, num_tokens=3, weight_mask=weighted)
    module = loss.mask_modules[0]
    with torch.no_grad():
        module.mask_token.normal_(0, 1, generator=generator)
        (level,) = study_report.measure("t", "s", loss, Pictures())  # type: ignore[arg-type]
        t = torch.cat([features["t", i] for i in (0, 1)])
        weights = module.forward_prob(t).reshape(2, 3) if weighted else torch.full((2, 3), 1 / 3)
        masks = torch.einsum("kc,nchw->nkhw", module.mask_token.reshape(3, 4), t).sigmoid()
    error = (torch.cat([features["s", i] for i in (0, 1)]) - t).square().sum(1)
    masses = masks.sum((2, 3), keepdim=True)
    combined, pixels = (torch.einsum("nk,nkhw->nhw", weights, m) for m in (masks, masks.square() / masses))
    under = error * pixels
    flat = masks.flatten(2)
    dice = [
        2 * (flat[n, i] * flat[n, j]).sum() / (flat[n, i].square().sum() + flat[n, j].square().sum())
        for n in (0, 1)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert level["tokens_objects"] == pytest.approx(masks[..., 0].mean((0, 2)).tolist(), rel=1e-5)
    assert level["tokens_background"] == pytest.approx(masks[..., 1].mean((0, 2)).tolist(), rel=1e-5)
    assert level["objects"] == pytest.approx(float(combined[..., 0].mean()), rel=1e-5)
    assert level["background"] == pytest.approx(float(combined[..., 1].mean()), rel=1e-5)
    assert level["dice"] == pytest.approx(float(sum(dice) / 6), rel=1e-4)
    assert level["background_error"] == pytest.approx(float(error[..., 1].sum() / error.sum()), rel=1e-5)
    assert level["background_masked_error"] == pytest.approx(float(under[..., 1].sum() / under.sum()), rel=1e-5)
    assert level["emphasis"] == pytest.approx(float(pixels[..., 0].mean() / pixels[..., 1].mean()), rel=1e-5)
    assert level["background_pixels"] == 0.5
    # The loss itself: every pixel's error times its weight.
    value = loss.eval()(*([torch.cat([features[m, i] for i in (0, 1)])] for m in "st"))
    assert float(under.sum()) / (2 * 4) == pytest.approx(float(value), rel=1e-4)


class Finds(torch.nn.Module):
    """A detector that finds the same boxes in every picture."""

    def __init__(self, boxes: list[list[float]], scores: list[float]) -> None:
        super().__init__()
        self.found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores)}
        self.found["labels"] = torch.ones(len(boxes), dtype=torch.int64)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [self.found for _ in images]


def test_what_is_found_in_a_crowd_is_not_judged(tmp_path: Path) -> None:
    """As by COCO's own evaluation; and its areas, of masks, decide what is small."""
    for package in ("torchmetrics", "pycocotools"):
        pytest.importorskip(package, reason='mAP needs pip install "maskd-kernels[examples]"')
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (200, 200)).save(tmp_path / "val" / "0.png")
    run_lengths = {"size": [200, 200], "counts": [20000, 20000]}
    one = {"id": 1, "bbox": [10, 10, 40, 40], "area": 900, "iscrowd": 0, "segmentation": []}
    many = {"id": 2, "bbox": [100, 0, 100, 200], "area": 20000, "iscrowd": 1, "segmentation": run_lengths}
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 200, "height": 200}],
        "annotations": [{**a, "image_id": 1, "category_id": 1} for a in (one, many)],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    data = detection_data.Boxes(tmp_path, "val")
    assert data[0][1]["boxes"].tolist() == [[10, 10, 50, 50]]  # a crowd is not learned
    model = Finds([[110.0, 20, 150, 60], [10, 10, 50, 50]], [0.9, 0.8])
    found = detection_scores.mean_average_precision(model, data, torch.device("cpu"))
    assert found["mAP"] == pytest.approx(100)
    assert found["mAP small"] == pytest.approx(100)  # 40 x 40 pixels are medium, 900 are small
    assert "mAP medium" not in found
    content["annotations"][1]["iscrowd"] = 0
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    judged = detection_scores.mean_average_precision(model, detection_data.Boxes(tmp_path, "val"), torch.device("cpu"))
    assert judged["mAP"] < 60


def test_tokens_are_no_teacher(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    common.save({"settings": {"command": "tokens", "architecture": {"classes": ["a"]}}, "model": {}}, path)
    with pytest.raises(ValueError, match=r"expected a model's checkpoint, got one of the command 'tokens'"):
        detection.load_detector(path, torch.device("cpu"))
