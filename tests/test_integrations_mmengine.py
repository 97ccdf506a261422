"""mmengine's Runner that distils, with its own loops, hooks and checkpoints; by ``make test-models``."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import uuid

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("mmengine", reason="by `make test-models`")
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine keeps more than tensors in its checkpoints

from helpers import parameters_of_processes
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torchvision.ops import FeaturePyramidNetwork

from maskd_kernels import AMDLoss, MasKDLoss, MGDLoss
from maskd_kernels.integrations.mmengine import AlignConnector, PyramidSmoothL1Loss, TokenTrainingHook

CLASSES = 5


@MODELS.register_module()
class SmallSegmenter(BaseModel):
    """torchvision's pyramid over two convolutions, and a head that its levels share."""

    def __init__(self, width=8, neck=8, train_cfg=None, init_cfg=None):
        super().__init__({"type": "ScaledPixels"}, init_cfg)
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.neck = FeaturePyramidNetwork([width, 2 * width], neck)
        self.head = nn.Conv2d(neck, CLASSES, 1)

    def init_weights(self):
        super().init_weights()
        nn.init.constant_(self.head.bias, 0.5)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        first = self.first(inputs)
        levels = self.neck({"0": first, "1": self.second(first)})
        logits = [self.head(level) for level in levels.values()]
        if mode == "tensor":
            return logits
        if mode == "predict":
            return [{"pixels": pixels} for pixels in logits[0].argmax(1)]
        size = data_samples.shape[-2:]
        return {
            f"loss_seg{i}": F.cross_entropy(F.interpolate(x, size=size, mode="bilinear"), data_samples)
            for i, x in enumerate(logits)
        }


@MODELS.register_module()
class ScaledPixels(MODELS.get("BaseDataPreprocessor")):
    """Batches of pictures and labels; pictures in [-1, 1]."""

    def forward(self, data, training=False):
        data = self.cast_data(data)
        return {"inputs": data["inputs"] * 2 - 1, "data_samples": data["labels"]}


@METRICS.register_module()
class FirstPixels(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(sample["pixels"].float().mean()) for sample in data_samples]

    def compute_metrics(self, results):
        return {"mean": sum(results) / len(results)}


