"""MGDLoss as a module: masks, levels, presets, precision, what bad input gets. Its values: test_golden.py."""

import pytest
import torch
from helpers import DEVICE, assert_close

from maskd_kernels import MGD_PRESETS, MGDLoss


def maps(channels, *size, **options):
    return torch.randn(2, channels, *size, device=DEVICE, **options)


def test_random_mask_share_and_generator():
    loss_fn = MGDLoss(4, 4, lambda_mgd=0.65).to(DEVICE)
    teacher = [torch.zeros(2, 4, 64, 64, device=DEVICE), torch.zeros(2, 4, 32, 32, device=DEVICE)]
    drawn = [loss_fn._draw(teacher, torch.Generator(DEVICE).manual_seed(seed)) for seed in (3, 3, 4)]
    assert [list(m.shape) for m in drawn[0]] == [[2, 1, 64, 64], [2, 1, 32, 32]]
    assert abs(drawn[0][0].float().mean().item() - 0.35) < 0.02
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_channel_mask_share():
    loss_fn = MGDLoss(4, 4096, lambda_mgd=0.15, mask_on_channel=True).to(DEVICE)
    (keep,) = loss_fn._draw([torch.zeros(2, 4096, 2, 2, device=DEVICE)], None)
    assert keep.shape == (2, 4096, 1, 1)
    assert abs(keep.float().mean().item() - 0.85) < 0.02


def test_masked_pixels_are_not_seen(backend):
    """With the student masked out somewhere, what it has there makes no difference, and gets no gradient."""
    loss_fn, teacher = MGDLoss(4, 6).to(DEVICE), maps(6, 7, 9)
    keep = torch.rand(2, 1, 7, 9, device=DEVICE) > 0.5
    student = maps(4, 7, 9, requires_grad=True)
    loss = loss_fn(student, teacher, keep=keep)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient * ~keep, torch.zeros_like(gradient))
    assert gradient.abs().sum() > 0
    changed = torch.where(keep, student, student + 1)
    assert torch.equal(loss_fn(changed, teacher, keep=keep), loss)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("on_channel", [False, True])
def test_mask_of_nothing_or_everything(backend, value, on_channel):
    loss_fn, student = MGDLoss(4, 6, mask_on_channel=on_channel).to(DEVICE), maps(4, 5, 3, requires_grad=True)
    keep = torch.full((2, 6, 1, 1) if on_channel else (2, 1, 5, 3), value, device=DEVICE)
    loss = loss_fn(student, maps(6, 5, 3), keep=keep)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_levels_are_summed(backend):
    sizes = [(8, 9), (4, 5), (1, 1)]
    loss_fn = MGDLoss([4, 5, 6], [6, 6, 6]).to(DEVICE)
    assert {k.split(".")[0] + "." + k.split(".")[1] for k in loss_fn.state_dict()} == {
        *(f"{part}.{i}" for part in ("align", "generation") for i in range(3))
    } - {"align.2"}
    student, teacher = [maps(c, *s) for c, s in zip((4, 5, 6), sizes, strict=True)], [maps(6, *s) for s in sizes]
    keep = [torch.rand(2, 1, *s, device=DEVICE) > 0.5 for s in sizes]
    together = loss_fn(student, teacher, keep=keep)
    alone = 0.0
    for i in range(3):
        single = MGDLoss(student[i].shape[1], 6).to(DEVICE)
        weights = {k.replace(f".{i}.", ".", 1): v for k, v in loss_fn.state_dict().items() if k.split(".")[1] == str(i)}
        single.load_state_dict(weights)
        alone = alone + single(student[i], teacher[i], keep=keep[i])
    assert_close(together, alone, 1e-6, "sum")


def test_shared_generation():
    loss_fn = MGDLoss([4, 5], [6, 6], shared_generation=True).to(DEVICE)
    assert set(loss_fn.state_dict()) == {
        *(f"align.{i}.{x}" for i in range(2) for x in ("weight", "bias")),
        *(f"generation.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")),
    }
    loss_fn([maps(4, 4, 4), maps(5, 2, 2)], [maps(6, 4, 4), maps(6, 2, 2)]).backward()
    assert all(p.grad is not None for p in loss_fn.parameters()), "DDP wants every parameter used"
    # One block built for a single number of channels serves any number of levels.
    MGDLoss(4, 6).to(DEVICE)([maps(4, 4, 4), maps(4, 2, 2)], [maps(6, 4, 4), maps(6, 2, 2)]).backward()


def test_presets():
    assert {name: (p["alpha_mgd"], p["lambda_mgd"], p["mask_on_channel"]) for name, p in MGD_PRESETS.items()} == {
        "detection_one_stage": (2e-5, 0.65, False),
        "detection_two_stage": (5e-7, 0.45, False),
        "segmentation": (2e-5, 0.75, False),
        "classification": (7e-5, 0.15, True),
    }
    assert MGDLoss(4, 6, **MGD_PRESETS["classification"]).mask_on_channel


