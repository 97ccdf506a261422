"""Derivatives of other kinds than one backward: second ones, forward mode, functorch's, batched ones; saved features.

Every operator and loss, on every backend, against the same computation made of PyTorch's own operations alone.
"""

import threading

import pytest
import torch
from helpers import DEVICE, assert_close

import maskd_kernels as mk
from maskd_kernels import backends, use_backend
from maskd_kernels.alike import Recollection
from maskd_kernels.ops import maskd_loss as loss_op
from maskd_kernels.ops import registration
from maskd_kernels.ops.masked_conv import masked_conv

SHAPES = [(2, 5, 6, 7), (2, 4, 3, 2)]


def maps(shapes=SHAPES):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def loss_inputs():
    return [*maps(), *maps(), *(torch.randn(3, c, dtype=torch.float64) * 0.5 for _, c, *_ in SHAPES)]


def weighting_inputs(channels=5):
    shapes = ((channels, channels, 3, 3), (channels,), (3, channels, 1, 1), (3,))
    return [torch.randn(shape, dtype=torch.float64) * 0.5 for shape in shapes]


def weighted(s, t, e, *weighting, **options):
    return mk.maskd_loss(s, t, e, weighting=mk.functional.MaskWeighting(*weighting), **options)


KEEP = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0)) > 0.5


def module_call(build):
    """A loss of one student and one teacher feature, and its parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build()

    def call(s, t, *parameters):
        state = dict(zip([name for name, _ in module.named_parameters()], parameters, strict=True))
        # Transforms let nothing change that they do not know of.
        state.update({name: x.to(s.device).clone() for name, x in module.named_buffers()})
        return torch.func.functional_call(module, state, (s, t))

    def inputs():
        return [*maps(SHAPES[:1] * 2), *(p.detach().double() for p in module.parameters())]

    return call, inputs


class Kept(mk.MGDLoss):
    """With a mask that is not drawn anew."""

    def forward(self, s, t):
        return super().forward(s, t, keep=KEEP[:, None].to(s.device))


def one_map():
    return maps(SHAPES[:1])[0]


# name: the function, its inputs, and how many of them, from the first on, are differentiated
CALLS = {
    "maskd_loss": (lambda *x: mk.maskd_loss(x[:2], x[2:4], x[4:]), loss_inputs, 6),
    "frozen maskd_loss": (lambda *x: mk.maskd_loss(x[:2], x[2:4], x[4:], eps=1e-3), loss_inputs, 2),
    "frozen, weighted": (weighted, lambda: [one_map(), one_map(), loss_inputs()[4], *weighting_inputs()], 1),
    "weighted": (weighted, lambda: [one_map(), one_map(), loss_inputs()[4], *weighting_inputs()], 7),
    "customized": (lambda *x: mk.maskd_loss(x[:2], x[2:4], x[4:], customize=True), loss_inputs, 6),
    "frozen, customized": (lambda *x: mk.maskd_loss(x[:2], x[2:4], x[4:], customize=True), loss_inputs, 2),
    "with Dice": (lambda *x: mk.maskd_loss(x[:2], x[2:4], x[4:], return_dice=True), loss_inputs, 6),
    "receptive_masks": (lambda *x: mk.receptive_masks(x[:2], x[4:], student=x[2:4]), loss_inputs, 6),
    "masked_features": (mk.masked_features, lambda: [one_map(), loss_inputs()[4]], 2),
    "masked_mse": (mk.masked_mse, lambda: [one_map(), one_map(), torch.rand(2, 3, 6, 7, dtype=torch.float64)], 3),
    "mask_weights": (
        lambda t, *w: mk.functional.mask_weights(t, mk.functional.MaskWeighting(*w)),
        lambda: [one_map(), *weighting_inputs()],
        5,
    ),
    "scale_pixels": (mk.scale_pixels, lambda: [one_map(), torch.randn(2, 6, 7, dtype=torch.float64)], 2),
    "scale_channels": (mk.scale_channels, lambda: [one_map(), torch.randn(2, 5, dtype=torch.float64)], 2),
    "squared_error": (
        lambda p, t, s: mk.squared_error(p, t, channel_scale=s),
        lambda: [one_map(), one_map(), torch.randn(2, 5, dtype=torch.float64)],
        3,
    ),
    "squared_error of levels": (lambda *x: mk.squared_error(x[:2], x[2:]), lambda: [*maps(), *maps()], 4),
    "attention_stats": (lambda *x: mk.attention_stats(x), maps, 2),
    "masked_conv": (
        lambda x, w, b: masked_conv(x, KEEP.to(x.device), w, b),
        lambda: [one_map(), torch.randn(4, 5, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)],
        3,
    ),
    "MasKDLoss": (*module_call(lambda: mk.MasKDLoss(5, num_tokens=3, train_tokens=True)), 2),
    "MasKDSegLoss": (*module_call(lambda: mk.MasKDSegLoss(5)), 1),
    "MGDLoss": (*module_call(lambda: Kept(5, 5)), 6),
    "AMDLoss": (*module_call(lambda: mk.AMDLoss(5, 5, reduction=2)), 1),
}


@pytest.fixture(params=list(CALLS))
def call(request, backend):
    """A function, its inputs as the backend takes them, and which are differentiated."""
    if backend == "triton" and request.param.endswith("Loss"):
        pytest.skip("made of the operators, which are slow in Triton's interpreter")
    function, make, trained = CALLS[request.param]
    dtype = torch.float32 if backend == "triton" or request.param == "masked_conv" else torch.float64
    inputs = [x.to(DEVICE, dtype) for x in make()]
    return (lambda *x: flat(function(*x))), inputs, min(trained, len(inputs))


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [y for item in x for y in flat(item)]


def composite(function):
    """What it gives where nothing but PyTorch's own operations runs, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration.Operator, "__call__", lambda self, *arguments: self.reference(*arguments))
        patch.setattr(loss_op, "signature", lambda *arguments: None)
        patch.setattr(loss_op, "applies", lambda *arguments: False)
        return function()


