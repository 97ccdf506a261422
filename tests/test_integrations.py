"""Adapters against the real packages' own trainers, on data made here; ``make test-models`` brings the packages."""

import copy
import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskd_kernels import MasKDLoss
from maskd_kernels.losses.checkpoints import read_state

ADAPTED = ("ultralytics", "torchdistill", "transformers", "mmengine")


@pytest.mark.parametrize("package", ADAPTED)
def test_missing_package_is_named(package):
    """Where it is not installed; and the package itself imports none of them."""
    script = f"""
import sys
sys.modules[{package!r}] = None
import maskd_kernels
assert not {set(ADAPTED)} & {{name for name, module in sys.modules.items() if module}}
try:
    import maskd_kernels.integrations.{package}
except ImportError as error:
    assert "pip install '{package}" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def with_statistics(model):
    """In eval mode, with statistics of some noise: without, an untrained network's features vanish or explode."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 64, 64))
    return model.eval()


# ---- Ultralytics -------------------------------------------------------------------------------


class StopHereError(Exception):
    """Ends a run from a callback, as a crash would."""


@pytest.fixture(scope="module")
def yolo(tmp_path_factory):
    """A folder with eight pictures of two classes, and an untrained teacher in a file."""
    pytest.importorskip("ultralytics", reason="by `make test-models`")
    import cv2
    import numpy as np
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    root, random = tmp_path_factory.mktemp("yolo"), np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for i in range(8):
        picture, lines = random.integers(0, 60, (96, 96, 3), dtype=np.uint8), []
        for kind in range(2):
            x, y = random.integers(0, 64, 2)
            picture[y : y + 32, x : x + 32, kind] = 220
            corners = [(x, y), (x + 32, y), (x + 32, y + 32), (x, y + 32)]  # boxes for detectors, polygons for masks
            lines.append(" ".join([str(kind), *(f"{u / 96} {v / 96}" for u, v in corners)]))
        cv2.imwrite(str(root / f"images/{i}.png"), picture)
        (root / f"labels/{i}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images\nval: images\nnames: {{0: a, 1: b}}\n")
    torch.manual_seed(0)
    teacher = YOLO("yolo26s.yaml")
    teacher.model = with_statistics(DetectionModel("yolo26s.yaml", nc=2, verbose=False))
    for head in (teacher.model.model[-1].cv3, teacher.model.model[-1].one2one_cv3):
        for level in head:  # scores that differ from pixel to pixel, and between the two heads
            torch.nn.init.normal_(level[-1].weight, std=0.1)
            torch.nn.init.zeros_(level[-1].bias)
    teacher.save(root / "teacher.pt")
    return root


def settings(root, **others):
    quiet = {"plots": False, "verbose": False, "exist_ok": True, "project": str(root / "runs")}
    every_batch = {"imgsz": 64, "batch": 4, "nbs": 4, "warmup_epochs": 0}  # is a step
    return {"data": str(root / "data.yaml"), "device": "cpu", "epochs": 1, **every_batch, **quiet, **others}


def train(root, method, callbacks=None, model="yolo26n.yaml", *, options=None, **others):
    """Ultralytics' own training of a small student; the YOLO."""
    from ultralytics import YOLO

    from maskd_kernels.integrations.ultralytics import trainer

    student = YOLO(str(model))
    for event, callback in (callbacks or {}).items():
        student.add_callback(event, callback)
    arguments = settings(root, name=method, **others)
    student.train(**arguments, trainer=trainer(root / "teacher.pt", method, **(options or {})))
    return student


