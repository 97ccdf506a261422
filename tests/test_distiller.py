"""Distiller: any two models, without touching the student's output or the teacher's state."""

import copy
import pickle
import pickletools
import warnings
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from helpers import parameters_of_processes
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskd_kernels import AMDLoss, Distiller, Layer, MasKDLoss, MGDLoss, Tap, TokenTrainer
from maskd_kernels.distill.features import tensors_in
from maskd_kernels.distill.recording import _Hook


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Net(nn.Module):
    """Two levels of features in the structure asked for."""

    def __init__(self, width, structure="list", stride=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.neck = Neck(width, structure)
        self.head = nn.Conv2d(width, 5, 1)
        self.never = nn.Identity()

    def forward(self, x):
        features = self.neck(self.stem(x))
        first = (
            features
            if torch.is_tensor(features)
            else next(iter(features.values() if isinstance(features, dict) else features))
        )
        return {"logits": self.head(first)}


class Neck(nn.Module):
    def __init__(self, width, structure):
        super().__init__()
        self.structure, self.conv = structure, nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        a = self.conv(x)
        b = F.max_pool2d(a, 2)
        return {
            "tensor": a,
            "list": [a, b],
            "tuple": (a, b),
            "namedtuple": Pair(a, b),
            "dict": OrderedDict(p2=a, p3=b),
            "other keys": OrderedDict(p3=a, p4=b),
            "one": [a],
            "text": [a, "x"],
        }[self.structure]


IMAGE = torch.randn(2, 3, 16, 16)


def mse(s, t):
    if torch.is_tensor(s):
        return F.mse_loss(s, t)
    return sum(F.mse_loss(a, b) for a, b in zip(s, t, strict=True))


def distiller(student=None, teacher=None, student_layer="neck", **tap):
    student, teacher = student or Net(4), teacher or Net(8)
    return Distiller(student, teacher, [Tap(student_layer, "neck", **{"loss": mse, **tap})], example_inputs=(IMAGE,))


@pytest.mark.parametrize("structure", ["tensor", "list", "tuple", "namedtuple", "dict"])
def test_structures(structure):
    student, teacher = Net(8, structure), Net(8, structure)
    output, losses = distiller(student, teacher)(IMAGE)
    teacher.eval()
    expected = mse(
        *[list(f.values()) if isinstance(f, dict) else f for f in (m.neck(m.stem(IMAGE)) for m in (student, teacher))]
    )
    assert losses.keys() == {"neck"}
    assert output.keys() == {"logits"}
    torch.testing.assert_close(losses["neck"], expected)


def test_structures_may_differ():
    _, losses = distiller(Net(4, "tuple"), Net(8, "dict"))(IMAGE)
    assert losses["neck"].requires_grad


def test_keys_that_were_chosen_may_differ():
    sides = Layer("neck", levels=["p2", "p3"]), Layer("neck", levels=["p3", "p4"])
    s, t = values(Distiller(Net(8, "dict"), Net(8, "other keys"), Tap(*sides, mse)))
    assert [x.shape for x in s] == [x.shape for x in t]


def test_student_output_is_untouched():
    student = Net(4)
    alone = copy.deepcopy(student)
    output, _ = distiller(student)(IMAGE)
    expected = alone(IMAGE)
    assert torch.equal(output["logits"], expected["logits"])
    output["logits"].sum().backward()
    expected["logits"].sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(student.parameters(), alone.parameters(), strict=True))


def test_names_weights_and_raw_values():
    student, teacher = Net(8), Net(8)
    taps = [Tap("neck", "neck", mse, weight=3.0), Tap("stem", "stem", mse, name="early", weight=0.5)]
    d = Distiller(student, teacher, taps)
    _, losses = d(IMAGE)
    assert list(losses) == list(d.raw_losses) == ["neck", "early"]
    torch.testing.assert_close(losses["neck"], 3 * d.raw_losses["neck"])
    torch.testing.assert_close(losses["early"], 0.5 * d.raw_losses["early"])
    assert not d.raw_losses["neck"].requires_grad


def test_teacher_stays_frozen():
    teacher = Net(8)
    before = copy.deepcopy(teacher.state_dict())
    d = distiller(teacher=teacher)
    for mode in (True, False):
        d.train(mode)
        teacher.train()  # somebody insists
        _, losses = d(IMAGE)
        sum(losses.values()).backward()
        assert not any(m.training for m in teacher.modules())
        assert d.student.training is mode
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_modules_of_both_models_keep_the_students_mode():
    """Self-distillation: a model, or a part of it, teaches itself; its batch norms learn all the same."""
    model = Net(8)
    d = Distiller(model, model.stem, Tap("neck.conv", "0", mse), example_inputs=IMAGE)
    assert all(m.training for m in model.modules())
    d.eval().train()
    model.stem[1].eval()  # as one likes
    d(IMAGE)
    assert [m.training for m in model.stem] == [True, False, True]
    model.train()
    before, seen = model.stem[1].running_mean.clone(), []
    d.taps[0].loss = lambda s, t: seen.append(t) or mse(s, t)
    d(IMAGE)
    assert not torch.equal(model.stem[1].running_mean, before)
    torch.testing.assert_close(seen[0], model.stem[0](IMAGE))
    d.eval()
    assert not any(m.training for m in model.modules())


def test_aligns_built_under_inference_mode_train():
    for example_inputs in (None, IMAGE):
        student, teacher = Net(4), Net(8)
        with torch.inference_mode():
            d = Distiller(student, teacher, Tap("neck", "neck", mse), example_inputs=example_inputs)
            d(IMAGE)
        _, losses = d(IMAGE)
        losses["neck"].backward()
        assert all(p.grad is not None for p in d.aligns.parameters())