def leaves(inputs, trained, dtype=None):
    return [x.to(dtype or x.dtype).detach().clone().requires_grad_(i < trained) for i, x in enumerate(inputs)]


def noise_like(tensors):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in tensors]


def check(got, expected):
    """Element by element; gradients that are missing are missing in both."""
    largest = max(x.abs().max().item() for x in expected if x is not None)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        if b.abs().max() < 1e-12 * largest:
            assert a.abs().max() <= 1e-5 * largest, f"result {i}"
        else:
            assert_close(a, b, 1e-9 if a.dtype == torch.float64 else 5e-4, f"result {i}")


def test_gradients_are_differentiated(call):
    """A penalty on gradients, as GradNorm's: also in what the loss was multiplied by."""
    function, inputs, trained = call

    def penalty(dtype=None):
        x = leaves(inputs, trained, dtype)
        factor = torch.tensor(2.0, dtype=x[0].dtype, device=DEVICE, requires_grad=True)
        outputs = [y for y in function(*x) if y.requires_grad]
        loss = sum((y * n).sum() for y, n in zip(outputs, noise_like(outputs), strict=True)) * factor
        gradients = torch.autograd.grad(loss, x[:trained], create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in gradients if g is not None)
        return torch.autograd.grad(total, [factor, *x[:trained]], allow_unused=True)

    expected = composite(lambda: penalty(torch.float64))
    assert expected[0].abs() > 0
    check(penalty(), expected)


def test_forward_mode(call):
    function, inputs, trained = call
    tangents = noise_like(inputs[:trained])

    def outputs_and_tangents(dtype=None):
        with torch.autograd.forward_ad.dual_level():
            x = [x.to(dtype or x.dtype) for x in inputs]
            dual = [torch.autograd.forward_ad.make_dual(a, b.to(a)) for a, b in zip(x[:trained], tangents, strict=True)]
            return flat(
                [tuple(torch.autograd.forward_ad.unpack_dual(y)) for y in differentiable(function(*dual, *x[trained:]))]
            )

    def differentiable(outputs):
        found = [y for y in outputs if torch.autograd.forward_ad.unpack_dual(y).tangent is not None]
        assert found, "every tangent was lost"
        return found

    check(outputs_and_tangents(), composite(lambda: outputs_and_tangents(torch.float64)))


def test_functorch(call):
    """grad, vmap and jacrev, in the first input."""
    function, inputs, _ = call
    first, *rest = inputs
    three = torch.stack([first, first * 0.5, -first])

    def scalar(x, *others):
        return sum(y.square().sum() for y in function(x, *others))

    def results(dtype=None):
        x, others = three.to(dtype or three.dtype), [o.to(dtype or o.dtype) for o in rest]
        return [
            torch.func.grad(scalar)(x[0], *others),
            torch.func.vmap(torch.func.grad(scalar), (0, *[None] * len(others)))(x, *others),
            torch.func.vmap(lambda a: scalar(a, *others))(x),
            torch.func.jacrev(lambda a: torch.stack([y.sum() for y in function(a, *others)]))(x[0]),
        ]

    expected = composite(lambda: results(torch.float64))
    got = results()
    check(got, expected)
    plain = leaves(inputs, 1)
    check(torch.autograd.grad(scalar(*plain), plain[0]), [got[0]])


def test_batches_of_upstream_gradients(call):
    function, inputs, trained = call

    def gradients(dtype=None):
        x = leaves(inputs, trained, dtype)
        output = next(y for y in function(*x) if y.requires_grad)
        upstream = torch.stack([n * factor for n in noise_like([output]) for factor in (1.0, -2.0)])
        return torch.autograd.grad(output, x[:trained], upstream, is_grads_batched=True, allow_unused=True)

    check(gradients(), composite(lambda: gradients(torch.float64)))


