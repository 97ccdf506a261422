"""Prepared teachers: what is folded, what must not be, and how far the features are off."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.segmentation import deeplabv3_resnet50, lraspp_mobilenet_v3_large
from torchvision.ops import FrozenBatchNorm2d

from maskd_kernels import Distiller, MasKDLoss, Tap, TokenTrainer, prepare_teacher
from maskd_kernels.distill.features import tensors_in

IMAGE = (2, 3, 64, 96)
NOTHING = {"weights": None, "weights_backbone": None}


def trained(model):
    """Batch norms with statistics and affine parameters that are not the initial ones."""
    for layer in model.modules():
        if getattr(layer, "running_var", None) is not None:
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
            if layer.weight is not None:
                layer.weight.data.uniform_(0.5, 1.5)
                layer.bias.data.uniform_(-0.5, 0.5)
    return model.eval()


def features(model, layer, *inputs):
    """Copies of what a layer puts out."""
    found = []
    handle = dict(model.named_modules())[layer].register_forward_hook(
        lambda _module, _inputs, output: found.extend(x.clone() for x in tensors_in(output))
    )
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    return found


def off(a, b):
    """Relative L2 error."""
    return float((a.double() - b.double()).norm() / b.double().norm())


class Wired(nn.Module):
    """Convolution and batch norm, called as a test likes."""

    def __init__(self, call, convolution=None, norm=None):
        super().__init__()
        self.conv = convolution or nn.Conv2d(3, 4, 3)
        self.bn = norm or nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def branching(x):
    """What torch.fx cannot trace."""
    return x if x.sum() > 0 else x + 1


def keep(model, x):
    model.stored = model.conv(x)
    return model.bn(model.stored)


def keep_in_list(model, x):
    model.stored = [model.conv(x)]
    return model.bn(model.stored[0])


MODELS = {
    "resnet18": (lambda: resnet18(), ["bn1", "layer2", "layer4.1.bn2", "fc"], False, 20),
    "retinanet": (lambda: retinanet_resnet50_fpn(**NOTHING, min_size=64), ["backbone", "backbone.body.bn1"], True, 53),
    "faster_rcnn": (lambda: fasterrcnn_resnet50_fpn(**NOTHING, min_size=64), ["backbone"], True, 53),
    "deeplabv3": (lambda: deeplabv3_resnet50(**NOTHING), ["backbone", "classifier"], False, 60),
    "lraspp": (lambda: lraspp_mobilenet_v3_large(**NOTHING), ["backbone", "classifier"], False, 47),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_models_lose_all_their_batch_norms_and_keep_their_features(name):
    make, taps, is_list, count = MODELS[name]
    teacher = trained(make()).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    inputs = (list(torch.rand(IMAGE)),) if is_list else (torch.rand(IMAGE),)

    prepared = prepare_teacher(teacher, taps=taps, example_inputs=inputs)

    report = prepared.preparation
    assert (len(report.folded), report.left) == (count, {})
    assert max(report.errors.values()) < 2e-5
    assert all(isinstance(prepared.get_submodule(norm), nn.Identity) for norm in report.folded)
    assert dict(prepared.named_modules()).keys() == dict(teacher.named_modules()).keys()
    assert teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    teacher.eval()
    for tap in taps:
        for got, expected in zip(features(prepared, tap, *inputs), features(teacher, tap, *inputs), strict=True):
            assert off(got, expected) < 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_half_teachers_run_whole_and_their_errors_are_reported(name):
    make, taps, is_list, _ = MODELS[name]
    teacher = trained(make())
    inputs = (list(torch.rand(IMAGE)),) if is_list else (torch.rand(IMAGE),)
    prepared = prepare_teacher(teacher, dtype=torch.bfloat16, taps=taps, example_inputs=inputs)
    for tap in taps:
        pairs = list(zip(features(prepared, tap, *inputs), features(teacher, tap, *inputs), strict=True))
        measured = max(off(got, expected) for got, expected in pairs)
        assert 1e-4 < measured < 3e-2
        assert prepared.preparation.errors[tap] == pytest.approx(measured, rel=1e-3)
        assert all(got.dtype == torch.bfloat16 for got, _ in pairs)


@pytest.mark.parametrize(
    ("convolution", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), (2, 3, 9, 7)),
        (nn.Conv2d(4, 4, 3, groups=2), nn.SyncBatchNorm(4), (2, 4, 9, 7)),
        (nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4, eps=0.3), (2, 3, 9, 7)),
        (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 5, 4, 6)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), (2, 3, 9, 7)),
        (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
    ],
)
def test_every_kind_of_convolution_and_batch_norm(convolution, norm, shape):
    teacher = trained(nn.Sequential(convolution, norm, nn.ReLU(inplace=True)))
    x = torch.randn(shape)
    prepared = prepare_teacher(teacher, taps=["1", "2"], example_inputs=(x,))
    assert prepared.preparation.folded == {"1": "0"}
    for tap in ("1", "2"):
        assert off(features(prepared, tap, x)[0], features(teacher, tap, x)[0]) < 1e-6


def test_the_fold_is_rounded_once():
    teacher = trained(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)))
    folded, norm = prepare_teacher(teacher)[0], teacher[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = teacher[0].weight.double() * scale[:, None, None, None]
    assert torch.equal(folded.weight, exact.float())


LEFT = {
    "read beside the norm": (Wired(lambda m, x: m.bn(y := m.conv(x)) + y), "other readers"),
    "changed in place": (Wired(lambda m, x: m.bn(y := m.conv(x)) + y.mul_(2)), "other readers"),
    "convolution shared by two norms": (Wired(lambda m, x: m.bn(m.conv(x)) + m.other(m.conv(x))), "other readers"),
    "norm after another layer": (Wired(lambda m, x: m.bn(m.conv(x).relu())), "not fed by a convolution"),
    "norm shared": (Wired(lambda m, x: m.bn(m.conv(x)) + m.bn(x.sum(1, True).expand(-1, 4, -1, -1))[..., 2:, 2:]), ""),
    "stored": (Wired(keep), "stores the output of conv"),
    "stored in a list": (Wired(keep_in_list), "stores the output of conv"),
    "weight read": (Wired(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum()), "reads weights"),
    "batch statistics": (
        Wired(lambda m, x: m.bn(m.conv(x)), norm=nn.BatchNorm2d(4, track_running_stats=False)),
        "batch's own statistics",
    ),
    "transposed with groups": (
        Wired(lambda m, x: m.bn(m.conv(x.sum(1, True).expand(-1, 4, -1, -1))), nn.ConvTranspose2d(4, 4, 3, groups=2)),
        "transposed convolution with groups",
    ),
    "untraceable": (Wired(lambda m, x: m.bn(m.conv(branching(x)))), "cannot be traced"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left_and_named(name):
    teacher, why = LEFT[name]
    trained(teacher)
    x = torch.randn(2, 3, 9, 7)
    prepared = prepare_teacher(teacher, channels_last=False)
    assert prepared.preparation.folded == {}
    assert why in prepared.preparation.left["bn"]
    assert "bn left: " in str(prepared.preparation)
    assert type(prepared.bn) is type(teacher.bn)
    assert "stored" not in vars(prepared)  # nor anything else that tracing leaves behind
    assert torch.equal(prepared(x), teacher(x))


def test_pieces_of_a_model_that_cannot_be_traced_are_folded():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model = Wired(lambda m, x: m.block(branching(m.block(m.bn(m.conv(x))))))
    model.block = block
    x = torch.randn(2, 3, 9, 7)
    prepared = prepare_teacher(trained(model), taps=["block"], example_inputs=(x,))
    assert prepared.preparation.folded == {"block.1": "block.0"}
    assert set(prepared.preparation.left) == {"bn", "other"}
    assert prepared.preparation.errors["block"] < 1e-6
    opaque = Wired(lambda m, x: m.bn(m.conv(m.inner(x))))  # a piece inside it cannot be traced: the rest can
    opaque.inner = Wired(lambda m, x: branching(x))
    assert prepare_teacher(trained(opaque)).preparation.folded == {"bn": "conv"}


def test_a_piece_that_runs_otherwise_than_traced_raises_in_the_first_forward():
    def call(model, x):  # not the piece as a whole: its layers, and another layer in between
        return model.block[1](branching(model.block[0](x)).relu())

    model = Wired(call)
    model.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 9, 7)
    prepared = prepare_teacher(trained(model))
    with pytest.raises(RuntimeError, match=r"'block\.0'.*runs otherwise than it was traced"):
        prepared(x)
    left = prepare_teacher(model, taps=["block.0"], channels_last=False)
    assert torch.equal(left(x), model(x))
    left = prepare_teacher(model, example_inputs=(x,), channels_last=False)  # which show what runs
    assert "block.1" in left.preparation.left
    assert torch.equal(left(x), model(x))


def test_layers_of_a_container_that_are_run_one_by_one_are_traced_one_by_one():
    """As YOLO's are: the container's own forward would chain them, and none runs it."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            own = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)]
            self.model = nn.Sequential(*own, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            first = self.model[0](x)
            second = self.model[1](branching(first))
            third = self.model[2](first + second)
            return self.model[3](third) + third

    teacher, x = trained(Steps()), torch.randn(2, 4, 9, 7)
    prepared = prepare_teacher(teacher, taps=["model.0", "model.1"], example_inputs=(x,))
    assert prepared.preparation.folded == {"model.0.1": "model.0.0", "model.1.1": "model.1.0"}
    assert set(prepared.preparation.left) == {"model.3"}  # what it is fed with has another reader
    assert max(prepared.preparation.errors.values()) < 1e-6
    assert off(prepared(x), teacher(x)) < 1e-6


def test_a_model_traced_as_a_whole_may_be_run_in_parts():
    teacher, x = trained(resnet18()), torch.randn(2, 64, 9, 7)
    with torch.no_grad():
        assert off(prepare_teacher(teacher).layer1(x), teacher.layer1(x)) < 1e-6


def test_a_branch_that_tracing_takes_otherwise_raises():
    model = Wired(lambda m, x: m.other(m.conv(x)) if isinstance(x, torch.Tensor) else m.bn(m.conv(x)))
    with pytest.raises(RuntimeError, match="runs otherwise"):
        prepare_teacher(trained(model))(torch.randn(2, 3, 9, 7))


def test_a_batch_norm_that_reads_something_else_raises():
    model = Wired(lambda m, x: m.bn(m.conv(x).relu() if isinstance(x, torch.Tensor) else m.conv(x)))
    with pytest.raises(RuntimeError, match="runs otherwise"):
        prepare_teacher(trained(model))(torch.randn(2, 3, 9, 7))


def test_a_forward_that_fails_checks_nothing():
    def call(model, x):
        if model.fails:
            raise ValueError("mine")
        return model.bn(model.conv(x).relu() if isinstance(x, torch.Tensor) else model.conv(x))

    model = Wired(call)
    model.fails = False
    prepared, x = prepare_teacher(trained(model)), torch.randn(2, 3, 9, 7)
    prepared.fails = True
    with pytest.raises(ValueError, match="mine"):
        prepared(x)
    prepared.fails = False
    with pytest.raises(RuntimeError, match="runs otherwise"):
        prepared(x)


def test_float32_casts_a_half_teacher_up():
    teacher, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 9, 7)
    prepared = prepare_teacher(copy.deepcopy(teacher).bfloat16(), dtype=torch.float32)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert off(prepared(x), teacher(x)) < 1e-2


