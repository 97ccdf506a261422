"""The public functions: equivalence with the published formula, precision under autocast, and what bad input gets."""

import copy

import pytest
import torch
from helpers import DEVICE, assert_close, assert_no_worse, features
from torch import nn

import maskd_kernels
from maskd_kernels import MaskModule, MaskWeighting, reference, use_backend


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("customize", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 6), (5, 1), (2, 2)])
def test_loss_is_the_published_one(backend, weighted, customize, size):
    student, teacher = features((2, 10, *size)), features((2, 10, *size))
    module = MaskModule(10, 6, weighted).to(DEVICE)
    nn.init.normal_(module.mask_token, std=0.5)
    inputs = [student, teacher, *module.parameters()]
    parameters = module.weighting
    expected = reference.published_maskd_loss(student, teacher, module.mask_token, parameters, customize)
    expected_gradients = torch.autograd.grad(expected, inputs)
    with use_backend(backend):
        loss = maskd_kernels.maskd_loss(student, teacher, module.mask_token, weighting=parameters, customize=customize)
        gradients = torch.autograd.grad(loss, inputs)
    assert_close(loss, expected, 2e-6, "loss")
    scale = max(g.abs().max().item() for g in expected_gradients[2:])
    for i, (got, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        if wanted.abs().max() > 1e-6 * scale:  # below: softmax's null direction, rounding noise on both sides
            assert_close(got, wanted, 2e-5, f"gradient {i}")


def test_weighting_without_its_convolution():
    """Nine sums per channel give what the 3x3 convolution over the whole map gives, in float64 to the last bits."""
    for size in [(7, 9), (1, 1), (1, 5), (4, 1), (2, 2), (3, 3)]:
        module = MaskModule(10).double().to(DEVICE)
        x = features((2, 10, *size), torch.float64)
        collapsed = module.forward_prob(x)
        convolved = module.prob(x).softmax(1).unsqueeze(2)
        assert_close(collapsed, convolved, 1e-14, f"weights {size}")
        upstream = torch.randn_like(collapsed)
        a, b = (torch.autograd.grad(out, [x, *module.parameters()][:1], upstream)[0] for out in (collapsed, convolved))
        assert_close(a, b, 1e-13, f"gradient {size}")


def test_no_convolution_runs(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("a convolution ran")

    loss_fn = maskd_kernels.MasKDLoss(10, train_tokens=True).to(DEVICE)
    monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
    monkeypatch.setattr(nn.Conv2d, "forward", fail)
    loss_fn(features((2, 10, 7, 9)), features((2, 10, 7, 9))).backward()


def test_levels_add_up(backend):
    shapes = [(2, 10, 13, 17), (2, 6, 7, 9), (2, 10, 1, 1)]
    students, teachers = [features(s) for s in shapes], [features(s) for s in shapes]
    tokens = [torch.randn(6, s[1], device=DEVICE) for s in shapes]
    with use_backend(backend):
        together, dice = maskd_kernels.maskd_loss(students, teachers, tokens, return_dice=True)
        alone = [maskd_kernels.maskd_loss(*level) for level in zip(students, teachers, tokens, strict=True)]
        masks = maskd_kernels.receptive_masks(teachers, tokens)
    assert_close(together, torch.stack(alone).sum(), 1e-6, "loss")
    assert [tuple(m.shape) for m in masks] == [(2, 6, *s[2:]) for s in shapes]
    for i, level in enumerate(masks):
        assert_close(dice[i], maskd_kernels.dice_diversity(level), 1e-6, f"dice {i}")


def test_token_sequences(backend):
    """[N, L, C] by its strides: the same as [N, C, L]."""
    student, teacher = features((2, 17, 12)), features((2, 17, 12))
    tokens = torch.randn(6, 12, device=DEVICE)
    with use_backend(backend):
        loss = maskd_kernels.maskd_loss(student, teacher, tokens, channel_dim=-1)
        other = maskd_kernels.maskd_loss(student.mT, teacher.mT, tokens)
        seen, _ = maskd_kernels.masked_features(teacher, tokens, channel_dim=-1)
        masks = maskd_kernels.receptive_masks(teacher, tokens, channel_dim=-1)
    assert torch.equal(loss, other)
    assert_close(seen, teacher * masks.sum(1)[..., None], 1e-6, "masked features")


@pytest.mark.parametrize("weighted", [False, True])
def test_masked_mse(backend, weighted):
    student, teacher = features((2, 10, 7, 9)), features((2, 10, 7, 9))
    masks = torch.rand(2, 3, 7, 9, device=DEVICE).requires_grad_()
    weights = torch.rand(2, 3, device=DEVICE).requires_grad_() if weighted else None
    share = (masks.square()[:, :, None] * (student - teacher).square()[:, None]).sum((2, 3, 4))
    share = share / (10 * masks.sum((2, 3)))
    expected = (share * weights).sum(1).mean() if weighted else share.mean()
    inputs = [student, teacher, masks] + ([weights] if weighted else [])
    with use_backend(backend):
        loss = maskd_kernels.masked_mse(student, teacher, masks, weights=weights)
        assert_close(loss, expected, 2e-6, "loss")
        for i, (a, b) in enumerate(
            zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True)
        ):
            assert_close(a, b, 4e-6, f"gradient {i}")
        everything = maskd_kernels.masked_mse(student, teacher, torch.ones(2, 1, 7, 9, dtype=torch.bool, device=DEVICE))
        assert_close(everything, torch.nn.functional.mse_loss(student, teacher), 2e-6, "plain mean squared error")


def test_masked_features_of_token_training(backend):
    module, x = MaskModule(10).to(DEVICE), features((2, 10, 7, 9))
    # As first drawn the masks are all but equal: the weighting's gradient is the rounding of numbers that cancel.
    torch.nn.init.normal_(module.mask_token)
    upstream = torch.randn_like(x)

    def eager(x, module):
        masks = (module.mask_token @ x.flatten(2)).sigmoid().unflatten(-1, (7, 9))
        return (x[:, None] * masks[:, :, None] * module.prob(x).softmax(1)[..., None]).sum(1)

    def with_gradients(seen, x, module):
        return [seen, *torch.autograd.grad(seen, [x, module.mask_token, module.prob[0].weight], upstream.to(seen))]

    exact_module, exact_x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    exact = with_gradients(eager(exact_x, exact_module), exact_x, exact_module)
    plain = with_gradients(eager(x, module), x, module)
    with use_backend(backend):
        got = with_gradients(module(x)[0], x, module)
    for name, a, b, c in zip(("masked", "x", "tokens", "convolution"), got, plain, exact, strict=True):
        assert_no_worse(a, b, c, name)


def test_dice():
    equal = torch.full((2, 4, 3, 3), 0.7, device=DEVICE)
    assert_close(maskd_kernels.dice_diversity(equal), torch.ones((), device=DEVICE), 1e-6, "equal masks")
    disjoint = torch.eye(4, device=DEVICE).reshape(1, 4, 2, 2)
    assert maskd_kernels.dice_diversity(disjoint) == 0
    single = features((2, 1, 3, 3)).sigmoid()
    assert maskd_kernels.dice_diversity(single) == 0
    assert torch.autograd.grad(maskd_kernels.dice_diversity(single), single)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(backend, dtype):
    """Sums beyond 65504, float16's largest number, and Dice's 1e-12, 0 in float16."""
    student, teacher = features((1, 8, 20, 20), dtype, scale=200.0), features((1, 8, 20, 20), dtype, scale=200.0)
    tokens = torch.full((3, 8), 0.0, device=DEVICE)
    with use_backend(backend), torch.autocast(DEVICE, dtype=dtype):
        loss, dice = maskd_kernels.maskd_loss(student, teacher, tokens, return_dice=True)
    expected = 0.5 * (student.double() - teacher.double()).square().mean()
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 1e-5, "loss")
    assert_close(dice, torch.ones(1, device=DEVICE), 1e-5, "dice")
    loss.backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_vanishing_mask_is_finite():
    """A mask that is 0 everywhere in float32 (logits of -200) costs nothing and is not 0 / 0."""
    student, teacher = features((1, 4, 3, 3)), torch.ones(1, 4, 3, 3, device=DEVICE)
    tokens = torch.full((2, 4), -50.0, device=DEVICE)
    loss = maskd_kernels.maskd_loss(student, teacher, tokens)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_empty_batch_costs_nothing(backend):
    student = features((0, 10, 7, 9))
    loss = maskd_kernels.maskd_loss(student, features((0, 10, 7, 9)), torch.randn(6, 10, device=DEVICE))
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 10, 7, 9)