def test_teacher_is_not_saved_but_moves():
    teacher = Net(8)
    d = distiller(teacher=teacher, loss=MasKDLoss([8, 8]))
    keys = d.state_dict().keys()
    assert {k.split(".")[0] for k in keys} == {"student", "losses", "aligns"}
    assert len([k for k in keys if k.startswith("student.")]) == len(Net(4).state_dict())
    assert not any(p is q for p in d.parameters() for q in teacher.parameters())
    d.double()
    assert next(teacher.parameters()).dtype == torch.float64
    _, losses = d(IMAGE.double())
    assert losses["neck"].dtype == torch.float64


def test_trainable_parameters():
    d = distiller(loss=MasKDLoss([8, 8], train_tokens=True))
    names = {id(p): n for n, p in d.named_parameters()}
    found = {names[id(p)].split(".")[0] for p in d.trainable_parameters()}
    assert found == {"student", "aligns", "losses"}
    d.student.stem.requires_grad_(False)
    assert not any(names[id(p)].startswith("student.stem") for p in d.trainable_parameters())
    assert not any(
        "losses" in names[id(p)] for p in distiller(loss=MasKDLoss([8, 8])).trainable_parameters() if id(p) in names
    )


def test_align():
    d = distiller()
    assert [(a.in_channels, a.out_channels) for a in d.aligns[0]] == [(4, 8), (4, 8)]
    assert all(isinstance(a, nn.Identity) for a in distiller(Net(8)).aligns[0])
    given = nn.ModuleList([nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)])
    d = Distiller(Net(4), Net(8), [Tap("neck", "neck", mse, align=given)])
    assert list(d.aligns[0]) == list(given)
    d(IMAGE)
    with pytest.raises(
        ValueError,
        match=r"neck\[0\]: expected the teacher's channels after align, got \[2, 6, 16, 16\] and \[2, 8, 16, 16\] "
        r"\(\[2, 4, 16, 16\] before align\)",
    ):
        distiller(align=[nn.Conv2d(4, 6, 1), nn.Conv2d(4, 8, 1)])
    with pytest.raises(ValueError, match=r"neck: expected 2 align module\(s\), one per level, got 1"):
        distiller(align=nn.Conv2d(4, 8, 1))
    with pytest.raises(ValueError, match="align: expected 'auto', None or modules, got 'yes'"):
        Tap("neck", "neck", mse, align="yes")


def test_align_trains():
    d = distiller()
    _, losses = d(IMAGE)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in d.aligns.parameters())


def test_late_align_warns_and_is_never_silently_lost():
    d = Distiller(Net(4), Net(8), [Tap("neck", "neck", mse)])
    with pytest.raises(RuntimeError, match="aligns are not built yet; give Distiller example_inputs"):
        d.trainable_parameters()
    with pytest.warns(UserWarning, match=r"built in the first call \(neck 4 to 8 channels; neck 4 to 8 channels\)"):
        d(IMAGE)
    assert len(d.trainable_parameters()) == len(list(d.student.parameters())) + 4


def test_building_leaves_the_student_alone():
    student = Net(4)
    before = copy.deepcopy(student.state_dict())
    student.neck.eval()
    distiller(student)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training
    assert not student.neck.training


def test_resize_is_opt_in():
    with pytest.raises(ValueError, match=r"got \[2, 8, 8, 8\] and \[2, 8, 16, 16\]; Tap\(resize=True\)"):
        distiller(Net(8, stride=2), Net(8))(IMAGE)
    _, losses = distiller(Net(4, stride=2), Net(8), resize=True)(IMAGE)
    assert losses["neck"].isfinite()


def test_sequences():
    class Tokens(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Conv2d(3, width, 4, stride=4)
            self.block = nn.Linear(width, width)

        def forward(self, x):
            return self.block(self.embed(x).flatten(2).mT).mean(1)

    tap = Tap("block", "block", MasKDLoss(12, weight_mask=False), channel_dim=-1)
    d = Distiller(Tokens(6), Tokens(12), [tap], example_inputs=(IMAGE,))
    output, losses = d(IMAGE)
    assert output.shape == (2, 6)
    losses["block"].backward()
    assert d.aligns[0][0].weight.shape == (12, 6, 1)


def test_layer_that_runs_for_every_level():
    class Shared(Net):
        def forward(self, x):
            return [self.head(f) for f in self.neck(self.stem(x))]

    seen = []
    Distiller(Shared(4), Shared(8), [Tap("head", "head", lambda s, t: seen.append((s, t)) or mse(s, t))])(IMAGE)
    (s, t) = seen[0]
    assert [x.shape for x in s] == [x.shape for x in t] == [(2, 5, 16, 16), (2, 5, 8, 8)]


def test_activation_checkpointing():
    class Checkpointed(Net):
        def forward(self, x):
            return {
                "logits": self.head(torch.utils.checkpoint.checkpoint(self.neck, self.stem(x), use_reentrant=False))
            }

    _, losses = distiller(Checkpointed(4, "tensor"), Net(8, "tensor"))(IMAGE)
    losses["neck"].backward()


def test_hooks_are_removed():
    student, teacher = Net(4), Net(8)
    with distiller(student, teacher) as d:
        d(IMAGE)
        assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())
        with pytest.raises(RuntimeError, match="channels"):
            d(torch.randn(2, 4, 8, 8))
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())
    with pytest.raises(RuntimeError, match="hooks have been removed"):
        d(IMAGE)


def test_models_work_beside_the_distiller():
    student = Net(4)
    d = distiller(student)
    student(IMAGE)
    d(IMAGE)
    _, losses = d(IMAGE)
    assert losses["neck"].isfinite()