def test_a_convolution_run_without_its_piece_raises():
    model = Wired(lambda m, x: m.block[0](branching(x)))
    model.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prepared = prepare_teacher(trained(model))
    assert prepared.preparation.folded == {"block.1": "block.0"}
    with pytest.raises(RuntimeError, match="runs otherwise"):
        prepared(torch.randn(2, 3, 9, 7))


def test_taps_on_folded_convolutions_are_refused_or_kept():
    teacher = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    student, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 9, 7)
    prepared = prepare_teacher(teacher)
    assert prepared.preparation.folded == {"1": "0.0"}
    for name in ("0.0", "0"):  # the container shows the convolution's output as well
        with pytest.raises(ValueError, match=f"teacher: '{name}' puts out other values.*batch norm '1'"):
            Distiller(student, prepared, [Tap("0", name, MasKDLoss(4))])
        with pytest.raises(ValueError, match="puts out other values"):
            TokenTrainer(prepared, name, 4)
        kept = prepare_teacher(teacher, taps=[Tap("0", name, MasKDLoss(4))], channels_last=False)
        assert "is tapped" in kept.preparation.left["1"]
        assert torch.equal(features(kept, name, x)[0], features(teacher, name, x)[0])
    Distiller(student, prepared, [Tap("0", "1", MasKDLoss(4))]).remove()