def distillation(trainer):
    """What is trained beside the student."""
    parts = {"aligns": trainer.model.distiller.aligns, "losses": trainer.model.distiller.losses}
    return {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maskd", "mgd", "amd", "scores"])
def test_yolo_trains(yolo, method, tmp_path):
    """By its trainer: the loss shown and learned from, and checkpoints that know nothing of us."""
    seen = {}

    def at_start(trainer):
        seen["before"] = {name: x.clone() for name, x in distillation(trainer).items()}

    def at_end(trainer):
        seen["header"], seen["after"], seen["ema"] = trainer.progress_string(), distillation(trainer), trainer.ema.ema
        seen["trained"] = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        seen["learning"] = [*trainer.model.distiller.trainable_parameters()]

    options = {"weight_mask": False, "train_tokens": False} if method == "maskd" else {}
    train(yolo, method, {"on_train_start": at_start, "on_train_epoch_end": at_end}, options=options)
    assert "dis_loss" in seen["header"]
    assert {id(p) for p in seen["learning"]} <= seen["trained"]
    changed = {name for name, x in seen["after"].items() if not torch.equal(x, seen["before"][name])}
    fixed = {name for name in seen["after"] if "mask_token" in name}
    assert changed == seen["after"].keys() - fixed
    with open(yolo / f"runs/{method}/results.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train/dis_loss"]) > 0

    files = [str(yolo / "runs" / method / "weights" / name) for name in ("last.pt", "best.pt")]
    script = f"""
import sys, torch
sys.modules["maskd_kernels"] = None
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
wanted = DetectionModel("yolo26n.yaml", nc=2, verbose=False)
for file in {files}:
    model = YOLO(file)
    assert type(model.model) is DetectionModel
    assert model.model.state_dict().keys() == wanted.state_dict().keys()
    assert not vars(model.model).keys() & {{"distiller", "distillation"}}
    model.predict(torch.rand(1, 3, 64, 64), verbose=False)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_yolo_scores_are_its_own_loss(yolo):
    """Value and gradients of a whole step against the package's ``distill_model``, given the same projectors."""
    package = pytest.importorskip("ultralytics.nn.distill_model", reason="a release without distill_model")
    seen = {}

    def compare(trainer):
        torch.manual_seed(0)
        plain = copy.deepcopy(trainer.model)
        theirs = package.DistillationModel(teacher_model=str(yolo / "teacher.pt"), student_model=plain)
        ours = trainer.model
        theirs.projector.load_state_dict(ours.distiller.aligns[0][:3].state_dict())
        batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
        for model in (ours.train(), theirs.train()):
            loss, items = model(batch)
            loss.sum().backward()
            seen[model] = loss, items
        (a, a_items), (b, b_items) = seen[ours], seen[theirs]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        assert a_items["dis_loss"] > 0
        torch.testing.assert_close(a_items, {**b_items, "dis_loss": b_items["dis_loss"].squeeze()}, rtol=1e-5, atol=0)
        gradients = [dict(ours.named_parameters()), dict(plain.named_parameters())]
        gradients[1].update({f"distillation.0.{k}": p for k, p in theirs.projector.named_parameters()})
        assert gradients[0].keys() == gradients[1].keys()
        largest = max(p.grad.norm() for p in gradients[0].values())  # some are zero but for rounding
        for name, p in gradients[0].items():
            error = (p.grad - gradients[1][name].grad).norm()
            assert error <= 1e-5 * p.grad.norm() + 1e-6 * largest, name
        raise StopHereError

    with pytest.raises(StopHereError):
        train(yolo, "scores", {"on_train_start": compare})


@pytest.mark.slow
def test_yolo_resumes_with_what_it_has_learned(yolo):
    options, seen = {"custom_mask_warmup": 1}, {}

    def crash(trainer):
        if trainer.epoch == 1:
            seen["before"] = {name: x.clone() for name, x in distillation(trainer).items()}
            raise StopHereError

    with pytest.raises(StopHereError):
        train(yolo, "maskd", {"on_fit_epoch_end": crash}, options=options, epochs=3)
    last = yolo / "runs/maskd/weights/last.pt"
    assert type(torch.load(last, weights_only=False)["ema"]).__module__ == "ultralytics.nn.tasks"

    def resumed(trainer):
        seen["epoch"], seen["after"] = trainer.start_epoch, copy.deepcopy(distillation(trainer))

    train(yolo, "maskd", {"on_train_start": resumed}, model=last, options=options, resume=True)
    assert seen["epoch"] == 2
    assert seen["before"]["losses.0._iter"] > 2
    torch.testing.assert_close(seen["after"], seen["before"], rtol=0, atol=0)


