"""Operator ``masked_conv``: the library's convolution of the masked image; and where MGD uses it."""

import pytest
import torch
from helpers import DEVICE, assert_close
from torch.nn import functional as F

from maskd_kernels import MGDLoss, native, use_backend
from maskd_kernels.ops import masked_conv as op

BACKENDS = ["reference"] + ["native"] * (DEVICE == "cpu" and native.available())
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="the C++ kernels do not run here")


def problem(n=2, c=5, d=7, height=9, width=11, share=0.35, dtype=torch.float32, last=False):
    x = torch.randn(n, c, height, width, device=DEVICE, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(d, c, 3, 3, device=DEVICE, dtype=dtype), torch.randn(d, device=DEVICE, dtype=dtype)
    keep = torch.rand(n, height, width, device=DEVICE) < share
    return x.requires_grad_(), keep, weight.requires_grad_(), bias.requires_grad_()


def check(x, keep, weight, bias, least=2e-6):
    exact = [y.detach().double().requires_grad_() for y in (x, weight, bias)]
    expected = F.conv2d(exact[0] * keep[:, None], exact[1], exact[2], padding=1)
    out = op.masked_conv(x, keep, weight, bias)
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    got = torch.autograd.grad(out, [x, weight, bias], upstream)
    for name, a, b in zip(("out", "x", "weight", "bias"), (out, *got), (expected, *wanted), strict=True):
        assert_close(a, b, least, name)
    assert torch.equal(got[0] * ~keep[:, None], torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("last", [False, True])
def test_equals_the_library(backend, share, last):
    with use_backend(backend):
        check(*problem(share=share, last=last))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 2), (40, 33)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 300), (130, 17)])
def test_sizes(backend, size, channels):
    with use_backend(backend):
        check(*problem(1, *channels, *size), least=4e-6)


@needs_native
def test_every_instruction_set():
    module = native.module()
    best = module.isa()
    try:
        for isa in module.isas():
            module.select_isa(isa)
            check(*problem(c=19, d=33))
    finally:
        module.select_isa(best)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_opcheck(backend):
    with use_backend(backend):
        x, keep, weight, bias = problem(1, 2, 3, 3, 4, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda a, b, c: op.masked_conv(a, keep, b, c), (x, weight, bias))
        x, keep, weight, bias = problem()
        torch.library.opcheck(torch.ops.maskd_kernels.masked_conv.default, (x, keep, weight, bias))


@needs_native
def test_repeatable():
    x, keep, weight, bias = problem(2, 64, 64, 50, 84)
    threads = torch.get_num_threads()

    def results():
        out = op.masked_conv(x, keep, weight, bias)
        return [out, *torch.autograd.grad(out.square().sum(), [x, weight, bias])]

    expected = results()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    assert torch.get_num_threads() == threads


@needs_native
@pytest.mark.parametrize("shared", [False, True])
def test_mgd_uses_it_and_agrees(shared, monkeypatch):
    calls = []
    original = op.masked_conv

    def counted(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr("maskd_kernels.losses.mgd.masked_conv", counted)
    loss_fn = MGDLoss([24, 24], [128, 128], lambda_mgd=0.65, shared_generation=shared)
    student = [torch.randn(2, 24, *s, requires_grad=True) for s in ((32, 33), (5, 7))]
    teacher = [torch.randn(2, 128, *x.shape[2:]) for x in student]
    keep = [torch.rand(2, 1, *x.shape[2:]) > 0.65 for x in student]
    wanted = [*student, *loss_fn.parameters()]
    gathered = torch.autograd.grad(loss_fn(student, teacher, keep=keep), wanted)
    assert len(calls) == 2
    plain = torch.autograd.grad(loss_fn(student, teacher, keep=[k.float() for k in keep]), wanted)
    assert len(calls) == 2, "a mask that is no bool may hold other values"
    for i, (a, b) in enumerate(zip(gathered, plain, strict=True)):
        assert_close(a, b, 5e-6, f"gradient {i}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss_fn(student, teacher, keep=keep).isfinite()
    assert len(calls) == 2, "autocast wants its convolutions in bfloat16"
    compiled = torch.compile(loss_fn, fullgraph=True)
    assert_close(compiled(student, teacher, keep=keep), loss_fn(student, teacher, keep=keep), 1e-6, "compiled")