@DATASETS.register_module()
def pictures(count=8, seed=0):
    """A dataset: pictures and labels that can be read off them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count, 4, 4), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels = torch.rand(count, 3, 32, 32, generator=generator) + labels[:, None] / CLASSES
    return [{"inputs": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]


STUDENT = {"type": "SmallSegmenter", "width": 8, "neck": 8}
TEACHER = {"type": "SmallSegmenter", "width": 16, "neck": 16}
NECK = {"student": "neck", "teacher": "neck"}
ALIGN = {"type": "AlignConnector", "student_channels": [8, 8], "teacher_channels": [16, 16]}
MASKD = {"type": "MasKDLoss", "channels": [16, 16], "num_tokens": 3, "train_tokens": True, "custom_mask_warmup": 3}


def config(work_dir, taps=None, steps=4, **changes):
    """What a config file would hold."""
    taps = [{**NECK, "loss": dict(MASKD), "align": ALIGN, "name": "maskd", "weight": 7.0}] if taps is None else taps
    loader = {"batch_size": 2, "num_workers": 0, "collate_fn": {"type": "default_collate"}}
    loader["sampler"] = {"type": "InfiniteSampler", "shuffle": True}
    settings = {
        "custom_imports": {"imports": ["maskd_kernels.integrations.mmengine"]},
        "model": {"type": "FeatureDistillation", "student": dict(STUDENT), "teacher": dict(TEACHER), "taps": taps},
        "train_dataloader": {**loader, "dataset": {"type": "pictures"}},
        "train_cfg": {"by_epoch": False, "max_iters": steps},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False},
            "logger": {"type": "LoggerHook", "interval": 1},
        },
        "log_level": "WARNING",
        "randomness": {"seed": 0},
        "work_dir": str(work_dir),
        "experiment_name": uuid.uuid4().hex,
    }
    return Config({**settings, **changes})


def trained(*args, **changes):
    torch.manual_seed(0)
    runner = Runner.from_cfg(config(*args, **changes))
    runner.train()
    return runner


def state(model):
    return copy.deepcopy(model.state_dict())


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_it_trains_student_aligns_and_losses(tmp_path):
    torch.manual_seed(0)
    runner = Runner.from_cfg(config(tmp_path))
    before, teacher, modes = state(runner.model), state(runner.model.distiller.teacher), []
    runner.model.distiller.teacher.register_forward_pre_hook(
        lambda _m, _a, k: modes.append(k["mode"]), with_kwargs=True
    )
    runner.train()
    assert modes == ["tensor"] * 4
    after = state(runner.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"first.0.weight", "head.weight", "distiller.aligns.0.1.weight"} <= moved
    assert {"distiller.losses.0.mask_modules.1.mask_token", "distiller.losses.0._iter"} <= moved
    assert not any("teacher" in name for name in after)
    assert runner.model.distiller.teacher.head.bias[0] == 0.5  # its own init_weights, as it has no checkpoint
    teacher["head.bias"].fill_(0.5)
    assert_equal(teacher, runner.model.distiller.teacher.state_dict())
    logged = {name for name in runner.message_hub.log_scalars if name.startswith("train/")}
    assert {"train/loss", "train/loss_seg0", "train/loss_seg1", "train/distill.loss_maskd"} <= logged
    scalars = {name: runner.message_hub.get_scalar(f"train/{name}").data[0] for name in ("loss", "distill.loss_maskd")}
    parts = [runner.message_hub.get_scalar(f"train/loss_seg{i}").data[0] for i in range(2)]
    assert scalars["loss"][0] == pytest.approx(sum(p[0] for p in parts) + scalars["distill.loss_maskd"][0], rel=1e-5)


def test_resumes_bit_for_bit(tmp_path):
    """Also the warm-up counter: customised masks begin after the resumption."""
    plan = {"param_scheduler": [{"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 4}]}
    whole = trained(tmp_path / "whole", **plan)
    (tmp_path / "half").mkdir()
    checkpoint = tmp_path / "whole" / "iter_2.pth"
    resumed = trained(tmp_path / "half", load_from=str(checkpoint), resume=True, **plan)
    assert resumed.model.distiller.losses[0]._iter == 4
    assert_equal(state(whole.model), state(resumed.model))


def test_moving_average(tmp_path):
    """It averages student, aligns and losses, and shares the teacher; checkpoints hold it, and resuming goes on."""
    hooks = {"custom_hooks": [{"type": "EMAHook", "momentum": 0.3, "update_buffers": True}]}
    whole = trained(tmp_path / "whole", **hooks)
    average = next(hook for hook in whole.hooks if type(hook).__name__ == "EMAHook").ema_model
    assert average.module.distiller.teacher is whole.model.distiller.teacher
    saved = torch.load(tmp_path / "whole" / "iter_4.pth", weights_only=False)
    assert_equal(saved["state_dict"], average.module.state_dict())
    assert not torch.equal(saved["state_dict"]["head.weight"], whole.model.state_dict()["head.weight"])
    resumed = trained(tmp_path / "half", load_from=str(tmp_path / "whole" / "iter_2.pth"), resume=True, **hooks)
    again = torch.load(tmp_path / "half" / "iter_4.pth", weights_only=False)
    assert_equal(state(whole.model), state(resumed.model))
    assert_equal(saved["state_dict"], again["state_dict"])


def test_checkpoints_are_the_students(tmp_path):
    """They load into the student's own config, and the student's into this."""
    runner = trained(tmp_path / "kd")
    inputs = torch.rand(2, 3, 32, 32)
    expected = runner.model.eval()(inputs)[0]
    student = MODELS.build(dict(STUDENT))
    alone = torch.load(tmp_path / "kd" / "iter_4.pth", weights_only=False)["state_dict"]
    missing, unexpected = student.load_state_dict(alone, strict=False)
    assert not missing
    assert all(name.startswith("distiller.") for name in unexpected)
    assert torch.equal(student.eval()(inputs)[0], expected)
    script = (
        f"import sys, torch; sys.modules['maskd_kernels'] = None; torch.load({str(tmp_path / 'kd' / 'iter_4.pth')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)  # nothing in it is of this package
    again = Runner.from_cfg(config(tmp_path / "again", load_from=str(tmp_path / "kd" / "iter_4.pth")))
    again.load_or_resume()
    assert_equal(state(again.model), state(runner.model))


def test_validation_is_the_students_alone(tmp_path):
    loader = {
        "batch_size": 2,
        "collate_fn": {"type": "default_collate"},
        "dataset": {"type": "pictures", "count": 4, "seed": 1},
    }
    loader["sampler"] = {"type": "DefaultSampler", "shuffle": False}
    validation = {"val_dataloader": loader, "val_cfg": {}, "val_evaluator": {"type": "FirstPixels"}}
    runner = Runner.from_cfg(config(tmp_path, **validation))
    calls = []
    runner.model.distiller.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    runner.val()
    assert not calls
    inputs = torch.stack([picture["inputs"] for picture in pictures(4, seed=1)]) * 2 - 1
    expected = runner.model.distiller.student.eval()(inputs)[0].argmax(1).float().mean()
    assert runner.message_hub.get_scalar("val/mean").current() == pytest.approx(float(expected))


def test_methods_and_connectors(tmp_path):
    both = {"student_channels": [8, 8], "teacher_channels": [16, 16]}
    taps = [
        {**NECK, "loss": {"type": "MGDLoss", **both, "alpha_mgd": 1e-3}, "name": "mgd"},
        {**NECK, "loss": {"type": "AMDLoss", **both, "alpha_amd": 1e-3}, "name": "amd"},
        {**NECK, "loss": dict(MASKD), "align": ALIGN, "name": "maskd"},
        {"student": "head", "teacher": "head", "loss": {"type": "PyramidSmoothL1Loss"}},
    ]
    runner = trained(tmp_path, taps, steps=2)
    kinds = [type(loss) for loss in runner.model.distiller.losses]
    assert kinds == [MGDLoss, AMDLoss, MasKDLoss, PyramidSmoothL1Loss]
    assert isinstance(runner.model.distiller.taps[2].align, AlignConnector)
    for name in ("mgd", "amd", "maskd", "head"):
        assert runner.message_hub.get_scalar(f"train/distill.loss_{name}").current() > 0


def test_bfloat16(tmp_path, monkeypatch):
    """By autocast of the CPU, which mmengine can and refuses to do."""
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    amp = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "SGD", "lr": 0.05}}
    whole = trained(tmp_path / "amp", optim_wrapper=amp)
    plain = trained(tmp_path / "plain", optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}})
    for name in ("loss", "distill.loss_maskd"):
        a, b = (r.message_hub.get_scalar(f"train/{name}").data[0][0] for r in (whole, plain))
        assert a == pytest.approx(b, rel=0.05)
        assert a != b


def test_accumulated_batches(tmp_path):
    """The Runner's own way: every loss divided by the number of batches."""
    wrapper = {"accumulative_counts": 2, "optimizer": {"type": "SGD", "lr": 0.05}}
    runner = trained(tmp_path, steps=2, optim_wrapper=wrapper)
    assert runner.message_hub.get_scalar("train/distill.loss_maskd").current() > 0