def test_bad_layers():
    with pytest.raises(ValueError, match=r"student: no layer 'nek' in Net; near it: neck"):
        Distiller(Net(4), Net(8), [Tap("nek", "neck", mse)])
    net = Net(4)
    net.fc = nn.Identity()
    with pytest.raises(ValueError, match=r"student: no layer 'module.fc' in Net; near it: fc"):
        Distiller(net, Net(8), [Tap("module.fc", "neck", mse)])
    with pytest.raises(ValueError, match=r"teacher: no layer 'zzz' in Net; near it: stem, neck, head"):
        Distiller(Net(4), Net(8), [Tap("neck", "zzz", mse)])
    with pytest.raises(RuntimeError, match=r"student: the layer 'never' did not run in this forward"):
        Distiller(Net(4), Net(8), [Tap("never", "neck", mse)])(IMAGE)
    with pytest.raises(ValueError, match=r"neck: expected as many levels .* got 1 and 2"):
        distiller(Net(4, "one"))(IMAGE)
    with pytest.raises(ValueError, match=r"neck: expected the same keys .* got p2, p3 and p3, p4"):
        distiller(Net(4, "dict"), Net(8, "other keys"))(IMAGE)
    with pytest.raises(
        TypeError, match=r"student 'stem', after select: expected features .*, got dict of 0: \[2\], 1: str"
    ):
        distiller(Net(4), student_layer=Layer("stem", select=lambda x: {0: x[:, 0, 0, 0], 1: "x"}))


def test_bad_taps():
    with pytest.raises(ValueError, match="taps: expected at least one Tap"):
        Distiller(Net(4), Net(8), [])
    with pytest.raises(ValueError, match=r"taps: expected different names, got neck, neck"):
        Distiller(Net(4), Net(8), [Tap("neck", "neck", mse)] * 2)
    with pytest.raises(TypeError, match="loss: expected a module or function, got str"):
        Tap("neck", "neck", "mse")
    with pytest.raises(TypeError, match="weight: expected a finite number, got '2'"):
        Tap("neck", "neck", mse, weight="2")
    with pytest.raises(ValueError, match="weight: expected a finite number, got nan"):
        Tap("neck", "neck", mse, weight=float("nan"))
    with pytest.raises(TypeError, match="teacher_inputs: expected a function of a call's arguments, got str"):
        Distiller(Net(4), Net(8), Tap("neck", "neck", mse), teacher_inputs="img")