def test_half_precision_does_not_overflow(backend):
    """Errors whose sum is far beyond float16's range, under autocast and in pure half."""
    loss_fn, keep = MGDLoss(8, 8).to(DEVICE), torch.ones(2, 1, 16, 16, device=DEVICE)
    student, teacher = maps(8, 16, 16), maps(8, 16, 16) * 300
    expected = loss_fn(student, teacher, keep=keep)
    dtype = torch.bfloat16 if DEVICE == "cpu" else torch.float16
    with torch.autocast(DEVICE, dtype=dtype):
        under_autocast = loss_fn(student, teacher, keep=keep)
    assert under_autocast.dtype == torch.float32
    assert_close(under_autocast, expected, 1e-2, "autocast")
    half = loss_fn.half()(student.half(), teacher.half(), keep=keep)
    assert half.isfinite()
    assert_close(half, expected, 1e-2, "half")


def test_channels_last(backend):
    loss_fn, keep = MGDLoss(4, 6).to(DEVICE), torch.rand(2, 1, 7, 9, device=DEVICE) > 0.5
    student, teacher = maps(4, 7, 9), maps(6, 7, 9)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    assert_close(loss_fn(*last, keep=keep), loss_fn(student, teacher, keep=keep), 2e-6, "loss")


@pytest.mark.parametrize("on_channel", [False, True])
def test_compile(backend, on_channel):
    torch._dynamo.reset()
    loss_fn = MGDLoss(4, 6, mask_on_channel=on_channel).to(DEVICE)
    student, teacher = maps(4, 7, 9, requires_grad=True), maps(6, 7, 9)
    keep = torch.rand(2, 6, 1, 1, device=DEVICE) if on_channel else torch.rand(2, 1, 7, 9, device=DEVICE)
    compiled = torch.compile(loss_fn, fullgraph=True)
    assert torch.compile(loss_fn, fullgraph=True)(student, teacher).isfinite(), "with a mask of its own"
    outputs = [f(student, teacher, keep=keep) for f in (loss_fn, compiled)]
    gradients = [torch.autograd.grad(x, [student, *loss_fn.parameters()]) for x in outputs]
    for a, b in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert_close(b, a, 2e-5, "compiled")


def test_empty_batch(backend):
    assert MGDLoss(4, 6).to(DEVICE)(maps(4, 3, 3)[:0], maps(6, 3, 3)[:0]).item() == 0


def test_bad_arguments():
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"lambda_mgd: expected a share in \[0, 1\), got"):
            MGDLoss(4, 6, lambda_mgd=share)
    with pytest.raises(ValueError, match="student_channels: expected a positive whole number, got 0"):
        MGDLoss(0, 6)
    with pytest.raises(ValueError, match=r"student_channels: expected 2 level\(s\) like teacher_channels, got 1"):
        MGDLoss([4], [6, 6])
    with pytest.raises(ValueError, match=r"shared_generation: expected equal teacher_channels, got \[6, 8\]"):
        MGDLoss([4, 4], [6, 8], shared_generation=True)


def test_bad_features():
    loss_fn = MGDLoss(4, 6).to(DEVICE)
    with pytest.raises(ValueError, match=r"preds_S: expected \[N, 4, H, W\], got \[2, 5, 3, 3\]"):
        loss_fn(maps(5, 3, 3), maps(6, 3, 3))
    with pytest.raises(ValueError, match=r"preds_T: expected \[N, 6, H, W\], got \[2, 4, 3, 3\]"):
        loss_fn(maps(4, 3, 3), maps(4, 3, 3))
    with pytest.raises(ValueError, match=r"preds_S: expected batch and size of \[2, 6, 3, 4\] like preds_T, got"):
        loss_fn(maps(4, 3, 3), maps(6, 3, 4))
    with pytest.raises(TypeError, match="preds_S: expected a tensor or a list of tensors, got str"):
        loss_fn("student", maps(6, 3, 3))
    with pytest.raises(ValueError, match=r"keep: expected \[2, 1, 3, 3\] for features of .*, got \[2, 3, 3\]"):
        loss_fn(maps(4, 3, 3), maps(6, 3, 3), keep=torch.ones(2, 3, 3, device=DEVICE))
    with pytest.raises(TypeError, match=r"keep: expected a floating dtype or bool, got torch.int64"):
        loss_fn(maps(4, 3, 3), maps(6, 3, 3), keep=torch.ones(2, 1, 3, 3, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("on_channel", [False, True])
def test_compiles_for_sizes_that_vary(on_channel):
    loss = torch.compile(MGDLoss(8, 8, mask_on_channel=on_channel), fullgraph=True, backend="aot_eager")
    for n, height, width in ((2, 5, 5), (3, 7, 4)):
        student = torch.randn(n, 8, height, width, requires_grad=True)
        loss(student, torch.randn(n, 8, height, width)).backward()
        assert student.grad.abs().sum() > 0