def test_inherited_layers(tmp_path):
    teacher = MODELS.build(dict(TEACHER))
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, tmp_path / "teacher.pth")
    tap = {**NECK, "loss": dict(MASKD)}
    model = {"student": {**STUDENT, "neck": 16}, "teacher": TEACHER, "taps": [tap]}
    model["teacher_ckpt"] = str(tmp_path / "teacher.pth")
    built = MODELS.build({"type": "FeatureDistillation", **model, "inherit": ["head"]})
    built.init_weights()
    assert_equal(built.distiller.teacher.state_dict(), teacher.state_dict())
    assert torch.equal(built.distiller.student.head.weight, teacher.head.weight)
    assert not torch.equal(built.distiller.student.first[0].weight[:8], teacher.first[0].weight[:8])
    with pytest.raises(ValueError, match="inherit: 'first' of the teacher does not fit"):
        MODELS.build({"type": "FeatureDistillation", **model, "inherit": ["first"]}).init_weights()
    with pytest.raises(ValueError, match="inherit: 'bbox_head'"):
        MODELS.build({"type": "FeatureDistillation", **model, "inherit": ["bbox_head"]}).init_weights()


def test_connector():
    """As mmrazor calls it: with what a recorder has recorded."""
    connector = MODELS.build(dict(ALIGN))
    pyramid = [torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)]
    for x, level, aligned in zip(pyramid, connector, connector(pyramid), strict=True):
        assert torch.equal(aligned, F.conv2d(x, level.weight, level.bias))
    assert torch.equal(connector(pyramid[0]), connector(pyramid)[0])
    with pytest.raises(ValueError, match=r"feature: expected 2 level\(s\) like student_channels, got 1"):
        connector(pyramid[:1])


