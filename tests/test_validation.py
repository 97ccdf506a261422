"""Bad input: an error that names the argument, what was expected and what came."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import DEVICE

import maskd_kernels
from maskd_kernels import AMDLoss, MasKDLoss, MasKDSegLoss, MaskModule, MGDLoss

NO_NUMBERS = [("1", TypeError), (None, TypeError), (True, TypeError), (torch.ones(()), TypeError)]
NOT_FINITE = [(math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError)]
NO_COUNTS = [
    (0, ValueError),
    (-3, ValueError),
    (8.0, TypeError),
    ("8", TypeError),
    (True, TypeError),
    (None, TypeError),
]


def maps(channels=5, grad=False):
    return torch.randn(2, channels, 4, 6, device=DEVICE, requires_grad=grad)


def tokens(channels=5):
    return torch.randn(3, channels, device=DEVICE)


def loss(**settings):
    return maskd_kernels.maskd_loss(maps(grad=True), maps(), tokens(), **settings)


def mse(**settings):
    return maskd_kernels.masked_mse(maps(), maps(), torch.ones(2, 1, 4, 6, device=DEVICE), **settings)


@pytest.mark.parametrize("call", [loss, mse])
@pytest.mark.parametrize(("eps", "error"), [*NO_NUMBERS, *NOT_FINITE, (-1e-5, ValueError)])
def test_eps(call, eps, error):
    call(eps=1e-5)  # what the second call recalls
    with pytest.raises(error, match=r"^eps: expected a number from 0 on, got "):
        call(eps=eps)


@pytest.mark.parametrize("eps", [0, 1, np.float32(0.5), np.int64(2), Fraction(1, 3), 10**30])
def test_eps_may_be_any_number(backend, eps):
    assert loss(eps=eps).isfinite()


@pytest.mark.parametrize("call", [loss, mse])
@pytest.mark.parametrize("channel_dim", [0, 2, 1.0, True, None, [1], torch.tensor(1)])
def test_channel_dim(call, channel_dim):
    call(channel_dim=1)  # what the second call recalls
    with pytest.raises(ValueError, match=r"^channel_dim: expected 1 .* or -1 .*, got "):
        call(channel_dim=channel_dim)


@pytest.mark.parametrize("weighting", [None, tuple(MaskModule(5, 3).weighting), 1])
def test_weighting_of_mask_weights(weighting):
    with pytest.raises(TypeError, match=r"^weighting: expected MaskWeighting, got "):
        maskd_kernels.mask_weights(maps(), weighting)


def test_masked_features_are_of_one_map():
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got a list of Tensor"):
        maskd_kernels.masked_features([maps()], tokens())


@pytest.mark.parametrize(
    ("customize", "error"),
    [
        (1, TypeError),
        ("yes", TypeError),
        (None, TypeError),
        (torch.tensor(1.0), TypeError),
        (torch.tensor(1), TypeError),
        (torch.tensor([True, False]), ValueError),
        (torch.tensor([True]), ValueError),
        (torch.ones((), dtype=torch.bool, device="meta"), ValueError),
    ],
)
def test_customize(customize, error):
    if isinstance(customize, torch.Tensor) and not customize.is_meta:
        customize = customize.to(DEVICE)
    loss(customize=True)
    with pytest.raises(error, match=r"^customize: expected .*, got "):
        loss(customize=customize)


@pytest.mark.parametrize("make", [lambda w: MasKDLoss(8, loss_weight=w), lambda w: MasKDSegLoss(8, loss_weight=w)])
@pytest.mark.parametrize(("weight", "error"), [*NO_NUMBERS, *NOT_FINITE])
def test_loss_weight(make, weight, error):
    with pytest.raises(error, match=r"^loss_weight: expected a finite number, got "):
        make(weight)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("alpha_mgd", lambda x: MGDLoss(8, 8, alpha_mgd=x)),
        ("lambda_mgd", lambda x: MGDLoss(8, 8, lambda_mgd=x)),
        ("alpha_amd", lambda x: AMDLoss(32, 32, alpha_amd=x)),
        ("temperature", lambda x: AMDLoss(32, 32, temperature=x)),
        ("threshold", lambda x: AMDLoss(32, 32, threshold=x)),
    ],
)
@pytest.mark.parametrize(("value", "error"), [*NO_NUMBERS, *NOT_FINITE])
def test_numbers_of_generative_losses(name, make, value, error):
    with pytest.raises(error, match=rf"^{name}: expected a (finite number|number above 0|share in .*), got "):
        make(value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("channels", MaskModule),
        ("channels", MasKDLoss),
        ("channels", MasKDSegLoss),
        (r"channels\[1\]", lambda c: MasKDLoss([8, c])),
        ("num_tokens", lambda k: MasKDLoss(8, num_tokens=k)),
        ("student_channels", lambda c: MGDLoss(c, 8)),
        (r"teacher_channels\[0\]", lambda c: AMDLoss([32, 32], [c, 32])),
    ],
)
@pytest.mark.parametrize(("value", "error"), NO_COUNTS)
def test_whole_numbers(name, make, value, error):
    with pytest.raises(error, match=rf"^{name}: expected a positive whole number, got "):
        make(value)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (7330.5, TypeError), ("7330", TypeError)])
def test_warmup(value, error):
    with pytest.raises(error, match=r"^custom_mask_warmup: expected a whole number.*, got "):
        MasKDLoss(8, custom_mask_warmup=value)


def test_whole_numbers_of_numpy_are_taken():
    assert MasKDLoss(np.int64(8), num_tokens=np.int32(3)).mask_modules[0].mask_token.shape == (3, 8)
    assert MGDLoss((np.int64(8), 8), (16, 8)).student_channels == [8, 8]


def sparse(x):
    return x.to_sparse()


def jagged(x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def nested(x):
    return torch.nested.nested_tensor(list(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", [sparse, jagged, nested])
def test_tensors_that_are_not_dense(kind):
    x, e, odd = maps(), tokens(), kind(maps())
    calls = {
        "student": lambda: maskd_kernels.maskd_loss(odd, x, e),
        "teacher": lambda: maskd_kernels.maskd_loss(x, odd, e),
        "tokens": lambda: maskd_kernels.maskd_loss(x, x, kind(e)),
        "x": lambda: maskd_kernels.attention_stats([x, odd]),
        "pred": lambda: maskd_kernels.squared_error(odd, x),
        "target": lambda: maskd_kernels.squared_error(x, odd),
        "masks": lambda: maskd_kernels.dice_diversity(odd),
        "scale": lambda: maskd_kernels.scale_pixels(x, kind(x[:, 0])),
        "preds_S": lambda: MGDLoss(5, 5).to(DEVICE)(odd, x),
        "preds_T": lambda: AMDLoss(5, 5, reduction=5).to(DEVICE)(x, odd),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected dense tensors, got "):
            call()


@pytest.mark.skipif(DEVICE != "cpu", reason="quantised tensors are the CPU's")
@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors():
    x, e = maps(), tokens()

    def quantised(y):
        return torch.quantize_per_tensor(y, 0.1, 0, torch.qint8)

    for name, call in {
        "teacher": lambda: maskd_kernels.maskd_loss(x, quantised(x), e),
        "tokens": lambda: maskd_kernels.maskd_loss(x, x, quantised(e)),
        "scale": lambda: maskd_kernels.scale_pixels(x, quantised(x[:, 0])),
        "weights": lambda: maskd_kernels.masked_mse(x, x, x[:, :1] > 0, weights=quantised(x[:, 0, 0, :1])),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected .*, got torch.qint8"):
            call()


@pytest.mark.parametrize("value", [torch.zeros(5, dtype=torch.int64), None, 3.0])
def test_weighting_that_holds_no_floating_tensors(value):
    weighting = MaskModule(5, 3).to(DEVICE).weighting._replace(conv_bias=value)
    with pytest.raises(
        TypeError, match=r"^weighting(.conv_bias)?: expected (a floating dtype|tensors in every field), got "
    ):
        loss(weighting=weighting)


@pytest.mark.parametrize("weights", [torch.ones(2, 2), torch.ones(2), torch.ones(2, 1, device="meta")])
def test_weights_of_masks(weights):
    with pytest.raises(ValueError, match=r"^weights: expected .*, got "):
        mse(weights=weights)