def test_upstream_gradients_with_the_negative_bit(call):
    function, inputs, trained = call

    def gradients(dtype=None):
        x = leaves(inputs, trained, dtype)
        outputs = [y for y in function(*x) if y.requires_grad]
        upstream = [torch._neg_view(n) for n in noise_like(outputs)]
        return torch.autograd.grad(outputs, x[:trained], upstream, allow_unused=True)

    check(gradients(), composite(lambda: gradients(torch.float64)))


def test_features_made_in_inference_mode(call):
    """What is not differentiated may come from a teacher that ran in inference mode."""
    function, inputs, trained = call
    features = [i for i, x in enumerate(inputs) if i > 0 and list(x.shape) in map(list, SHAPES)]
    x = leaves(inputs, trained)
    differentiated = [i for i in range(trained) if i not in features]

    def gradients():
        outputs = [y for y in function(*x) if y.requires_grad]
        wanted = [x[i] for i in differentiated]
        return torch.autograd.grad([(y * y).sum() for y in outputs], wanted, allow_unused=True)

    expected = gradients()
    with torch.inference_mode():
        for i in features:
            x[i] = x[i].detach().clone()
    if not features:  # of one map: what weighs it is differentiated
        with torch.inference_mode():
            x[0] = x[0].detach().clone()
        differentiated, expected = differentiated[1:], expected[1:]
    check(gradients(), expected)
    assert any(a.is_inference() for a in x)


def test_meta_tensors(call):
    function, inputs, trained = call
    x = [a.to("meta").requires_grad_(i < trained) for i, a in enumerate(inputs)]
    outputs = function(*x)
    assert [y.shape for y in outputs] == [y.shape for y in function(*inputs)]
    wanted = [y.sum() for y in outputs if y.requires_grad]
    for gradient, a in zip(torch.autograd.grad(wanted, x[:trained], allow_unused=True), x, strict=False):
        assert gradient is None or (gradient.is_meta and gradient.shape == a.shape)


def test_the_backward_uses_the_backend_of_its_forward(call, backend, monkeypatch):
    """Outside the block, inside another, and on another thread, which knows neither."""
    function, inputs, trained = call
    resolve, used, errors = backends.resolve, [], []
    monkeypatch.setattr(loss_op, "_plans", Recollection())  # a call that is recalled resolves nothing
    monkeypatch.setattr(backends, "resolve", lambda *x, **named: used.append(resolve(*x, **named)) or used[-1])
    other = "native" if backend == "reference" else "reference"

    def backward():
        try:
            with use_backend(other):
                for factor in (1.0, 3.0):  # what was prepared for another upstream gradient is computed anew
                    torch.autograd.grad(total * factor, x[:trained], retain_graph=True, allow_unused=True)
        except Exception as error:
            errors.append(error)

    x = leaves(inputs, trained)
    total = sum(y.square().sum() for y in function(*x) if y.requires_grad)
    backward()
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors
    assert used
    assert set(used) == {backend}


def in_other_strides(x):
    """The same values, the first axis the last in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def trained():
    return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in SHAPES]


def three_tokens():
    return [torch.randn(3, shape[1], device=DEVICE) for shape in SHAPES]


def everything_trained():
    s, t, tokens = trained(), trained(), [e.requires_grad_() for e in three_tokens()]
    return lambda: mk.maskd_loss(s, t, tokens, customize=True), [*s, *t, *tokens]


def student_trained():
    s, t, tokens = trained(), [x.detach() for x in trained()], three_tokens()
    return lambda: mk.maskd_loss(s, t, tokens), s


def pixels_scaled():
    x = trained()
    scale = [torch.randn(level.shape[0], *level.shape[2:], device=DEVICE).requires_grad_() for level in x]
    return lambda: sum(y.square().sum() for y in mk.scale_pixels(x, scale)), [*x, *scale]


def channels_scaled():
    x, y = trained(), trained()
    scale = [torch.randn(level.shape[:2], device=DEVICE).requires_grad_() for level in x]
    return lambda: mk.squared_error(x, y, channel_scale=scale).sum(), [*x, *y, *scale]


@pytest.mark.parametrize("make", [everything_trained, student_trained, pixels_scaled, channels_scaled])
def test_saved_tensors_may_come_back_in_other_strides(backend, make):
    """As hooks please: kernels that took them for dense would be silently wrong."""
    run, inputs = make()
    with use_backend("reference"):
        expected = torch.autograd.grad(run(), inputs)
    with use_backend(backend):
        with torch.autograd.graph.saved_tensors_hooks(in_other_strides, lambda x: x):
            result = run()
        gradients = torch.autograd.grad(result * 1.0, inputs)
    for i, (x, y) in enumerate(zip(gradients, expected, strict=True)):
        assert_close(x, y, 1e-5, f"gradient {i}")
