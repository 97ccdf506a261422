"""AMDLoss: what its arguments mean, against a plain PyTorch composition, and what bad input gets."""

import pytest
import torch
from helpers import DEVICE, assert_close
from test_streaming_ops import FLOAT64_BACKENDS
from torch.nn.functional import conv2d

from maskd_kernels import AMDLoss, use_backend


def maps(channels, *size, dtype=torch.float32, **options):
    return torch.randn(2, channels, *size, dtype=dtype, device=DEVICE, **options)


def composition(parameters, student, teacher, alpha=2e-5, temperature=0.5, threshold=1.0, source="teacher"):
    """The docstring's equations, step by step."""
    pixels = teacher.shape[2] * teacher.shape[3]
    strength = teacher.abs().mean(1).flatten(1) / temperature
    attention = (pixels * strength.softmax(1)).reshape(2, 1, *teacher.shape[2:])
    aligned = conv2d(student, parameters["align.weight"], parameters["align.bias"])
    hidden = conv2d(
        aligned * (attention < threshold), parameters["generation.0.weight"], parameters["generation.0.bias"], padding=1
    )
    generated = conv2d(hidden.relu(), parameters["generation.2.weight"], parameters["generation.2.bias"], padding=1)
    mean = (teacher if source == "teacher" else aligned).mean((2, 3))
    squeezed = mean @ parameters["channel_modules.0.0.weight"].T + parameters["channel_modules.0.0.bias"]
    excited = squeezed.relu() @ parameters["channel_modules.0.2.weight"].T + parameters["channel_modules.0.2.bias"]
    return alpha / 2 * (excited.sigmoid()[:, :, None, None] * generated - teacher).square().sum()


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_equals_plain_pytorch(source):
    for backend in FLOAT64_BACKENDS:
        loss_fn = AMDLoss(4, 32, channel_source=source).to(DEVICE, torch.float64)
        parameters = {k: v.detach().clone().requires_grad_() for k, v in loss_fn.state_dict().items()}
        student = maps(4, 7, 9, dtype=torch.float64, requires_grad=True)
        teacher = maps(32, 7, 9, dtype=torch.float64, requires_grad=True)
        expected = composition(parameters, student, teacher, source=source)
        wanted = torch.autograd.grad(expected, [student, teacher, *parameters.values()])
        with use_backend(backend):
            loss = loss_fn(student, teacher)
            got = torch.autograd.grad(loss, [student, teacher, *loss_fn.parameters()])
        names = ["student", "teacher", *parameters]
        order = {name: i for i, name in enumerate(["student", "teacher", *dict(loss_fn.named_parameters())])}
        assert_close(loss, expected, 1e-12, "loss")
        for name, b in zip(names, wanted, strict=True):
            assert_close(got[order[name]], b, 1e-10, name)


def test_float32(backend):
    loss_fn, student, teacher = AMDLoss(4, 32).to(DEVICE), maps(4, 7, 9), maps(32, 7, 9)
    exact = composition({k: v.double() for k, v in loss_fn.state_dict().items()}, student.double(), teacher.double())
    assert_close(loss_fn(student, teacher), exact, 2e-6, "loss")


def test_attention_has_mean_one(backend):
    attention = AMDLoss(4, 16).attention(maps(16, 7, 9) * 3)
    assert attention.shape == (2, 7, 9)
    assert_close(attention.mean((1, 2)), torch.ones(2, device=DEVICE), 1e-6, "mean")
    cold = AMDLoss(4, 16, temperature=0.05).attention(maps(16, 7, 9) * 3)
    assert cold.amax() > 2 * attention.amax(), "a lower temperature concentrates it"


def test_threshold_keeps_exactly_what_it_says():
    attention = torch.tensor([[[0.2, 0.999], [1.0, 1.8]]], device=DEVICE)
    kept = AMDLoss(4, 16).keep(attention)
    assert kept.tolist() == [[[True, True], [False, False]]]
    assert AMDLoss(4, 16, threshold=0.5).keep(attention).tolist() == [[[True, False], [False, False]]]
    assert torch.equal(AMDLoss(4, 16, mask_salient=False).keep(attention), ~kept)


@pytest.mark.parametrize("salient", [True, False])
def test_masked_pixels_get_no_gradient(backend, salient):
    loss_fn = AMDLoss(4, 16, mask_salient=salient).to(DEVICE)
    student, teacher = maps(4, 7, 9, requires_grad=True), maps(16, 7, 9) * 2
    keep = loss_fn.keep(loss_fn.attention(teacher))[:, None]
    (gradient,) = torch.autograd.grad(loss_fn(student, teacher), student)
    assert 0 < keep.float().mean() < 1
    assert torch.equal(gradient * ~keep, torch.zeros_like(gradient))
    assert (gradient * keep).abs().sum() > 0


