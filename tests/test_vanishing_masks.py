"""Masks from everywhere 0 to everywhere 1: the quotient error / mass and its gradients hold for every mass."""

import pytest
import torch
from helpers import DEVICE

from maskd_kernels import maskd_loss, masked_mse, use_backend
from maskd_kernels.reference import least_mass

# What is added to the logits of each mask. float32's sigmoid has become 0 at -104, the native kernels' stays at 4e-39.
OFFSETS = (-700.0, -320.0, -104.0, -89.0, -66.0, -45.0, -30.0, -8.0, 0.0, 12.0, 40.0)
CHANNELS, SIZE = 5, (6, 7)
# Squares of masks below 1e-19 are no float32 numbers any more: what is lost of error / mass, in units of the distance.
LOST = {torch.float32: 1e-19, torch.float64: 1e-150}


def make(offset, dtype):
    """Teacher whose last channel is 1, tokens ``[2, C]`` whose last entry is the offset, and a student."""
    teacher = torch.randn(2, CHANNELS, *SIZE, dtype=torch.float64)
    teacher[:, -1] = 1
    tokens = torch.randn(2, CHANNELS, dtype=torch.float64)
    tokens[:, -1] = offset
    student = torch.randn_like(teacher)
    return [x.to(DEVICE, dtype).requires_grad_() for x in (student, teacher, tokens)]


def in_logarithms(student, teacher, tokens, customize, eps):
    """The loss without a mask or a mass, but with their logarithms."""
    s, t = student.flatten(2), teacher.flatten(2)
    log_mask = torch.nn.functional.logsigmoid(tokens @ t)  # [N, K, P]
    if customize:
        log_mask = log_mask + torch.nn.functional.logsigmoid(tokens @ s).detach()
    log_distance = (s - t).square().sum(1).log()[:, None]
    log_mass = log_mask.logsumexp(-1)
    if eps:
        log_mass = torch.logaddexp(log_mass, log_mass.new_tensor(eps).log())
    return ((2 * log_mask + log_distance).logsumexp(-1) - log_mass).exp().mean() / CHANNELS


def differentiated(loss, inputs, upstream):
    return (loss.detach(), *torch.autograd.grad(loss * upstream, inputs))


@pytest.mark.parametrize("trained", ["all", "student"])
@pytest.mark.parametrize("upstream", [1.0, 65536.0])
@pytest.mark.parametrize("customize", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_mass(eps, customize, upstream, trained, dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in float32")
    for offset in OFFSETS[:: 2 if backend == "triton" else 1]:  # which the interpreter takes its time for
        inputs = make(offset, dtype)
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        for x in inputs[1:]:
            x.requires_grad_(trained == "all")
        wanted = sum(x.requires_grad for x in inputs)
        exact_loss = in_logarithms(*exact_inputs, customize, eps)
        exact = differentiated(exact_loss, exact_inputs[:wanted], upstream)
        got = differentiated(maskd_loss(*inputs, customize=customize, eps=eps), inputs[:wanted], upstream)
        student, teacher = exact_inputs[0].detach(), exact_inputs[1].detach()
        largest = (student - teacher).square().sum(1).max() * teacher.abs().max() * 42
        # Logits are off by their rounding, masks relatively by as much.
        rounding = torch.finfo(dtype).eps
        relative = rounding * (16 + 4 * abs(offset) * (2 if customize else 1))
        # Where masks are nearly 1, one minus the mask is off by the mask's rounding.
        lost = max(LOST[dtype], rounding / 42 if offset > 0 else 0.0)
        for name, a, b in zip(("loss", "student", "teacher", "tokens"), got, exact, strict=False):
            scale = 1.0 if name == "loss" else upstream
            allowed = relative * b.abs().max() + lost * scale * largest
            error = (a.double() - b).abs().max()
            assert error <= allowed, f"logits {offset}, {name}: error {error:.2e}, allowed {allowed:.2e}"


def test_a_vanished_mask_leaves_the_others_alone(backend):
    """One mask vanishes, one does not: the gradients are those of the one that stays."""
    student, teacher, tokens = make(0.0, torch.float32)
    with torch.no_grad():
        tokens[0, -1] = -320.0
    loss = maskd_loss(student, teacher, tokens)
    gradients = torch.autograd.grad(loss * 65536, (student, teacher, tokens))
    alone = maskd_loss(student, teacher, tokens[1:])
    expected = torch.autograd.grad(alone * 65536 / 2, (student, teacher, tokens))
    assert torch.allclose(loss, alone / 2, rtol=1e-6)
    for got, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38, 1e-30, 1e-25, 1e-12, 1.0])
def test_masks_of_ones_own(value, backend):
    """A constant mask's loss is its value times the mean distance, whatever its value."""
    student, teacher, _ = make(0.0, torch.float32)
    mask = torch.full((2, 1, *SIZE), value, device=DEVICE, requires_grad=True)
    loss = masked_mse(student, teacher, mask)
    gradients = torch.autograd.grad(loss * 65536, (student, teacher, mask))
    distance = (student - teacher).detach().square().sum(1).flatten(1)  # [N, P]
    floor = float(distance.max()) * least_mass(torch.float32)
    assert abs(float(loss) - value * float(distance.mean()) / CHANNELS) <= 1e-6 * float(loss) + 1e-19 + floor
    assert all(g.isfinite().all() for g in gradients)
    exact = ((2 * distance - distance.mean(1, keepdim=True)) / (distance.shape[1] * CHANNELS * 2)).view_as(mask)
    if value >= 1e-18:
        assert torch.allclose(gradients[2], 65536 * exact, rtol=1e-5, atol=1e-3)


def test_the_oracle_of_other_tests():
    """The reference in float64, which is the oracle of other tests, against logarithms where masses are tiny."""
    inputs = make(-320.0, torch.float64)
    with use_backend("reference"):
        loss = maskd_loss(*inputs)
    exact = in_logarithms(*inputs, False, 0.0)
    assert abs(float(loss) / float(exact) - 1) < 1e-9