@pytest.mark.slow
def test_yolo_recovers_from_nan(yolo):
    """As Ultralytics does, from its last checkpoint; the distillation's parameters too."""

    def poison(trainer):
        if trainer.epoch == 1 and not trainer.nan_recovery_attempts:
            with torch.no_grad():
                trainer.model.distiller.losses[0].generation[0][0].weight.fill_(torch.nan)

    seen = []

    def look(trainer):
        seen.append(trainer.loss.isfinite().item())

    train(yolo, "mgd", {"on_train_epoch_start": poison, "on_train_epoch_end": look}, epochs=2)
    assert seen == [True, False, True]


@pytest.mark.slow
def test_yolo_at_several_sizes_with_frozen_layers_and_autocast(yolo):
    """Its own AMP needs CUDA; a step under autocast runs on a CPU too."""
    seen = {"sizes": set()}

    def start(trainer):
        seen["before"] = copy.deepcopy(trainer.model.state_dict())
        trainer.model.train()
        batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
        with torch.autocast("cpu", torch.bfloat16):
            loss, items = trainer.model(batch)
        seen["autocast"] = items["dis_loss"]
        loss.sum().backward()
        seen["gradients"] = [p.grad for p in trainer.model.distillation.parameters()]
        trainer.optimizer.zero_grad()
        trainer.model.model[0].register_forward_pre_hook(lambda _layer, inputs: seen["sizes"].add(inputs[0].shape[-1]))

    def end(trainer):
        seen["after"] = trainer.model.state_dict()

    train(yolo, "mgd", {"on_train_start": start, "on_train_epoch_end": end}, epochs=4, multi_scale=0.5, freeze=3)
    assert len(seen["sizes"]) > 1
    assert seen["autocast"].dtype == torch.float32
    assert all(g.isfinite().all() for g in seen["gradients"])
    for name, x in seen["after"].items():
        if name.endswith("conv.weight"):
            frozen = name.startswith(("model.0.", "model.1.", "model.2."))
            assert torch.equal(x, seen["before"][name]) == frozen, name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "runs"), [("mgd", False), ("scores", True)])
def test_yolo_teacher_stops_where_the_method_allows(yolo, method, runs):
    calls = []

    def count(trainer):
        head = trainer.model.distiller.teacher.model[-1]
        forward = head.forward
        head.forward = lambda x: calls.append(1) or forward(x)

    train(yolo, method, {"on_train_start": count})
    # Once for each form of inputs it runs whole, to learn where it may end: batches of four pictures.
    assert len(calls) == (2 if runs else 1)


PROCESS = """
import sys
import torch
from torch.nn import parallel

parallel_of_devices = parallel.DistributedDataParallel

class OnTheCPU(parallel_of_devices):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)

parallel.DistributedDataParallel = OnTheCPU
state = torch.load(sys.argv[1], weights_only=False)
trainer = state["trainer"](overrides=state["args"])
trainer.world_size = 2
trainer._setup_ddp = lambda: torch.distributed.init_process_group("gloo")
trainer.final_eval = lambda: None  # asks for a GPU

def share(trainer):
    mine = torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()])
    other = mine.clone()
    torch.distributed.broadcast(other, 0)
    assert torch.equal(mine, other)
    assert len(mine) > sum(p.numel() for p in trainer.ema.ema.parameters())  # those of the distillation too

trainer.add_callback("on_train_epoch_end", share)
trainer.train()
"""