def test_layers_with_hooks_are_left():
    teacher = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    teacher[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    x = torch.randn(2, 3, 9, 7)
    prepared = prepare_teacher(teacher, channels_last=False)
    assert "has hooks" in prepared.preparation.left["1"]
    assert torch.equal(prepared(x), teacher(x))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_prepared_teacher_distils_copies_pickles_and_refuses_training(dtype):
    teacher, x = trained(resnet18(num_classes=5)), torch.rand(2, 3, 64, 64)
    prepared = prepare_teacher(teacher, dtype=dtype)
    expected = prepared(x)
    assert not expected.requires_grad
    for again in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), prepare_teacher(prepared)):
        assert torch.equal(again(x), expected)
        assert type(again).__name__ == "ResNet"
    taps = [Tap("layer2", "layer2", MasKDLoss(128))]
    dtypes = []
    prepared.register_forward_pre_hook(lambda _module, inputs: dtypes.append(inputs[0].dtype))
    with Distiller(resnet18(), prepared, taps, example_inputs=(x,)) as distiller:
        _, losses = distiller.train()(x)
        losses["layer2"].backward()
        assert not prepared.training
    assert set(dtypes) == {torch.float32}
    assert torch.equal(prepared(x), expected)
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError, match="expected eval mode, got training mode"):
        prepared.train()(x)


