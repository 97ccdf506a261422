"""Distiller: any two models, without touching the student's output or the teacher's state."""

import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from helpers import parameters_of_processes
from torch import nn
from torch.nn import functional as F

from maskd_kernels import AMDLoss, Distiller, MasKDLoss, MGDLoss, Tap


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


def distiller(student=None, teacher=None, **tap):
    student, teacher = student or Net(4), teacher or Net(8)
    return Distiller(student, teacher, [Tap("neck", "neck", **{"loss": mse, **tap})], example_inputs=(IMAGE,))


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
        ValueError, match=r"neck\[0\]: expected the teacher's channels after align, got \[2, 4, 16, 16\]"
    ):
        Distiller(Net(4), Net(8), [Tap("neck", "neck", mse, align=None)])(IMAGE)
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
        assert student.neck._forward_hooks
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
    with pytest.raises(ValueError, match=r"teacher: no layer 'zzz' in Net; near it: stem, neck, head"):
        Distiller(Net(4), Net(8), [Tap("neck", "zzz", mse)])
    with pytest.raises(RuntimeError, match=r"student: the layer 'never' did not run in this forward"):
        Distiller(Net(4), Net(8), [Tap("never", "neck", mse)])(IMAGE)
    with pytest.raises(ValueError, match=r"neck: expected as many levels .* got 1 and 2"):
        distiller(Net(4, "one"))(IMAGE)
    with pytest.raises(ValueError, match=r"neck: expected the same keys .* got p2, p3 and p3, p4"):
        distiller(Net(4, "dict"), Net(8, "other keys"))(IMAGE)
    with pytest.raises(TypeError, match=r"student 'neck': expected a tensor, .* got list of Tensor, str"):
        distiller(Net(4, "text"))


def test_bad_taps():
    with pytest.raises(ValueError, match="taps: expected at least one Tap"):
        Distiller(Net(4), Net(8), [])
    with pytest.raises(ValueError, match=r"taps: expected different names, got neck, neck"):
        Distiller(Net(4), Net(8), [Tap("neck", "neck", mse)] * 2)
    with pytest.raises(TypeError, match="loss: expected a module or function, got str"):
        Tap("neck", "neck", "mse")


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