@pytest.mark.slow
def test_yolo_in_two_processes(yolo, tmp_path):
    """What Ultralytics' launcher pickles for its processes trains in them; on a CPU, which its own launcher refuses."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="Ultralytics installs it for several GPUs")
    from maskd_kernels.integrations.ultralytics import trainer

    made = trainer(yolo / "teacher.pt", "mgd")
    arguments = settings(yolo, model="yolo26n.yaml", name="two", val=False)
    torch.save({"trainer": made, "args": arguments}, tmp_path / "state.pt", pickle_module=cloudpickle)
    (tmp_path / "process.py").write_text(PROCESS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *launch, str(tmp_path / "process.py"), str(tmp_path / "state.pt")], check=True)
    assert (yolo / "runs/two/weights/best.pt").exists()


@pytest.mark.slow
def test_yolo_student_is_pickled_while_it_trains(yolo):
    """By a callback of the user's, as a plain student with the values of the moment."""
    from ultralytics.nn.tasks import DetectionModel

    saved = {}

    def save(trainer):
        file = io.BytesIO()
        torch.save(trainer.model, file)
        saved.update(file=file, values=[x.clone() for x in trainer.model.state_dict().values()])

    train(yolo, "mgd", {"on_train_epoch_end": save}, options={})
    saved["file"].seek(0)
    model = torch.load(saved["file"], weights_only=False)
    assert type(model) is DetectionModel
    for x, y in zip(model.state_dict().values(), saved["values"], strict=True):
        assert torch.equal(x, y)


def test_yolo_teachers_of_every_kind(tmp_path):
    """A YOLO turns itself into another class for some models."""
    ultralytics = pytest.importorskip("ultralytics", reason="by `make test-models`")
    from maskd_kernels.integrations.ultralytics import _loaded

    world = ultralytics.YOLO("yolov8s-worldv2.yaml")
    assert not isinstance(world, ultralytics.YOLO)
    assert type(_loaded(world, torch.device("cpu"))) is type(world.model)
    (tmp_path / "exported.onnx").touch()
    exported = ultralytics.YOLO(tmp_path / "exported.onnx", task="detect")
    with pytest.raises(TypeError, match="teacher: expected a PyTorch model, got str"):
        _loaded(exported, torch.device("cpu"))


@pytest.mark.slow
def test_yolo_tokens(yolo, tmp_path):
    from maskd_kernels.integrations.ultralytics import train_tokens

    arguments = settings(yolo)
    del arguments["data"], arguments["epochs"]
    files = [
        train_tokens(yolo / "teacher.pt", yolo / "data.yaml", tmp_path / f"{i}.pth", iterations=i, **arguments)
        for i in (1, 4)
    ]
    learned = read_state(files[1])
    assert {name.split(".")[1] for name in learned} == {"0", "1", "2"}
    assert all(not torch.equal(x, read_state(files[0])[name]) for name, x in learned.items())
    MasKDLoss([128, 256, 512], pretrained=files[1])
    seen = {}

    def start(trainer):
        seen.update({name: x.clone() for name, x in distillation(trainer).items() if "mask_module" in name})
        raise StopHereError

    with pytest.raises(StopHereError):
        train(yolo, "maskd", {"on_train_start": start}, options={"tokens": files[1]})
    torch.testing.assert_close(seen, {f"losses.0.{name}": x for name, x in learned.items()}, rtol=0, atol=0)


@pytest.mark.slow
def test_yolo_of_another_task(yolo):
    """By the trainer of that task, from a teacher of any."""
    from ultralytics.models.yolo.segment import SegmentationTrainer

    seen = {}

    def look(trainer):
        seen["names"] = set(trainer.label_loss_items(trainer.tloss))

    train(
        yolo,
        "scores",
        {"on_train_epoch_end": look},
        model="yolo26n-seg.yaml",
        options={"base": SegmentationTrainer},
    )
    assert {"train/seg_loss", "train/dis_loss"} <= seen["names"]
    with pytest.raises(ValueError, match="base: expected Ultralytics' trainer of the task 'segment'"):
        train(yolo, "scores", model="yolo26n-seg.yaml")