def test_autocast():
    d = distiller(loss=MasKDLoss([8, 8]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, losses = d(IMAGE)
    assert output["logits"].dtype == torch.bfloat16
    assert losses["neck"].dtype == torch.float32
    losses["neck"].backward()
    assert all(p.grad.isfinite().all() for p in d.aligns.parameters())


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_compiled_models(which):
    torch._dynamo.reset()
    student, teacher = Net(8), Net(8)
    _, expected = distiller(copy.deepcopy(student), teacher)(IMAGE)
    s = torch.compile(student, backend="aot_eager") if which != "teacher" else student
    t = torch.compile(teacher, backend="aot_eager") if which != "student" else teacher
    d = Distiller(s, t, [Tap("neck", "neck", mse)])
    for _ in range(2):
        _, losses = d(IMAGE)
        losses["neck"].backward()
    torch.testing.assert_close(losses["neck"], expected["neck"])


@pytest.mark.parametrize("layer", ["neck", "neck.conv"])
@pytest.mark.parametrize("example_inputs", [None, IMAGE])
def test_layers_in_parts_compiled_in_place(layer, example_inputs):
    torch._dynamo.reset()
    student, teacher = Net(8, "tensor").eval(), Net(8, "tensor").eval()
    d = Distiller(student, teacher, Tap(layer, layer, mse), example_inputs=example_inputs)
    student.neck.compile(backend="eager")
    teacher.neck.compile(backend="eager")
    for _ in range(3):
        _, losses = d(IMAGE)
        a, b = (m.neck.conv(m.stem(IMAGE)) for m in (student, teacher))
        torch.testing.assert_close(losses[layer], mse(a, b))


def test_compiled_distiller():
    torch._dynamo.reset()
    d = distiller().eval()
    _, expected = d(IMAGE)
    compiled = torch.compile(d, backend="eager")
    for _ in range(2):
        output, losses = compiled(IMAGE)
        torch.testing.assert_close(losses["neck"], expected["neck"])
    (output["logits"].sum() + losses["neck"]).backward()
    assert all(p.grad is not None for p in d.parameters())


def test_torchvision_detector():
    from torchvision.models.detection import retinanet_resnet50_fpn

    def detector(seed):
        torch.manual_seed(seed)
        return retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)

    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    loss_fn = MasKDLoss([256] * 5, loss_weight=7.0, custom_mask_warmup=0)
    d = Distiller(detector(0), detector(1), [Tap("backbone.fpn", "backbone.fpn", loss_fn)], example_inputs=(images,))
    task_losses, losses = d(images, targets)
    (sum(task_losses.values()) + sum(losses.values())).backward()
    assert losses["backbone.fpn"] > 0
    assert all(p.grad is not None for p in d.student.backbone.fpn.parameters())


@pytest.mark.parametrize("loss", [MGDLoss([8, 8], [8, 8]), AMDLoss([8, 8], [8, 8], reduction=4)])
def test_generative_losses(loss):
    """They train their own blocks: these parameters are the optimizer's, and all get gradients."""
    d = distiller(Net(8), Net(8), loss=loss)
    output, losses = d(IMAGE)
    (output["logits"].square().mean() + sum(losses.values())).backward()
    trainable = {id(p) for p in d.trainable_parameters()}
    assert all(id(p) in trainable and p.grad is not None for p in loss.parameters())
    assert any(k.startswith("losses.") and "generation" in k for k in d.state_dict())


def distil_in_ddp(rank):
    torch.manual_seed(0)
    fpn = {"student": "neck", "teacher": "neck"}
    taps = [
        Tap(**fpn, loss=MasKDLoss([8, 8], train_tokens=True, custom_mask_warmup=1), name="maskd"),
        Tap(**fpn, loss=MGDLoss([8, 8], [8, 8]), name="mgd"),
        Tap(**fpn, loss=AMDLoss([8, 8], [8, 8], reduction=4), name="amd"),
    ]
    d = Distiller(Net(4), Net(8), taps, example_inputs=(IMAGE,))
    ddp = nn.parallel.DistributedDataParallel(d)
    optimizer = torch.optim.SGD(d.trainable_parameters(), lr=0.01)
    torch.manual_seed(rank)
    for _ in range(3):
        output, losses = ddp(torch.randn(2, 3, 16, 16))
        optimizer.zero_grad()
        (output["logits"].square().mean() + sum(losses.values())).backward()
        optimizer.step()
    assert d.losses[0]._iter.item() == 3
    with pytest.raises(RuntimeError, match="too late for DDP"):
        Distiller(Net(4), Net(8), [Tap("neck", "neck", mse)])(IMAGE)
    return list(d.parameters())


def test_ddp(tmp_path):
    """Two processes: no unused parameters, and the copies stay equal."""
    first, second = parameters_of_processes(distil_in_ddp, tmp_path)
    assert torch.equal(first, second)


class InPlace(nn.Module):
    """Layers followed by what changes their outputs in place: a ReLU always, a dropout in training alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.second, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5, inplace=True)
        self.changes = False

    def forward(self, x):
        x = self.drop(self.second(self.relu(self.conv(x))))
        return x.mul_(2) if self.changes else x


@pytest.mark.parametrize("example_inputs", [None, IMAGE])
def test_in_place_operations_after_the_layer(example_inputs):
    """What a tap gets, and its gradient, are those of the layer's own output."""
    student, teacher = InPlace(), InPlace()
    d = Distiller(
        student, teacher, [Tap(name, name, mse) for name in ("conv", "second")], example_inputs=example_inputs
    )
    teacher.eval()
    for _ in range(3):
        torch.manual_seed(1)
        student.zero_grad()
        _, losses = d(IMAGE)
        sum(losses.values()).backward()
        gradients = [p.grad.clone() for p in student.parameters()]
        student.zero_grad()
        s, t = (m.conv(IMAGE) for m in (student, teacher))
        first, second = mse(s, t.detach()), mse(student.second(s.relu()), teacher.second(t.relu()).detach())
        (first + second).backward()
        torch.testing.assert_close(losses, {"conv": first, "second": second})
        for gradient, parameter in zip(gradients, student.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_only_what_changes_is_copied():
    seen = []
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    taps = [Tap(name, name, lambda s, t: seen.append(s) or mse(s, t)) for name in ("0", "2")]
    d = Distiller(student, copy.deepcopy(student), taps, example_inputs=IMAGE)
    outputs = []
    for name in ("0", "2"):
        student.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    for _ in range(2):
        outputs.clear()
        seen.clear()
        d(IMAGE)
        assert seen[0] is not outputs[0]
        assert seen[1] is outputs[1]


def test_change_in_place_that_comes_later():
    student = InPlace()
    d = Distiller(student, Net(4, "tensor"), [Tap("second", "neck", mse)], example_inputs=IMAGE)
    d.eval()
    d(IMAGE)
    student.changes = True
    with pytest.raises(
        RuntimeError, match="student 'second': an in-place operation after this layer changed its output"
    ):
        d(IMAGE)
    seen = student.second(student.relu(student.conv(IMAGE)))
    _, losses = d(IMAGE)
    torch.testing.assert_close(losses["second"], mse(seen, d.teacher.neck(d.teacher.stem(IMAGE))))


def test_teacher_in_inference_mode():
    class Teacher(InPlace):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    student, teacher = InPlace(), Teacher().eval()
    for whole in (False, True):  # the whole teacher goes on to change the layer's output
        taps = [Tap("conv", "conv", mse), Tap("conv", "conv", MasKDLoss(4), name="maskd")]
        d = Distiller(student, teacher, taps, example_inputs=IMAGE, teacher_output=whole)
        for _ in range(2):
            _, losses = d(IMAGE)
            sum(losses.values()).backward()
            s, t = student.conv(IMAGE), teacher.conv(IMAGE)
            torch.testing.assert_close(losses, {"conv": mse(s, t), "maskd": d.losses[0](s, t)})


def test_in_place_operation_in_compiled_models():
    torch._dynamo.reset()
    student, teacher = InPlace().eval(), InPlace().eval()
    compiled = [torch.compile(m, backend="aot_eager") for m in (student, teacher)]
    d = Distiller(*compiled, [Tap("conv", "conv", mse)], example_inputs=IMAGE).eval()
    for _ in range(3):
        student.zero_grad()
        _, losses = d(IMAGE)
        losses["conv"].backward()
        expected = mse(student.conv(IMAGE), teacher.conv(IMAGE))
        torch.testing.assert_close(losses["conv"], expected)
        torch.testing.assert_close(student.conv.weight.grad, torch.autograd.grad(expected, student.conv.weight)[0])


@pytest.mark.parametrize("example_inputs", [None, IMAGE])
def test_change_in_place_that_no_version_shows(example_inputs):
    class Clamps(InPlace):
        def forward(self, x):
            x = self.conv(x)
            x.data.clamp_(0)
            return x

    student, teacher = Clamps(), Clamps()
    d = Distiller(student, teacher, Tap("conv", "conv", mse), example_inputs=example_inputs, teacher_output=True)
    for _ in range(2):
        _, losses = d(IMAGE)
        torch.testing.assert_close(losses["conv"], mse(student.conv(IMAGE), teacher.conv(IMAGE)))


def test_torchvision_resnet_with_in_place_relu():
    from torchvision.models import resnet18

    student, teacher = resnet18(weights=None), resnet18(weights=None)
    d = Distiller(student, teacher, Tap("bn1", "bn1", mse), example_inputs=torch.randn(1, 3, 64, 64)).eval()
    x = torch.randn(2, 3, 64, 64)
    _, losses = d(x)
    torch.testing.assert_close(losses["bn1"], mse(*(m.bn1(m.conv1(x)) for m in (student, teacher))))


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_and_pickles(compiled, tmp_path):
    torch._dynamo.reset()
    student, teacher = Net(4), Net(8)
    if compiled:
        student.compile(backend="eager")
    d = distiller(student, teacher)
    for model in (copy.deepcopy(student), torch_saved(student, tmp_path)):
        assert not any(isinstance(h, _Hook) for m in model.modules() for h in m._forward_hooks.values())
        assert torch.equal(model(IMAGE)["logits"], student(IMAGE)["logits"])
    for other in (copy.deepcopy(d), torch_saved(d, tmp_path), torch.optim.swa_utils.AveragedModel(d).module):
        _, expected = d(IMAGE)
        assert not {id(p) for p in d.parameters()} & {id(p) for p in other.parameters()}
        assert other.teacher is not teacher
        _, losses = other(IMAGE)
        torch.testing.assert_close(losses, expected)
        with torch.no_grad():
            other.student.neck.conv.weight.mul_(2)
        assert other(IMAGE)[1]["neck"] != losses["neck"]
        torch.testing.assert_close(d(IMAGE)[1], expected)


def torch_saved(model, folder):
    torch.save(model, folder / "model.pth")
    return torch.load(folder / "model.pth", weights_only=False)


def test_ema_copy_made_while_the_student_runs(tmp_path):
    """Then it carries hooks, and they become something dead that loads without this package."""
    student = Net(4)
    d = distiller(student)
    copies = []
    student.head.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(student)))
    d(IMAGE)
    student.head._forward_pre_hooks.clear()
    copies[0].head._forward_pre_hooks.clear()
    assert b"maskd_kernels" not in pickletools.optimize(pickle.dumps(copies[0]))
    assert torch.equal(torch_saved(copies[0], tmp_path)(IMAGE)["logits"], student(IMAGE)["logits"])