def test_pyramid_of_boxes():
    loss = MODELS.build({"type": "PyramidSmoothL1Loss", "beta": 0.5, "loss_weight": 0.3})
    teacher = [torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2)]
    student = [torch.tensor([[[[0.2, 2.0]]]]), torch.full((1, 1, 2, 2), -1.0)]
    levels = [(0.5 * 0.2**2 / 0.5 + 2.0 - 0.25) / 2, 1.0 - 0.25]
    torch.testing.assert_close(loss(student, teacher), torch.tensor(0.3 * sum(levels)))
    with pytest.raises(ValueError, match=r"y_s\[0\]: expected \[1, 1, 1, 1\] like y_t\[0\], got \[1, 1, 1, 2\]"):
        loss(student, [teacher[0][..., :1], teacher[1]])


def parameters_of_a_process(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    taps = [{**NECK, "loss": {**MASKD, "train_tokens": False}, "align": ALIGN}]
    parallel = {"launcher": "pytorch", "model_wrapper_cfg": {"device_ids": None}}
    hook = {"type": "TokenTrainingHook", "iterations": 3}
    return trained(folder, taps, custom_hooks=[hook], **parallel).model.parameters()


def test_two_processes(tmp_path):
    """Student, aligns and learned tokens are the same in both, though each has pictures of its own."""
    first, second = parameters_of_processes(functools.partial(parameters_of_a_process, folder=tmp_path), tmp_path)
    assert torch.equal(first, second)
    alone = [{**NECK, "loss": {**MASKD, "train_tokens": False}, "align": ALIGN}]
    runner = trained(tmp_path / "alone", alone, custom_hooks=[{"type": "TokenTrainingHook", "iterations": 3}])
    other = torch.cat([p.detach().flatten() for p in runner.model.parameters()])
    assert not torch.allclose(first, other, atol=1e-5)


# ---- tokens ------------------------------------------------------------------------------------


def test_token_training_hook(tmp_path):
    """Tokens first, then the student; neither again where a checkpoint has them."""
    loss = {"type": "MasKDLoss", "channels": [16, 16], "num_tokens": 3}
    one = {"loss": {"type": "MasKDSegLoss", "channels": 16, "num_tokens": 2}, "name": "seg"}
    one["align"] = {"type": "AlignConnector", "student_channels": 8, "teacher_channels": 16}
    taps = [{**NECK, "loss": loss, "align": ALIGN, "name": "maskd"}]
    taps.append({"student": "first", "teacher": "first", **one})
    hook = {"type": "TokenTrainingHook", "iterations": 6, "out": str(tmp_path / "tokens.pth"), "interval": 2}
    runner = trained(tmp_path / "a", taps, custom_hooks=[hook])
    maskd, seg = runner.model.distiller.losses
    for name, made, attribute in (("maskd", maskd, "mask_modules"), ("seg", seg, "mask_module")):
        file = torch.load(tmp_path / f"tokens.{name}.pth", weights_only=True)
        assert all(key.startswith("mask_modules.") for key in file["state_dict"])
        learned = next(iter(file["state_dict"].values()))
        token = next(getattr(made, attribute).parameters())
        assert torch.equal(token, learned)
        assert learned.std() > 0.012  # they start with 0.01
    before = state(runner.model)
    assert all(p.requires_grad for p in runner.model.distiller.teacher.parameters())
    resumed = trained(
        tmp_path / "b", taps, load_from=str(tmp_path / "a" / "iter_2.pth"), resume=True, custom_hooks=[hook]
    )
    assert_equal(before, state(resumed.model))
    given = [{**taps[0], "loss": {**loss, "pretrained": str(tmp_path / "tokens.maskd.pth")}}]
    hook["out"] = str(tmp_path / "never.pth")
    again = trained(tmp_path / "c", given, steps=1, custom_hooks=[hook])
    assert not (tmp_path / "never.pth").exists()
    assert torch.equal(again.model.distiller.losses[0].mask_modules[0].mask_token, maskd.mask_modules[0].mask_token)


def test_tokens_see_the_data_in_another_order_in_each_pass(tmp_path, monkeypatch):
    seen, forward = [], ScaledPixels.forward
    monkeypatch.setattr(ScaledPixels, "forward", lambda *a: seen.append(a[1]["inputs"].sum((1, 2, 3))) or forward(*a))
    loader = {"batch_size": 2, "num_workers": 0, "collate_fn": {"type": "default_collate"}}
    loader.update(sampler={"type": "DefaultSampler", "shuffle": True}, dataset={"type": "pictures"})
    taps = [{**NECK, "loss": {"type": "MasKDLoss", "channels": [16, 16]}, "align": ALIGN}]
    hook = {"type": "TokenTrainingHook", "iterations": 8}
    trained(tmp_path, taps, steps=1, train_dataloader=loader, custom_hooks=[hook])
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:8])
    assert torch.equal(first.sort()[0], second.sort()[0])
    assert not torch.equal(first, second)