def test_mixed_float64():
    student, teacher = features((2, 10, 7, 9), torch.float64), features((2, 10, 7, 9))
    loss = maskd_kernels.maskd_loss(student, teacher, torch.randn(6, 10, device=DEVICE))
    loss.backward()
    assert loss.dtype == torch.float64
    assert teacher.grad.dtype == torch.float32


def bad(change):
    arguments = {
        "student": torch.randn(2, 10, 7, 9),
        "teacher": torch.randn(2, 10, 7, 9),
        "tokens": torch.randn(6, 10),
    }
    arguments.update(change)
    return arguments


MODULE = MaskModule(10)
BAD = [
    (
        {"student": torch.randn(2, 5, 7, 9)},
        ValueError,
        r"student: expected \[2, 10, 7, 9\] like teacher, got \[2, 5, 7, 9\]; align",
    ),
    (
        {"student": torch.randn(2, 10, 7, 8)},
        ValueError,
        r"student: expected \[2, 10, 7, 9\] like teacher, got \[2, 10, 7, 8\]",
    ),
    ({"student": [torch.randn(2, 10, 7, 9)] * 2}, ValueError, r"student: expected 1 level\(s\) like teacher, got 2"),
    (
        {"student": torch.ones(2, 10, 7, 9, dtype=torch.int64)},
        TypeError,
        r"student: expected float32.* got torch.int64",
    ),
    ({"teacher": torch.randn(2, 10)}, ValueError, r"teacher: expected \[N, C, \*spatial\].* got \[2, 10\]"),
    ({"teacher": None}, TypeError, "teacher: expected a tensor or a list of tensors, got NoneType"),
    ({"teacher": ["x"]}, TypeError, "teacher: .* got a list of str"),
    ({"teacher": []}, ValueError, "teacher: expected at least one level"),
    ({"tokens": torch.randn(6, 9)}, ValueError, r"tokens: expected \[K, 10\] for a teacher of .* got \[6, 9\]"),
    ({"tokens": torch.randn(0, 10)}, ValueError, r"tokens: expected at least one token, got \[0, 10\]"),
    ({"tokens": torch.ones(6, 10, dtype=torch.int32)}, TypeError, "tokens: expected a floating dtype, got torch.int32"),
    (
        {"tokens": torch.randn(6, 10, device="meta")},
        ValueError,
        "tokens: expected device cpu like the features, got meta",
    ),
    (
        {"student": torch.randn(2, 10, 7, 9, device="meta")},
        ValueError,
        "student: expected device cpu like teacher, got meta",
    ),
    ({"channel_dim": 2}, ValueError, "channel_dim: expected 1 .* got 2"),
    (
        {"weighting": MaskModule(9).weighting},
        ValueError,
        r"weighting.conv_weight: expected \[10, 10, 3, 3\], got \[9, 9, 3, 3\]",
    ),
    ({"weighting": [MODULE.weighting] * 2}, ValueError, r"weighting: expected 1 level\(s\) like teacher, got 2"),
    (
        {"student": torch.randn(2, 10, 7), "teacher": torch.randn(2, 10, 7), "weighting": MODULE.weighting},
        ValueError,
        r"weighting: .*needs images \[N, C, H, W\], got a teacher of \[2, 10, 7\]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        maskd_kernels.maskd_loss(**bad(change))


def test_bad_levels_name_theirs():
    levels = [torch.randn(2, 10, 7, 9), torch.randn(2, 10, 4, 5)]
    with pytest.raises(ValueError, match=r"student\[1\]: expected \[2, 10, 4, 5\] like teacher\[1\]"):
        maskd_kernels.maskd_loss([levels[0], levels[0]], levels, [torch.randn(6, 10)] * 2)
    with pytest.raises(ValueError, match=r"tokens\[1\]: expected 6 tokens like tokens\[0\], got \[5, 10\]"):
        maskd_kernels.maskd_loss(levels, levels, [torch.randn(6, 10), torch.randn(5, 10)])
    with pytest.raises(ValueError, match=r"teacher\[1\]: expected batch size 2"):
        maskd_kernels.receptive_masks([levels[0], levels[1][:1]], [torch.randn(6, 10)] * 2)


def test_bad_masks():
    x = torch.randn(2, 10, 7, 9)
    with pytest.raises(ValueError, match=r"masks: expected \[2, K, 7, 9\], got \[2, 3, 7, 8\]"):
        maskd_kernels.masked_mse(x, x, torch.rand(2, 3, 7, 8))
    with pytest.raises(TypeError, match=r"masks: expected a floating dtype or bool, got torch.int64"):
        maskd_kernels.masked_mse(x, x, torch.ones(2, 3, 7, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights: expected \[2, 3\] for features of \[2, 10, 7, 9\], got \[3\]"):
        maskd_kernels.masked_mse(x, x, torch.rand(2, 3, 7, 9), weights=torch.rand(3))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton, got 'cuda'"):
        use_backend("cuda")


def test_weighting_is_a_named_tuple():
    assert MaskWeighting._fields == ("conv_weight", "conv_bias", "projection_weight", "projection_bias")


def test_scale_pixels_and_channels(backend):
    x = torch.randn(2, 5, 7, 9, device=DEVICE, requires_grad=True)
    keep = torch.rand(2, 7, 9, device=DEVICE) > 0.5
    assert torch.equal(maskd_kernels.scale_pixels(x, keep), x * keep[:, None])
    scale = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    for layout in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        y = maskd_kernels.scale_channels(layout, scale)
        assert torch.equal(y, layout * scale[:, :, None, None])
        upstream = torch.randn_like(y)
        got = torch.autograd.grad(y, [layout, scale], upstream)
        assert_close(got[0], upstream.double() * scale.double()[:, :, None, None], 2e-6, "x")
        assert_close(got[1], (upstream.double() * layout.double()).sum((2, 3)), 4e-6, "scale")
    last = x.movedim(1, -1)
    assert torch.equal(maskd_kernels.scale_pixels(last, keep, channel_dim=-1), last * keep[..., None])
    assert torch.equal(maskd_kernels.scale_channels(last, scale, channel_dim=-1), last * scale[:, None, None])


def test_squared_error_and_attention(backend):
    pred, target = (torch.randn(2, 5, 7, 9, device=DEVICE) for _ in range(2))
    scale = torch.rand(2, 5, device=DEVICE)
    expected = (scale.double()[:, :, None, None] * pred.double() - target.double()).square().sum((1, 2, 3))
    assert_close(maskd_kernels.squared_error(pred, target, channel_scale=scale), expected, 2e-6, "error")
    both = maskd_kernels.squared_error([pred, pred[:, :, :3]], [target, target[:, :, :3]])
    assert both.shape == (2, 2)
    assert_close(both[0], (pred.double() - target.double()).square().sum((1, 2, 3)), 2e-6, "levels")
    with use_backend("reference"):
        assert maskd_kernels.squared_error(pred.double(), target).dtype == torch.float64
    attention, mean = maskd_kernels.attention_stats(pred)
    assert_close(attention, pred.double().abs().mean(1), 2e-6, "attention")
    assert_close(mean, pred.double().mean((2, 3)), 4e-6, "mean")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: f.scale_pixels(x, x), ValueError, r"scale: expected \[2, 3, 4\] for features of \[2, 5, 3, 4\]"),
        (
            lambda f, x: f.scale_pixels(x, x[:, 0].long()),
            TypeError,
            "scale: expected a floating dtype or bool, got torch.i",
        ),
        (lambda f, x: f.scale_pixels([x], []), ValueError, "scale: expected at least one level, got an empty list"),
        (lambda f, x: f.scale_channels(x, x[:, :, 0]), ValueError, r"scale: expected \[2, 5\] for .* got \[2, 5, 4\]"),
        (lambda f, x: f.squared_error(x, x[:, :4]), ValueError, r"pred: expected \[2, 4, 3, 4\] like target, got"),
        (lambda f, x: f.squared_error(x, [x, x]), ValueError, r"pred: expected 2 level\(s\) like target, got 1"),
        (
            lambda f, x: f.squared_error(x, x, channel_scale=x[0, :, 0]),
            ValueError,
            r"channel_scale: expected \[2, 5\] for",
        ),
        (lambda f, x: f.attention_stats(x.long()), TypeError, "x: expected float32, float16, bfloat16 or float64, got"),
        (lambda f, x: f.attention_stats(x[0, 0]), ValueError, r"x: expected \[N, C, \*spatial\] with one to three"),
    ],
)
def test_bad_input_of_streaming_functions(call, error, message):
    with pytest.raises(error, match=message):
        call(maskd_kernels, torch.randn(2, 5, 3, 4, device=DEVICE))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_mapped_code_is_right():
    """Nothing that records or transforms a call may meet the kernels behind the dispatcher's back."""
    student, teacher = features((2, 10, 7, 9), grad=False), features((2, 10, 7, 9), grad=False)
    tokens = torch.randn(6, 10, device=DEVICE)
    traced = torch.jit.trace(lambda s: maskd_kernels.maskd_loss(s, teacher, tokens), student)
    assert_close(traced(2 * student), maskd_kernels.maskd_loss(2 * student, teacher, tokens), 2e-6, "traced")
    mapped = torch.func.vmap(lambda s, t: maskd_kernels.maskd_loss(s[None], t[None], tokens))(student, teacher)
    pairs = zip(student.split(1), teacher.split(1), strict=True)
    assert_close(mapped, torch.stack([maskd_kernels.maskd_loss(s, t, tokens) for s, t in pairs]), 2e-6, "mapped")


def test_lazily_negated_features(backend):
    """The imaginary part of a conjugate is a view whose memory holds the opposite."""

    def negated():
        return torch.randn(2, 4, 5, 6, dtype=torch.complex64, device=DEVICE).conj().imag

    x, t, tokens = negated(), negated(), torch.randn(3, 4, device=DEVICE)
    assert x.is_neg()

    def loss_of(a, b):
        attention, mean = maskd_kernels.attention_stats(a)
        return maskd_kernels.maskd_loss(a, b, tokens), maskd_kernels.squared_error(a, b), attention, mean

    with use_backend(backend):
        got = loss_of(x, t)
        wanted = [x.clone().resolve_neg(), t.clone().resolve_neg()]
        expected = loss_of(*wanted)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-6, "value")


def test_scales_of_any_layout(backend):
    x, scale = torch.randn(2, 3, 40, 50, device=DEVICE), torch.rand(2, 50, 40, device=DEVICE).mT
    assert not scale.is_contiguous()
    with use_backend(backend):
        assert torch.equal(maskd_kernels.scale_pixels(x, scale), x * scale[:, None])
