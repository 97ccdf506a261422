"""What the tests share: making features, and comparing results with a worst case that is named."""

import os

import torch

from maskd_kernels import cli, reference, use_backend
from maskd_kernels.ops.receptive_stats import receptive_stats
from maskd_kernels.reference import ReceptiveStats

DEVICE = "cuda" if os.environ.get("MASKD_TEST_GPU") else "cpu"

# Largest error allowed, relative to the largest value: for inputs of this dtype, whatever else is measured.
CAP = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def features(shape, dtype=torch.float32, layout="contiguous", scale=1.0, grad=True):
    """Random features of a memory layout that kernels get wrong; values lie on both sides of zero."""
    n, c, *spatial = shape
    x = torch.randn(shape, dtype=torch.float64).mul(scale).to(DEVICE, dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        padded = torch.randn(n, c + 3, *(s + 2 for s in spatial)).to(DEVICE, dtype)
        padded[(slice(None), slice(1, c + 1), *(slice(1, s + 1) for s in spatial))] = x
        x = padded[(slice(None), slice(1, c + 1), *(slice(1, s + 1) for s in spatial))]
    elif layout == "rows":  # of larger images: pixels that follow each other, channels that do not
        padded = torch.randn(n, c, spatial[0] + 2, *spatial[1:]).to(DEVICE, dtype)
        padded[:, :, 1 : spatial[0] + 1] = x
        x = padded[:, :, 1 : spatial[0] + 1]
    elif layout == "every_other":
        wide = torch.zeros(n, c, *spatial[:-1], 2 * spatial[-1], dtype=dtype, device=DEVICE)
        wide[..., ::2] = x
        x = wide[..., ::2]
    elif layout == "expanded_batch":
        x = x[:1].expand(shape)
    elif layout == "expanded_pixels":
        x = x[(slice(None), slice(None), *([slice(0, 1)] * len(spatial)))].expand(shape)
    elif layout == "expanded_channels":
        x = x[:, :1].expand(shape)
    else:
        assert layout == "contiguous"
    return x.detach().requires_grad_(grad)


def assert_close(got, expected, allowed, name):
    """Elementwise bound relative to the largest value; the message has rel-L2, cosine and the worst index."""
    assert got.shape == expected.shape, f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return
    a, b = got.double(), expected.double()
    difference = (a - b).abs()
    worst = difference.max().item() / max(b.abs().max().item(), 1e-30)
    if not worst <= allowed:
        at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        relative = (a - b).norm().item() / max(b.norm().item(), 1e-30)
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        raise AssertionError(
            f"{name}: error {worst:.2e} of the largest value, allowed {allowed:.2e}; rel-L2 {relative:.2e}, "
            f"cosine {cosine:.6f}, worst at {at}: got {a[at].item():.6g}, expected {b[at].item():.6g}"
        )


def assert_no_worse(got, eager, exact, name):
    """Against float64: at most twice as far off as PyTorch in ``got``'s dtype is, or a few roundings."""
    error = (eager.double() - exact).abs().max().item() / max(exact.abs().max().item(), 1e-30)
    assert_close(got, exact, max(2 * error, 2e-6), name)


def differentiate(stats, inputs, upstream):
    """Gradients of all statistics at once for random upstream gradients, or for ``.sum()`` (stride 0)."""
    total = 0.0
    for i, (name, x) in enumerate(stats._asdict().items()):
        if name == "teacher_masks" or not x.requires_grad:
            continue
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        total = total + (x.sum() if upstream == "sum" else (x * noise.to(x)).sum())
    return torch.autograd.grad(total, inputs, allow_unused=True)


def check_stats(backend, teacher, tokens, student, customize=None, sums=True, upstream="random"):
    """Statistics and gradients against the reference in float64: at most twice PyTorch's own error, and the cap."""
    inputs = [x for x in (*teacher, *tokens, *student) if x.requires_grad]
    dtype = min((x.dtype for x in (*teacher, *student)), key=lambda d: torch.finfo(d).bits)
    oracle_inputs = {id(x): x.detach().double().requires_grad_(x.requires_grad) for x in (*teacher, *tokens, *student)}

    def oracle(levels):
        return [oracle_inputs[id(x)] for x in levels]

    exact = reference.receptive_stats(oracle(teacher), oracle(tokens), oracle(student), customize, sums)
    exact_gradients = differentiate(exact, oracle(inputs), upstream)
    eager = reference.receptive_stats(teacher, tokens, student, customize, sums)
    eager_gradients = differentiate(eager, inputs, upstream)
    with use_backend(backend):
        stats = receptive_stats(teacher, tokens, student, customize, sums)
        gradients = differentiate(stats, inputs, upstream)

    def error(a, b):
        return 0.0 if not b.numel() else (a.double() - b).abs().max().item() / max(b.abs().max().item(), 1e-30)

    assert isinstance(stats, ReceptiveStats)
    for name, got, plain, expected in zip(ReceptiveStats._fields, stats, eager, exact, strict=True):
        floor = 1e-10 if expected.dtype == got.dtype else 2e-6
        assert_close(got, expected, min(max(2 * error(plain, expected), floor), CAP[torch.float32]), name)
    for i, (got, plain, expected) in enumerate(zip(gradients, eager_gradients, exact_gradients, strict=True)):
        assert (got is None) == (expected is None), f"gradient {i}"
        if expected is None:
            continue
        assert got.dtype == inputs[i].dtype
        # Triton's interpreter cuts bfloat16 off where hardware rounds to nearest: twice the rounding error.
        floor = {torch.float64: 1e-10, torch.float32: 4e-6}.get(got.dtype, torch.finfo(got.dtype).eps)
        cap = max(CAP[got.dtype], CAP[dtype]) if got.dtype != torch.float32 else CAP[torch.float32]
        assert_close(got, expected, min(max(2 * error(plain, expected), floor), cap), f"gradient {i}")


def parameters_of_processes(train, folder, world=2):
    """What ``train(rank)`` returns, a list of parameters, flattened, from each process of a gloo group.

    They come by file: a process aborts where gloo's threads, some time after a collective returned, let go of tensors
    that Python knew and find the interpreter ended (pytorch/pytorch#179291).
    """
    torch.multiprocessing.spawn(_train_and_save, (train, folder, world), nprocs=world)
    return [torch.load(folder / f"parameters{rank}.pth", weights_only=True) for rank in range(world)]


def _train_and_save(rank, train, folder, world):
    method = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    values = torch.cat([p.detach().flatten() for p in train(rank)])
    torch.save(values, folder / f"parameters{rank}.pth")
    torch.distributed.destroy_process_group()


def call(capsys, *arguments):
    """Exit code, stdout and stderr, within this process."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """The message of a command that cannot be done: one line, exit code 1."""
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    start = f"maskd-kernels {arguments[0]}: "
    assert err.startswith(start)
    return err[len(start) :].strip()