class Sequence(nn.Module):
    """A ViT in small: a class token and a grid of patches, ``[N, 1 + L, C]``."""

    def __init__(self, width, stride=4):
        super().__init__()
        self.embed = nn.Conv2d(3, width, stride, stride=stride)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.block = nn.Linear(width, width)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        return self.block(torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)).mean(1)


@pytest.mark.parametrize("grid", ["input", (4, 8), [(4, 8)]])
def test_grid_of_tokens(grid):
    images, seen = torch.randn(2, 3, 16, 32), []
    tap = Tap(
        "block", "block", lambda s, t: seen.append((s, t)) or mse(s, t), channel_dim=-1, prefix_tokens=1, grid=grid
    )
    student, teacher = Sequence(6), Sequence(12)
    d = Distiller(student, teacher, tap, example_inputs=images)
    assert d.aligns[0][0].weight.shape == (12, 6, 1, 1)
    d(images)
    s, t = seen[-1]
    expected = teacher.block(teacher.embed(images).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(t, expected)
    torch.testing.assert_close(s, d.aligns[0][0](student.block(student.embed(images).movedim(1, -1)).movedim(-1, 1)))


def test_grid_of_the_teachers_own_images():
    images, seen = torch.randn(2, 3, 16, 32), []
    tap = Tap("block", "block", lambda s, t: seen.append(t) or mse(s, t), channel_dim=-1, prefix_tokens=1, grid="input")
    tap.resize = True
    teacher = Sequence(6)
    d = Distiller(Sequence(6), teacher, tap, example_inputs=images, teacher_inputs=lambda x: x.mT)
    d(images)
    torch.testing.assert_close(seen[-1], teacher.block(teacher.embed(images.mT).movedim(1, -1)).movedim(-1, 1))


def test_a_grid_for_each_level():
    tokens = [torch.randn(2, 32, 3), torch.randn(2, 8, 3)]
    layer = Layer("x", channel_dim=-1, grid=[(4, 8), (2, 4)])
    levels = layer.features({"x": [tokens]}, None, "teacher").levels
    for level, x, grid in zip(levels, tokens, [(4, 8), (2, 4)], strict=True):
        assert torch.equal(level, x.mT.unflatten(-1, grid))
    with pytest.raises(ValueError, match="teacher 'x': expected one grid per level, 1, got 2"):
        layer.features({"x": [tokens[:1]]}, None, "teacher")
    with pytest.raises(ValueError, match=r"prefix_tokens=32 needs token sequences of more tokens, got \[2, 3, 32\]"):
        Layer("x", channel_dim=-1, prefix_tokens=32).features({"x": [tokens[0]]}, None, "teacher")


def test_grid_needs_a_clear_answer():
    tap = {"channel_dim": -1, "prefix_tokens": 1}
    with pytest.raises(ValueError, match=r"student 'block': grid \(3, 5\) needs 15 tokens, got 16"):
        Distiller(Sequence(6), Sequence(6), Tap("block", "block", mse, grid=(3, 5), **tap), example_inputs=IMAGE)
    with pytest.raises(
        ValueError, match=r"grid of 17 tokens for images of 16x16, and none fits; are prefix_tokens right"
    ):
        Distiller(
            Sequence(6), Sequence(6), Tap("block", "block", mse, channel_dim=-1, grid="input"), example_inputs=IMAGE
        )
    with pytest.raises(ValueError, match="grid='input' needs images"):
        Layer("x", channel_dim=-1, grid="input").features({"x": [torch.randn(2, 16, 4)]}, None, "teacher")
    with pytest.raises(ValueError, match=r"grid: expected \(H, W\), .*, got 'auto'"):
        Layer("x", grid="auto")
    with pytest.raises(ValueError, match="prefix_tokens: expected a number of tokens from 0 on, got -1"):
        Layer("x", prefix_tokens=-1)


def test_token_sequences_are_never_interpolated_as_they_are():
    with pytest.raises(
        ValueError, match=r"token sequences of one length, got \[2, 6, 17\] and \[2, 6, 5\]; Tap\(grid="
    ):
        Distiller(
            Sequence(6), Sequence(6, 8), Tap("block", "block", mse, channel_dim=-1, resize=True), example_inputs=IMAGE
        )
    tap = Tap("block", "block", MGDLoss(6, 6), channel_dim=-1, prefix_tokens=1, grid="input", resize=True)
    _, losses = Distiller(Sequence(6), Sequence(6, 8), tap, example_inputs=IMAGE)(IMAGE)
    assert losses["block"].isfinite()


def test_signals_are_interpolated():
    """Three axes too, but their last is space."""
    student, teacher = nn.Conv1d(3, 4, 4, stride=4), nn.Conv1d(3, 4, 2, stride=2)
    signal, seen = torch.randn(2, 3, 32), []
    tap = Tap("", "", lambda s, t: seen.append(s) or mse(s, t), resize=True, name="kd")
    Distiller(student, teacher, tap, example_inputs=signal)(signal)
    torch.testing.assert_close(seen[-1], F.interpolate(student(signal), size=16, mode="linear"))


@pytest.mark.parametrize(("loss", "hint"), [(MasKDLoss(6), "weight_mask=False"), (MGDLoss(6, 6), "grid")])
def test_losses_say_what_sequences_take(loss, hint):
    with pytest.raises(ValueError, match=rf"block: the loss cannot take \[2, 6, 17\] and \[2, 6, 17\]: .*{hint}"):
        Distiller(Sequence(6), Sequence(6), Tap("block", "block", loss, channel_dim=-1), example_inputs=IMAGE)


def values(d, inputs=IMAGE):
    """What the only tap's loss was called with."""
    seen = []
    d.taps[0].loss = lambda s, t: seen.append((s, t)) or torch.zeros(())
    d(inputs)
    return seen[0]


def test_layers_as_one_pyramid():
    """Names or modules, on one side or both."""
    student, teacher = Net(8), Net(8)
    for side in (["stem.0", "neck.conv"], [student.stem[0], student.neck.conv], ("stem.0", student.neck.conv)):
        d = Distiller(student, teacher, Tap(side, ["stem.0", "neck.conv"], mse, align=None)).eval()
        assert d._pairs[0].label == "stem.0, neck.conv"
        s, t = values(d)
        for got, model in ((s, student), (t, teacher)):
            expected = [model.stem[0](IMAGE), model.neck.conv(model.stem(IMAGE))]
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    d = Distiller(student, teacher, Tap(["stem.0", "neck.conv"], "stem.0", mse, align=None))
    with pytest.raises(ValueError, match="as many levels from the student as from the teacher, got 2 and 1"):
        d(IMAGE)
    s, t = values(Distiller(student, teacher, Tap(student.stem, teacher.stem, mse)).eval())
    assert torch.equal(s, student.stem(IMAGE))
    d = Distiller(student, teacher, Tap(torch.compile(student.neck), teacher.neck, mse))
    assert d._pairs[0].label == "neck"
    with pytest.raises(ValueError, match="student: the Conv2d given as a layer is not in Net"):
        Distiller(student, teacher, Tap(nn.Conv2d(3, 3, 1), "stem", mse))


@pytest.mark.parametrize(
    ("structure", "levels", "expected"),
    [
        ("dict", "p3", 1),
        ("dict", 0, 0),
        ("dict", ["p3"], [1]),
        ("dict", [-1, "p2"], [1, 0]),
        ("list", 1, 1),
        ("namedtuple", "b", 1),
        ("text", [0], [0]),
    ],
)
def test_levels(structure, levels, expected):
    student, teacher = Net(8, structure).eval(), Net(8, structure).eval()
    d = Distiller(student, teacher, Tap("neck", "neck", mse, levels=levels)).eval()
    s, _ = values(d)
    every = [x for x in tensors_in(student.neck(student.stem(IMAGE)))]
    if isinstance(expected, list):
        assert all(torch.equal(x, every[i]) for x, i in zip(s, expected, strict=True))
    else:
        assert torch.equal(s, every[expected])


def test_sides_of_different_options():
    student, teacher = Net(8, "tensor").eval(), Net(8, "dict").eval()
    s, t = values(Distiller(student, teacher, Tap("neck", Layer("neck", levels="p2"), mse)).eval())
    assert torch.equal(s, student.neck(student.stem(IMAGE)))
    assert torch.equal(t, teacher.neck(teacher.stem(IMAGE))["p2"])
    both = ["stem", "neck"]
    s, t = values(Distiller(student, teacher, Tap(both, Layer("neck", select=halves), mse, align=None)).eval())
    assert [x.shape[1] for x in t] == [4, 4]


def halves(output):
    return list(output["p2"].chunk(2, 1))


def test_what_is_no_feature_does_not_count():
    class Output(nn.Module):
        def forward(self, x):
            return {"loss": x.sum(), "features": x, "ids": x.long(), "past": None, "inner": (x,), "vector": x[:, 0, 0]}

    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1), Output()) for _ in range(2))
    s, _ = values(Distiller(student, teacher, Tap("1", "1", mse)))
    assert [x.shape for x in s] == [(2, 4, 16, 16)]
    s, _ = values(Distiller(student, teacher, Tap("1", "1", mse, levels="inner")))
    assert [x.shape for x in s] == [(2, 4, 16, 16)]
    for levels, message in (
        ("past", "no level 'past'"),
        ("p9", "no level 'p9' in dict of loss, features"),
        (7, "level 7"),
    ):
        with pytest.raises(ValueError, match=message):
            Distiller(student, teacher, Tap("1", "1", mse, levels=levels))(IMAGE)
    with pytest.raises(TypeError, match=r"got \[\]"):
        Distiller(student, teacher, Tap("1", "1", mse, levels="loss"))(IMAGE)
    with pytest.raises(ValueError, match="levels, select: expected one of them"):
        Tap("1", "1", mse, levels="loss", select=halves)