@pytest.mark.slow
def test_yolo_complaints(yolo):
    from ultralytics import YOLO

    from maskd_kernels.integrations.ultralytics import train_tokens, trainer

    with pytest.raises(ValueError, match="method: expected one of maskd, mgd, amd, scores, got 'kd'"):
        trainer("teacher.pt", "kd")
    with pytest.raises(ValueError, match="tokens: expected none for method='mgd'"):
        trainer("teacher.pt", "mgd", tokens="tokens.pth")
    with pytest.raises(ValueError, match="options: expected none for method='scores', got alpha_mgd"):
        trainer("teacher.pt", "scores", alpha_mgd=1.0)
    with pytest.raises(ValueError, match="align: expected 'linear', 'mlp' or None"):
        trainer("teacher.pt", align="none")
    for teacher, message in (
        ("yolov8n-p6.yaml", "teacher: expected 3 levels like the student's, got 4"),
        ("yolo26n-cls.yaml", "teacher: expected a detector of Ultralytics, got a ClassificationModel"),
    ):
        with pytest.raises(ValueError, match=message):
            YOLO("yolo26n.yaml").train(**settings(yolo), trainer=trainer(teacher, "mgd"))
    with pytest.raises(ValueError, match="distill_model: expected none"):
        YOLO("yolo26n.yaml").train(**settings(yolo), distill_model="yolo26s.pt", trainer=trainer("yolo26s.yaml", "mgd"))
    for teacher, message in (
        ("yolo26s.yaml", "teacher: expected one of 2 classes like the data's, got 80"),
        ("yolo26n-seg.yaml", "teacher: expected a model of the task 'detect', got one of 'segment'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokens(teacher, yolo / "data.yaml", project=str(yolo / "runs"), device="cpu")


# ---- torchdistill ------------------------------------------------------------------------------

CONFIGS = Path(__file__).parent.parent / "examples/configs/torchdistill"


def torchdistill_box(name, change=lambda config: None):
    """What torchdistill makes of a configuration."""
    pytest.importorskip("torchdistill", reason="by `make test-models`")
    from torchdistill.common import yaml_util
    from torchdistill.common.main_util import import_dependencies
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.core.training import get_training_box
    from torchdistill.models.official import get_image_classification_model

    config = yaml_util.load_yaml_file(str(CONFIGS / f"{name}.yaml"))
    import_dependencies(config["dependencies"])
    change(config)
    models = {role: get_image_classification_model(model) for role, model in config["models"].items()}
    rest = (config["datasets"], config["train"], torch.device("cpu"), None, False, 1)
    if len(models) == 1:
        return get_training_box(with_statistics(models["model"]), *rest)
    return get_distillation_box(with_statistics(models["teacher_model"]), models["student_model"], *rest)


def run_box(box):
    """One epoch, as torchdistill's own scripts; the losses."""
    losses = []
    box.pre_epoch_process(epoch=0)
    for batch, targets, others in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(batch, targets, others)
        losses.append(loss.item())
        box.post_forward_process(loss=loss)
    box.post_epoch_process()
    return losses


@pytest.mark.slow
def test_torchdistill_learns_tokens_and_distils_with_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = torchdistill_box("tokens")
    teacher = copy.deepcopy(box.org_model.state_dict())
    before = copy.deepcopy(box.model.state_dict())
    losses = run_box(box)
    assert len(losses) == 2
    assert all(not torch.equal(x, before[name]) for name, x in box.model.state_dict().items())
    torch.testing.assert_close(box.org_model.state_dict(), teacher, rtol=0, atol=0)
    learned = read_state("tokens.pth")

    box = torchdistill_box("maskd")
    block = box.student_model.blocks["maskd"]
    aligns = copy.deepcopy(block.aligns.state_dict())
    losses = run_box(box)
    assert all(torch.equal(x, learned[name]) for name, x in block.loss.state_dict().items() if name != "_iter")
    assert block.loss._iter == 2
    assert all(not torch.equal(x, aligns[name]) for name, x in block.aligns.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mgd", "amd"])
def test_torchdistill_trains_blocks_and_keeps_them(method, tmp_path):
    file = tmp_path / "blocks" / "block.pt"

    def with_file(config):
        config["train"]["student"]["auxiliary_model_wrapper"]["kwargs"]["blocks"][method]["ckpt"] = str(file)

    box = torchdistill_box(method, with_file)
    block = box.student_model.blocks[method]
    before = copy.deepcopy(block.state_dict())
    run_box(box)
    assert all(not torch.equal(x, before[name]) for name, x in block.state_dict().items())
    again = torchdistill_box(method, with_file).student_model.blocks[method]
    torch.testing.assert_close(again.state_dict(), block.state_dict(), rtol=0, atol=0)


def test_torchdistill_term_is_the_loss_of_what_the_layers_put_out():
    """By hand: the models called once more, in the modes that they run in."""
    box = torchdistill_box("amd")  # nothing random in it
    box.student_model.eval()
    pictures = torch.rand(2, 3, 64, 64)
    ((term, _),) = (pair for name, pair in box.criterion.term_dict.items() if name == "amd")
    seen = {}
    box.criterion = lambda io, *_: seen.setdefault("loss", term(io["student"], io["teacher"]))
    box.forward_process(pictures, torch.zeros(2, dtype=torch.int64), None)

    def features(model, names):
        found, layers = [], dict(model.named_modules())
        handles = [layers[name].register_forward_hook(lambda _m, _i, out: found.append(out)) for name in names]
        model(pictures)
        for handle in handles:
            handle.remove()
        return found

    student = features(box.org_student_model, ["features.8", "features.12"])
    teacher = features(box.org_teacher_model, ["layer3", "layer4"])
    torch.testing.assert_close(seen["loss"], box.student_model.blocks["amd"].loss(student, teacher), rtol=1e-6, atol=0)


def test_torchdistill_complaints():
    pytest.importorskip("torchdistill", reason="by `make test-models`")
    from maskd_kernels.integrations.torchdistill import Block, MaskedDistillationLoss, TokenDiceLoss

    with pytest.raises(
        ValueError, match="key: expected one of MasKDLoss, MasKDSegLoss, MGDLoss, AMDLoss, got 'KDLoss'"
    ):
        Block("KDLoss")
    with pytest.raises(ValueError, match=r"student_channels: expected one per level, 2, got \[8\]"):
        Block("MasKDLoss", {"channels": [16, 16]}, student_channels=8)
    with pytest.raises(ValueError, match="student_channels: expected as an argument of MGDLoss, in kwargs"):
        Block("MGDLoss", {"student_channels": 8, "teacher_channels": 16}, student_channels=8)
    term, out = MaskedDistillationLoss("mgd", "a", ["b", "c"]), {"output": torch.zeros(1, 4, 2, 2)}
    with pytest.raises(KeyError, match=r"no 'mgd' in the student's auxiliary_model_wrapper.* has maskd"):
        term({"a": out, "maskd": {"block": None}}, {})
    block = {"mgd": {"block": None}}
    with pytest.raises(KeyError, match="teacher: no output of b, c was recorded"):
        term({"a": out, **block}, {})
    with pytest.raises(ValueError, match="as many levels of the student as of the teacher, got 1 and 2"):
        term({"a": out, **block}, {"b": out, "c": out})
    with pytest.raises(KeyError, match="must be TeacherWithReceptiveTokens"):
        TokenDiceLoss()({})