def test_channel_scale():
    loss_fn = AMDLoss(4, 32).to(DEVICE)
    (scale,) = loss_fn._channel_scale([torch.randn(2, 32, device=DEVICE) * 10])
    assert ((scale > 0) & (scale < 1)).all()
    loss_fn = AMDLoss(4, 32, reduction=2).to(DEVICE)  # enough hidden units that some are above zero
    loss_fn(maps(4, 5, 5), maps(32, 5, 5)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss_fn.channel_modules.parameters())
    assert AMDLoss(4, 32, channel_adaptive=False).channel_modules is None


def test_loss_falls_when_the_student_learns(backend):
    """A hundred steps on one batch: the student and the block come closer to the teacher."""
    loss_fn, teacher = AMDLoss(8, 16, alpha_amd=1e-2).to(DEVICE), maps(16, 6, 6)
    student = maps(8, 6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([student, *loss_fn.parameters()], lr=1e-2)
    losses = []
    for _ in range(100 if backend != "triton" else 20):
        optimizer.zero_grad()
        loss = loss_fn(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_levels(backend):
    loss_fn = AMDLoss([4, 5], [16, 32], reduction=8).to(DEVICE)
    student, teacher = [maps(4, 6, 7), maps(5, 3, 3)], [maps(16, 6, 7), maps(32, 3, 3)]
    loss = loss_fn(student, teacher)
    loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters()), "DDP wants every parameter used"
    alone = 0.0
    for i in range(2):
        single = AMDLoss(student[i].shape[1], teacher[i].shape[1], reduction=8).to(DEVICE)
        weights = {}
        for key, value in loss_fn.state_dict().items():
            part, level, rest = key.split(".", 2)
            if level == str(i):
                weights[f"channel_modules.0.{rest}" if part == "channel_modules" else f"{part}.{rest}"] = value
        single.load_state_dict(weights)
        alone = alone + single(student[i], teacher[i])
    assert_close(loss, alone, 1e-6, "sum")


def test_autocast_and_half(backend):
    loss_fn, student, teacher = AMDLoss(4, 16).to(DEVICE), maps(4, 8, 8), maps(16, 8, 8) * 2
    expected = loss_fn(student, teacher)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = loss_fn(student, teacher)
    assert cast.dtype == torch.float32
    assert_close(cast, expected, 2e-2, "autocast")
    assert loss_fn.bfloat16()(student.bfloat16(), teacher.bfloat16()).isfinite()


def test_channels_last(backend):
    loss_fn, student, teacher = AMDLoss(4, 16).to(DEVICE), maps(4, 7, 9), maps(16, 7, 9)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    assert_close(loss_fn(*last), loss_fn(student, teacher), 2e-6, "loss")


def test_compile(backend):
    torch._dynamo.reset()
    loss_fn = AMDLoss(4, 16).to(DEVICE)
    student, teacher = maps(4, 7, 9, requires_grad=True), maps(16, 7, 9)
    outputs = [f(student, teacher) for f in (loss_fn, torch.compile(loss_fn, fullgraph=True))]
    gradients = [torch.autograd.grad(x, [student, *loss_fn.parameters()]) for x in outputs]
    for a, b in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert_close(b, a, 2e-5, "compiled")


def test_empty_batch(backend):
    assert AMDLoss(4, 16).to(DEVICE)(maps(4, 3, 3)[:0], maps(16, 3, 3)[:0]).item() == 0


def test_bad_arguments():
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a number above 0, got"):
            AMDLoss(4, 16, temperature=temperature)
    for reduction in (17, 0, 2.5):
        with pytest.raises(ValueError, match="reduction: expected a whole number from 1 to the 16 channels, got"):
            AMDLoss(4, [16], reduction=reduction) if reduction == 0 else AMDLoss(4, 16, reduction=reduction)
    with pytest.raises(ValueError, match="channel_source: expected 'teacher' or 'student', got 'both'"):
        AMDLoss(4, 16, channel_source="both")
    with pytest.raises(ValueError, match=r"preds_T: expected \[N, 16, H, W\], got \[2, 8, 3, 3\]"):
        AMDLoss(4, 16).to(DEVICE)(maps(4, 3, 3), maps(8, 3, 3))
