"""What users hand in beside plain float32 maps: mixed dtypes, subclasses, default devices, hooks, other threads."""

import warnings

import pytest
import torch
from helpers import DEVICE, assert_close

import maskd_kernels
from maskd_kernels import MGDLoss, TokenTrainer, reference, use_backend
from maskd_kernels.ops.masked_conv import masked_conv

SINGLE_AND_DOUBLE = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float16, torch.float64)]


@pytest.mark.parametrize("dtypes", SINGLE_AND_DOUBLE)
def test_attention_of_levels_in_several_dtypes(dtypes):
    x = [
        torch.randn(2, 8, s, s, dtype=d, device=DEVICE, requires_grad=True)
        for s, d in zip((40, 30), dtypes, strict=True)
    ]
    for backend in ("native" if DEVICE == "cpu" else "auto", "reference"):
        with use_backend(backend):
            attention, mean = maskd_kernels.attention_stats(x)
            exact = reference.attention_stats([level.double() for level in x])
            got = torch.autograd.grad(sum(y.square().sum() for y in (*attention, *mean)), x)
        expected = torch.autograd.grad(sum(y.square().sum() for group in exact for y in group), x)
        for a, b in zip((*attention, *mean, *got), (*exact[0], *exact[1], *expected), strict=True):
            assert_close(a, b, 1e-10 if a.dtype == torch.float64 and a.dim() < 4 else 1e-3, "mixed levels")


@pytest.mark.parametrize("dtypes", SINGLE_AND_DOUBLE)
def test_tokens_in_another_dtype_than_the_features(dtypes):
    dtype, of_tokens = dtypes
    x = torch.randn(2, 16, 100, 100, device=DEVICE).to(dtype).requires_grad_()
    tokens = (torch.randn(6, 16, dtype=of_tokens, device=DEVICE) * 0.1).requires_grad_()
    with use_backend("native" if DEVICE == "cpu" else "auto"):  # whatever the size
        seen, dice = maskd_kernels.masked_features(x, tokens)
    masks = (tokens.double() @ x.double().flatten(2)).sigmoid()
    expected = x.double() * masks.sum(1).reshape(2, 1, 100, 100)
    assert seen.dtype == dtype
    assert dice.isfinite()
    assert_close(seen, expected, 2e-3, "seen")
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(seen, [x, tokens], upstream.to(dtype))
    for a, b in zip(got, torch.autograd.grad(expected, [x, tokens], upstream), strict=True):
        assert_close(a, b, 2e-3, "gradient")


def test_token_trainer_in_double_on_a_single_teacher():
    teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 5, 1))
    trainer = TokenTrainer(teacher, "0", channels=16)
    picture = torch.randn(1, 3, 200, 200)
    expected, _ = trainer(picture)
    trainer.mask_modules.double()
    got, dice = trainer(picture)
    assert_close(got, expected.double(), 1e-5, "logits")
    (got.square().mean() + dice).backward()
    assert all(p.grad.isfinite().all() for p in trainer.parameters() if p.grad is not None)


class Tagged(torch.Tensor):
    """A subclass as users write them."""


@pytest.mark.parametrize("which", ["student", "teacher", "tokens", "weighting"])
def test_subclasses_meet_no_kernel_outside_the_dispatcher(which):
    c, k = 6, 3
    given = {
        "student": torch.randn(2, c, 9, 7, device=DEVICE, requires_grad=True),
        "teacher": torch.randn(2, c, 9, 7, device=DEVICE),
        "tokens": torch.randn(k, c, device=DEVICE),
    }
    shapes = ([c, c, 3, 3], [c], [k, c, 1, 1], [k])
    weighting = [torch.randn(shape, device=DEVICE) for shape in shapes]
    expected = maskd_kernels.maskd_loss(**given, weighting=maskd_kernels.MaskWeighting(*weighting))
    if which == "weighting":
        weighting = [w.as_subclass(Tagged) for w in weighting]
    else:
        given[which] = given[which].detach().as_subclass(Tagged).requires_grad_(which == "student")
    from maskd_kernels.ops import maskd_loss as loss_op

    inputs = loss_op.Inputs(*[[given[name]] for name in ("teacher", "tokens", "student")], [weighting])
    call = loss_op.signature(1, inputs, inputs.tensors())
    assert loss_op.recall(call) is None
    assert not loss_op.applies(call, inputs)
    loss = maskd_kernels.maskd_loss(**given, weighting=maskd_kernels.MaskWeighting(*weighting))
    assert_close(loss.as_subclass(torch.Tensor), expected, 1e-6, "loss")
    loss.backward()
    assert given["student"].grad.isfinite().all()