@pytest.mark.parametrize("align", [None, "auto"])
def test_losses_that_align_by_themselves(align):
    tap = Tap("neck", "neck", AMDLoss([4, 4], [8, 8], reduction=4), align=align)
    d = Distiller(Net(4), Net(8), tap, example_inputs=IMAGE)
    assert not len(d.aligns[0])
    _, losses = d(IMAGE)
    losses["neck"].backward()
    assert all(p.grad.abs().sum() > 0 for p in d.losses[0].align.parameters())


def test_inputs_of_the_teacher():
    def smaller(x, scale=1.0):
        return (x.flip(-1) * scale,)

    student, teacher = Net(8, "tensor").eval(), Net(8, "tensor").eval()
    seen = []
    d = Distiller(student, teacher, Tap("stem", "stem", lambda s, t: seen.append(t) or t.sum()), teacher_inputs=smaller)
    d(IMAGE)
    torch.testing.assert_close(seen[0], teacher.stem(IMAGE.flip(-1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floating_inputs_take_the_teachers_dtype(dtype):
    _, losses = distiller(Net(8), Net(8).to(dtype), loss=MasKDLoss([8, 8]))(IMAGE)
    assert losses["neck"].dtype == torch.float32
    assert losses["neck"] > 0

    class Indexed(Net):
        def forward(self, x, index):
            return super().forward(x[index["of images"]])

    student, teacher = Indexed(8), Indexed(8).to(dtype)
    d = Distiller(student, teacher, Tap("neck", "neck", MasKDLoss([8, 8])))
    d(IMAGE, {"of images": torch.tensor([1, 0])})  # integers stay integers


def test_example_inputs():
    class TwoInputs(Net):
        def forward(self, x, *, scale):
            return super().forward(x * scale)

    assert len(distiller().aligns[0]) == 2
    for inputs in (IMAGE, (IMAGE,), {"x": IMAGE}):
        d = Distiller(Net(4), Net(8), Tap("neck", "neck", mse), example_inputs=inputs)
        assert len(d.aligns[0]) == 2

    class Listed(Net):
        def forward(self, images):
            return super().forward(torch.stack(images))

    d = Distiller(Listed(4), Listed(8), Tap("neck", "neck", mse), example_inputs=list(IMAGE))  # torchvision's
    assert len(d.aligns[0]) == 2
    inputs = {"x": IMAGE, "scale": torch.ones(())}
    assert len(Distiller(TwoInputs(4), TwoInputs(8), Tap("neck", "neck", mse), example_inputs=inputs).aligns[0]) == 2


def test_building_tries_the_loss_and_leaves_no_traces():
    loss = MasKDLoss([8, 8])
    state = torch.get_rng_state()
    d = Distiller(Net(8), Net(8), [Tap("neck", "neck", loss), Tap("stem", "stem", MGDLoss(8, 8))])
    torch.set_rng_state(state)
    d.build(IMAGE)
    assert loss._iter == 0
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"neck: the loss cannot take \[2, 8, 16, 16\], \[2, 8, 8, 8\] and .*2 level"):
        distiller(Net(8), Net(8), loss=MasKDLoss([8, 8, 8]))
    with pytest.raises(ValueError, match=r"neck: the loss cannot take .*expected \[K, 8\]"):
        distiller(Net(8), Net(8), loss=MasKDLoss([16, 16]))


def test_building_tries_the_gradient():
    """PyTorch's own losses are not differentiable between two dtypes, which only their backward pass says."""
    with pytest.raises(
        RuntimeError, match=r"neck: the loss cannot take .* of torch.float32 and torch.bfloat16: .*BFloat16"
    ):
        distiller(Net(8), Net(8).bfloat16())
    distiller(Net(8), Net(8), loss=lambda s, t: mse(s, t).detach())
    with pytest.raises(TypeError, match=r"neck: the loss cannot take .*: expected a tensor of it, got dict"):
        distiller(Net(8), Net(8), loss=lambda s, t: {"loss": mse(s, t)})


def test_errors_that_are_not_about_the_features_pass():
    error = torch.OutOfMemoryError("of memory")

    def loss(s, t):
        raise error

    with pytest.raises(torch.OutOfMemoryError) as caught:
        distiller(Net(8), Net(8), loss=loss)
    assert caught.value is error


def test_things_that_are_no_taps():
    with pytest.raises(TypeError, match=r"taps\[0\]: expected a Tap\(student, teacher, loss\), got tuple"):
        Distiller(Net(4), Net(8), [("neck", "neck", mse)])
    with pytest.raises(TypeError, match="taps: expected a Tap or several, got int"):
        Distiller(Net(4), Net(8), 3)
    with pytest.raises(TypeError, match="loss: expected a module or function, got the class MasKDLoss"):
        Tap("neck", "neck", MasKDLoss)
    with pytest.raises(TypeError, match="layer: expected a layer's name, a module or a list of them, got int"):
        Tap(3, "neck", mse)


def test_models_that_are_no_modules():
    tap = Tap("neck", "neck", mse)
    with pytest.raises(TypeError, match="student: expected a module, got the class Net"):
        Distiller(Net, Net(8), tap)
    with pytest.raises(TypeError, match="teacher: expected a module, got str"):
        Distiller(Net(4), "teacher.pth", tap)
    with pytest.raises(TypeError, match="teacher: expected a module, got OrderedDict"):
        TokenTrainer(Net(8).state_dict(), "neck", channels=8)


def test_loading_before_the_aligns_are_built():
    state = distiller().state_dict()
    late = Distiller(Net(4), Net(8), Tap("neck", "neck", mse))
    with pytest.raises(RuntimeError, match="load_state_dict: the aligns are not built yet"):
        late.load_state_dict(state)
    late.build(IMAGE)
    late.load_state_dict(state)
    assert torch.equal(late.aligns[0][0].weight, state["aligns.0.0.weight"])


def distil_a_wrapped_student(rank):
    """Refused where aligns or losses would stay apart, and right where there are none."""
    torch.manual_seed(0)
    student = nn.parallel.DistributedDataParallel(Net(8))
    for tap in (Tap("neck", "neck", MGDLoss([8, 8], [8, 8])), Tap("neck", "neck", mse)):
        with pytest.raises(ValueError, match=r"DistributedDataParallel\(Distiller\(student, \.\.\.\)\)"):
            Distiller(student, Net(16), tap, example_inputs=IMAGE)
    d = Distiller(student, Net(8), Tap("neck", "neck", MasKDLoss([8, 8])), example_inputs=IMAGE)
    optimizer = torch.optim.SGD(d.trainable_parameters(), lr=0.01)
    torch.manual_seed(rank)
    for _ in range(3):
        output, losses = d(torch.randn(2, 3, 16, 16))
        optimizer.zero_grad()
        (output["logits"].square().mean() + sum(losses.values())).backward()
        optimizer.step()
    return list(d.parameters())


def test_student_in_ddp(tmp_path):
    first, second = parameters_of_processes(distil_a_wrapped_student, tmp_path)
    assert torch.equal(first, second)


def distil_a_copy(rank, d, queue):
    _, losses = d(torch.ones(2, 3, 16, 16))
    queue.put(losses["neck"].item())


def test_spawned_processes_take_a_distiller():
    d = distiller()
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(distil_a_copy, (d, queue), nprocs=1)
    assert queue.get() == pytest.approx(d(torch.ones(2, 3, 16, 16))[1]["neck"].item())


def test_student_features_without_gradient_are_warned_of_once():
    """A reentrant checkpoint gives none: the loss is a constant, and nothing else would say so."""

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.neck, self.reentrant = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), reentrant

        def forward(self, x):
            return checkpoint(self.neck, x.requires_grad_(), use_reentrant=self.reentrant)

    def made(reentrant):
        models = Checkpointed(reentrant), Checkpointed(False)
        return Distiller(*models, Tap("neck.0", "neck.0", F.mse_loss), example_inputs=IMAGE.clone())

    distiller = made(True)
    with pytest.warns(UserWarning, match="neck.0: the student's features have no gradient"):
        distiller(IMAGE.clone())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have no gradient")
        distiller(IMAGE.clone())
        losses = made(False)(IMAGE.clone())[1]
    assert losses["neck.0"].requires_grad


def test_aligns_from_an_iterator_are_for_every_distiller():
    tap = Tap("neck", "neck", mse, align=(nn.Conv2d(8, 8, 1) for _ in range(1)))
    assert [len(Distiller(Net(8), Net(8), tap).aligns[0]) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("change", ["pop", "append", "replace"])
def test_a_container_that_the_model_changes(change):
    """The list or dict itself, not the tensors in it."""

    class Levels(nn.Module):
        def forward(self, x):
            return {"high": x, "low": 2 * x} if change == "pop" else [x, 2 * x]

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.neck = nn.Conv2d(3, 8, 3), Levels()

        def forward(self, x):
            levels = self.neck(self.body(x))
            if change == "pop":
                return levels.pop("high")
            if change == "append":
                levels.append(levels[-1] + 1)
            else:
                levels[0] = levels[1]
            return levels[-1]

    student, teacher = Changing(), Changing()
    distiller = Distiller(student, teacher, Tap("neck", "neck", mse, align=None), teacher_output=True)
    for _ in range(2):
        a, b = student.body(IMAGE), teacher.body(IMAGE)
        torch.testing.assert_close(distiller(IMAGE)[1]["neck"], mse([a, 2 * a], [b, 2 * b]))


def test_a_level_named_twice():
    with pytest.raises(ValueError, match=r"levels: expected each level once, got \[0, 0, 1\]"):
        Layer("neck", levels=[0, 0, 1])
