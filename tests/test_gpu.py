"""What only a GPU can show. The other files run there too, with MASKD_TEST_GPU=1 (``make gpu``)."""

import pytest
import torch

from maskd_kernels import AMDLoss, MasKDLoss, MaskModule, MGDLoss, maskd_loss, receptive_masks
from maskd_kernels.ops.receptive_stats import receptive_stats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def pyramid(dtype=torch.bfloat16):
    return [torch.randn(2, 64, s, s + 4, device="cuda", dtype=dtype) for s in (40, 20, 10)]


def step(loss_fn, student, teacher):
    loss = loss_fn(student, teacher)
    return [loss, *torch.autograd.grad(loss, student)]


LOSSES = {
    "maskd": lambda: MasKDLoss([64] * 3, custom_mask_warmup=1),
    "mgd": lambda: MGDLoss([64] * 3, [64] * 3).bfloat16(),
    "mgd_channels": lambda: MGDLoss([64] * 3, [64] * 3, mask_on_channel=True).bfloat16(),
    "amd": lambda: AMDLoss([64] * 3, [64] * 3).bfloat16(),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_host_never_waits(name):
    student, teacher = [x.requires_grad_() for x in pyramid()], pyramid()
    loss_fn = LOSSES[name]().cuda()
    step(loss_fn, student, teacher)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(loss_fn, student, teacher)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches_of_a_pyramid():
    """Forward and backward over all levels: at most eight, PyTorch's own included."""
    student, teacher = [x.requires_grad_() for x in pyramid()], pyramid()
    modules = [MaskModule(64, 6).cuda().requires_grad_(False) for _ in student]

    def run():
        tokens, weighting = [m.mask_token for m in modules], [m.weighting for m in modules]
        maskd_loss(student, teacher, tokens, weighting=weighting).backward()

    run()  # compiles, and makes .grad
    for x in student:
        x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    assert 0 < len(kernels) <= 8, kernels
    assert kernels == names, "something was copied"


def test_cuda_graph():
    """Captured once and replayed on new features; the warm-up counter, a tensor, counts the replays."""
    student, teacher = [x.requires_grad_() for x in pyramid()], pyramid()
    captured, eager = (MasKDLoss([64] * 3, custom_mask_warmup=4).cuda() for _ in range(2))
    eager.load_state_dict(captured.state_dict())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(captured, student, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    captured._iter.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, student, teacher)
    for _ in range(6):
        with torch.no_grad():
            for x in (*student, *teacher):
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(eager, student, teacher), strict=True))


def test_another_stream():
    student, teacher = [x.requires_grad_() for x in pyramid()], pyramid()
    loss_fn = MasKDLoss([64] * 3, custom_mask=False).cuda()
    expected = step(loss_fn, student, teacher)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = step(loss_fn, student, teacher)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device():
    """Tensors on a device that is not the current one."""
    student, teacher = [x.requires_grad_() for x in pyramid()], pyramid()
    loss_fn = MasKDLoss([64] * 3, custom_mask=False).cuda()
    expected = step(loss_fn, student, teacher)
    student = [x.detach().to("cuda:1").requires_grad_() for x in student]
    results = step(loss_fn.to("cuda:1"), student, [x.to("cuda:1") for x in teacher])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))


def test_int64_offsets():
    """More than 2^31 elements in one map: 4.4 GB in bfloat16."""
    t = torch.randn(1, 4096, 1024, 528, device="cuda", dtype=torch.bfloat16)
    e = torch.randn(1, 4096, device="cuda") * 0.01
    stats = receptive_stats([t], [e], [t], None, False)
    expected = (e @ t[0, :, -1, -8:].float()).sigmoid()
    torch.testing.assert_close(stats.masks[0, :, -8:], expected, rtol=1e-3, atol=1e-3)


def test_float64_goes_to_the_reference():
    t = torch.randn(1, 4, 3, 3, device="cuda", dtype=torch.float64)
    assert receptive_masks(t, torch.randn(2, 4, device="cuda")).dtype == torch.float64