def test_negated_weighting_is_read_with_its_sign():
    def negated(*shape):
        return torch._neg_view(torch.randn(*shape, device=DEVICE))  # contiguous: nothing copies it on the way

    student, teacher = torch.randn(2, 5, 6, 7, device=DEVICE), torch.randn(2, 5, 6, 7, device=DEVICE)
    tokens, weighting = negated(3, 5), [negated(5, 5, 3, 3), negated(5), negated(3, 5, 1, 1), negated(3)]
    resolved = [w.resolve_neg() for w in weighting]
    # Twice each, so that the second call is recalled where it may be.
    for _ in range(2):
        expected = maskd_kernels.maskd_loss(
            student, teacher, tokens.resolve_neg(), weighting=maskd_kernels.MaskWeighting(*resolved)
        )
        loss = maskd_kernels.maskd_loss(student, teacher, tokens, weighting=maskd_kernels.MaskWeighting(*weighting))
        assert_close(loss, expected, 1e-6, "loss")


@pytest.mark.skipif(DEVICE != "cpu", reason="the gather runs on a CPU")
def test_masked_conv_under_a_default_device():
    x, weight, bias = torch.randn(2, 8, 9, 7), torch.randn(4, 8, 3, 3), torch.randn(4)
    x.requires_grad_(), weight.requires_grad_()
    keep = torch.rand(2, 9, 7) > 0.5
    expected = torch.nn.functional.conv2d(x * keep[:, None], weight, bias, padding=1)
    wanted = torch.autograd.grad(expected.square().sum(), [x, weight])
    with torch.device("meta"):
        got = masked_conv(x, keep, weight, bias)
        gradients = torch.autograd.grad(got.square().sum(), [x, weight])
    for a, b in zip((got, *gradients), (expected, *wanted), strict=True):
        assert_close(a, b, 1e-5, "masked_conv")


@pytest.mark.skipif(DEVICE != "cpu", reason="the gather runs on a CPU")
def test_mgd_of_an_empty_batch_where_it_gathers():
    loss_fn = MGDLoss(128, 128)
    student = torch.randn(0, 128, 32, 32, requires_grad=True)
    loss_fn(student, torch.randn(0, 128, 32, 32)).backward()
    assert student.grad.shape == student.shape
    assert all(p.grad.abs().max() == 0 for p in loss_fn.parameters())


@pytest.mark.skipif(DEVICE != "cpu", reason="the gather runs on a CPU")
@pytest.mark.parametrize("where", ["first", "block", "pre", "global", "replaced"])
def test_hooks_of_mgds_first_convolution_run(where):
    loss_fn, calls = MGDLoss(128, 128), []
    first = loss_fn.generation[0]

    def hook(*arguments):
        calls.append(1)

    handle = None
    if where == "replaced":
        forward = first.forward
        first.forward = lambda x: calls.append(1) or forward(x)
    elif where == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    else:
        layer = loss_fn.generation if where == "block" else first
        (layer.register_forward_pre_hook if where == "pre" else layer.register_forward_hook)(hook)
    try:
        x = torch.randn(1, 128, 32, 32)
        assert not loss_fn._gathers([x], [torch.ones(1, 1, 32, 32, dtype=torch.bool)])
        loss_fn(x, x)
    finally:
        if handle is not None:
            handle.remove()
    assert calls


def test_the_upstream_gradient_is_read_without_a_warning():
    student, teacher, tokens = torch.randn(1, 5, 4, 7), torch.randn(1, 5, 4, 7), torch.randn(3, 5)
    student, teacher, tokens = student.to(DEVICE).requires_grad_(), teacher.to(DEVICE), tokens.to(DEVICE)
    factor = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    loss = maskd_kernels.maskd_loss(student, teacher, tokens) * factor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_level_leaves_no_gradient_unwritten(backend, empty):
    """Beside a level with pixels: nothing that a loop did not reach holds what was in memory."""
    sizes = [(0, 7) if i == empty else (5, 7) for i in range(2)]
    pred = [torch.randn(2, 6, *s, device=DEVICE, requires_grad=True) for s in sizes]
    target = [torch.randn(2, 6, *s, device=DEVICE) for s in sizes]
    scale = [torch.randn(2, 6, device=DEVICE, requires_grad=True) for _ in sizes]
    tokens = [torch.randn(3, 6, device=DEVICE, requires_grad=True) for _ in sizes]
    error = maskd_kernels.squared_error(pred, target, channel_scale=scale)
    gradients = torch.autograd.grad(error.sum(), scale)
    assert gradients[1 - empty].abs().max() > 0
    assert gradients[empty].abs().max() == 0
    assert error.shape == (2, 2)
    assert error[empty].abs().max() == 0
    mean = maskd_kernels.attention_stats(pred)[1]
    assert mean[empty].abs().max() == 0
    gradients = torch.autograd.grad(maskd_kernels.maskd_loss(pred, target, tokens), tokens)
    assert gradients[1 - empty].abs().max() > 0
    assert gradients[empty].abs().max() == 0