# ---- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_named(tmp_path, monkeypatch):
    random = {**NECK, "loss": {"type": "MasKDLoss", "channels": [16, 16]}, "align": ALIGN}

    def build(tap=None, **changes):
        tap = {**NECK, "loss": dict(MASKD), **(tap or {})}
        model = {"type": "FeatureDistillation", "student": STUDENT, "teacher": TEACHER, "taps": [tap], **changes}
        return Runner.from_cfg(config(tmp_path, model=model)).model

    with pytest.raises(ValueError, match=r"student: no layer 'nek'.*neck"):
        build({"student": "nek"})
    assert build(inherit="head").inherit == ["head"]
    with pytest.raises(ValueError, match="iterations: expected a positive whole number, got 0"):
        TokenTrainingHook(iterations=0)
    for channels, align, message in (
        ([16], ALIGN, r"expected 2 level\(s\) like teacher, got 1"),
        ([32, 32], ALIGN, r"expected \[K, 16\] .*got \[6, 32\]"),
        ([16, 16], None, "align the student with a 1x1 convolution from 8 to 16 channels"),
    ):
        tap = {**NECK, "loss": {"type": "MasKDLoss", "channels": channels}, "align": align}
        with pytest.raises(ValueError, match=f"neck: the loss cannot take .*{message}"):
            trained(tmp_path, [tap], steps=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'los'"):
        build({"los": {}})
    with pytest.raises(TypeError, match="expected a BaseModel"):
        build(student=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="align: expected None or dict"):
        build({"align": "auto"})
    torch.save(MODELS.build(dict(STUDENT)).state_dict(), tmp_path / "student.pth")
    with pytest.raises(ValueError, match=r"teacher_ckpt: .*student.pth does not fit the teacher"):
        build(teacher_ckpt=str(tmp_path / "student.pth"))
    torch.save({"state_dict": {"model.head.bias": torch.zeros(5)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"teacher_ckpt: .*lacks .* of the teacher's"):
        build(teacher_ckpt=str(tmp_path / "other.pth"))
    trained(tmp_path / "teacher", model=dict(TEACHER))
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    with pytest.raises(ValueError, match="if you trust the file, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1") as raised:
        build(teacher_ckpt=str(tmp_path / "teacher" / "iter_4.pth"))
    assert isinstance(raised.value.__cause__, pickle.UnpicklingError)
    runner = Runner.from_cfg(config(tmp_path, [random], custom_hooks=[{"type": "TokenTrainingHook"}]))
    runner._train_dataloader = torch.utils.data.DataLoader(pictures(), batch_size=2)
    with pytest.raises(TypeError, match="TokenTrainingHook: expected train_dataloader as a config, got a DataLoader"):
        runner.train()
    with pytest.raises(TypeError, match=r"TokenTrainingHook: expected model=dict.*SmallSegmenter"):
        trained(tmp_path, model=STUDENT, custom_hooks=[{"type": "TokenTrainingHook"}])
    aligned = {"type": "AlignConnector", "student_channels": [8], "teacher_channels": [16]}
    with pytest.raises(ValueError, match="expected 2 align"):
        trained(tmp_path, [{**NECK, "loss": dict(MASKD), "align": aligned}], steps=1)