def test_compiled():
    teacher, x = trained(resnet18(num_classes=5)), torch.rand(2, 3, 32, 32)
    compiled = prepare_teacher(teacher, compile=True)
    assert len(compiled.preparation.folded) == 20
    assert not any(layer._forward_hooks for layer in compiled.modules())  # they would be compiled too
    with torch.no_grad():
        assert off(compiled(x), teacher(x)) < 1e-5
    branched = Wired(lambda m, x: m.block(branching(x)))
    branched.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    trained(branched)
    assert prepare_teacher(branched, compile=True).preparation.folded == {}  # nothing has checked the piece
    assert prepare_teacher(branched, compile=True, example_inputs=(x,)).preparation.folded == {"block.1": "block.0"}


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(convolution):
    nn.utils.parametrize.register_parametrization(convolution, "weight", Halved())
    return convolution


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        parametrized,
        lambda convolution: prune.l1_unstructured(convolution, "weight", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_are_computed_are_left(computed, dtype):
    teacher = trained(nn.Sequential(computed(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 9, 7)
    expected = teacher(x)  # leaves a result of the computation in the convolution
    prepared = prepare_teacher(teacher, dtype=dtype)
    assert set(prepared.preparation.left) == {"1"}
    for _ in range(2):
        assert off(prepared(x), expected) < (1e-6 if dtype is None else 1e-2)


def test_batch_norms_that_do_more_are_left_and_named():
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    teacher = trained(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4)))
    prepared = prepare_teacher(teacher)
    assert prepared.preparation.left == {"1": "is a BatchNormAct, which may do more than normalise"}
    x = torch.randn(2, 3, 9, 7)
    assert off(prepared(x), teacher(x)) < 1e-6


def test_channels_last():
    teacher = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 9, 7)
    assert prepare_teacher(teacher)(x).is_contiguous(memory_format=torch.channels_last)
    assert prepare_teacher(teacher, channels_last=False)(x).is_contiguous()


def test_bad_input():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="teacher: expected a module, got str"):
        prepare_teacher("resnet18")
    with pytest.raises(ValueError, match=r"dtype: expected None or one of .*float64"):
        prepare_teacher(teacher, dtype=torch.float64)
    for taps in ("neck", ["neck"], Tap("0", "neck", MasKDLoss(4))):
        with pytest.raises(ValueError, match="taps: no layer 'neck'"):
            prepare_teacher(teacher, taps=taps)
    teacher[0].weight.data.fill_(1e5)
    with pytest.raises(ValueError, match=r"float16 cannot hold 0\.weight, whose largest value is 1e\+05"):
        prepare_teacher(teacher, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_a_prepared_half_teacher_is_prepared_again(dtype):
    teacher, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 9, 7)
    half = prepare_teacher(teacher, dtype=torch.bfloat16)
    again = prepare_teacher(half, dtype=dtype)
    assert again(x).dtype == {None: torch.bfloat16}.get(dtype, dtype)
    assert off(again(x), teacher(x)) < 1e-2
    assert half(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_prepared_graph_modules_are_copied(dtype, duplicate):
    """torchvision's ``create_feature_extractor`` makes these."""
    x = torch.randn(2, 3, 9, 7)
    traced = torch.fx.symbolic_trace(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())))
    prepared = prepare_teacher(traced, dtype=dtype)
    assert torch.equal(duplicate(prepared)(x), prepared(x))
    assert prepared(x).dtype == (dtype or torch.float32)


def test_half_of_nothing():
    """A teacher with neither parameters nor buffers has nothing to cast."""
    x = torch.randn(1, 3, 8, 8)
    pooling = nn.Sequential(nn.AvgPool2d(2))
    assert torch.equal(prepare_teacher(pooling, dtype=torch.bfloat16)(x), pooling(x))
