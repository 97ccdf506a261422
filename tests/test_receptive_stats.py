"""Operator ``receptive_stats`` on every backend against the float64 reference."""

import pytest
import torch
from helpers import DEVICE, assert_close, check_stats, features
from torch._subclasses.fake_tensor import FakeTensorMode

from maskd_kernels import BackendUnavailableError, backends, native, use_backend
from maskd_kernels.ops.receptive_stats import receptive_stats

LAYOUTS = ["contiguous", "channels_last", "sliced", "rows", "every_other"]
LAYOUTS += ["expanded_batch", "expanded_pixels", "expanded_channels"]
SHAPES = [(2, 10, 7, 9), (1, 4, 1, 1), (2, 19, 8, 16), (1, 3, 5, 1), (2, 37, 1, 131), (1, 2, 40, 33)]
DTYPE_PAIRS = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)]
FLOAT64_BACKENDS = ["reference"] + ["native"] * (DEVICE == "cpu" and native.available())
WHY_NOT = native.why_unavailable() or "it runs on CPU tensors"
needs_native = pytest.mark.skipif("native" not in FLOAT64_BACKENDS, reason=f"native: {WHY_NOT}")


def tokens_of(k, c, scale=0.5, dtype=torch.float32):
    return (torch.randn(k, c, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()


def problem(shape, k=6, dtype=torch.float32, layout="contiguous"):
    e = tokens_of(k, shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [features(shape, dtype, layout)], [e], [features(shape, dtype, layout)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("upstream", ["random", "sum"])
def test_images(backend, shape, upstream):
    check_stats(backend, *problem(shape), upstream=upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 19, 7, 9), (2, 24, 8, 9), (2, 24, 6, 9), (2, 24, 8, 12)]
)  # rows of whole vectors or not
def test_layouts_and_dtypes(backend, shape, layout, dtype):
    check_stats(backend, *problem(shape, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(layout):
    for backend in FLOAT64_BACKENDS:
        check_stats(backend, *problem((2, 19, 7, 9), dtype=torch.float64, layout=layout))


@pytest.mark.parametrize("spatial", [(11,), (40,), (3, 4, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sequences_and_volumes(backend, spatial, layout):
    check_stats(backend, *problem((2, 12, *spatial), layout=layout))


@pytest.mark.parametrize("k", [1, 2, 5, 8, 9, 16, 17, 64])
def test_token_counts(backend, k):
    check_stats(backend, *problem((2, 10, 5, 7), k=k))


@pytest.mark.parametrize("c", [1, 2, 3, 5, 16, 33, 257])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channel_counts(backend, c, layout):
    check_stats(backend, *problem((1, c, 4, 5), layout=layout))


@pytest.mark.parametrize("c", [2048, 4096])
def test_many_channels(c):
    for backend in FLOAT64_BACKENDS:
        t, _, s = problem((1, c, 3, 5))
        check_stats(backend, t, [tokens_of(6, c, scale=0.02)], s)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_customized_masks(backend, flag, layout):
    check_stats(backend, *problem((2, 10, 7, 9), layout=layout), customize=torch.tensor(flag, device=DEVICE))


@pytest.mark.parametrize(("student", "teacher"), [("contiguous", "channels_last"), ("channels_last", "contiguous")])
@pytest.mark.parametrize("spatial", [(7, 9), (1, 1)])
def test_layouts_that_differ(backend, student, teacher, spatial):
    t, e, _ = problem((2, 10, *spatial), layout=teacher)
    check_stats(
        backend, t, e, [features((2, 10, *spatial), layout=student)], customize=torch.tensor(True, device=DEVICE)
    )


@pytest.mark.parametrize(("student", "teacher"), DTYPE_PAIRS)
def test_dtypes_that_differ(backend, student, teacher):
    t, e, _ = problem((2, 10, 7, 9), dtype=teacher)
    check_stats(backend, t, e, [features((2, 10, 7, 9), student)])


def test_pyramid(backend):
    shapes = [(2, 10, 13, 17), (2, 6, 7, 9), (2, 10, 4, 5), (2, 1, 2, 3), (2, 10, 1, 1)]
    levels = [problem(shape) for shape in shapes]
    t, e, s = ([x for level in levels for x in level[i]] for i in range(3))
    check_stats(backend, t, e, s, customize=torch.tensor(True, device=DEVICE))


def test_levels_that_differ(backend):
    """In size, channels, layout and dtype, of student and teacher, in one call."""
    shapes = [(2, 16, 8, 12), (2, 8, 7, 9), (2, 24, 4, 6), (2, 16, 2, 4), (2, 5, 3, 3)]
    layouts = ["contiguous", "contiguous", "channels_last", "contiguous", "channels_last"]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]
    t = [features(x, dtype, layout) for x, dtype, layout in zip(shapes, dtypes, layouts, strict=True)]
    s = [features(x, dtype, layout) for x, dtype, layout in zip(shapes, reversed(dtypes), layouts, strict=True)]
    check_stats(backend, t, [tokens_of(6, x[1]) for x in shapes], s, customize=torch.tensor(True, device=DEVICE))


@pytest.mark.parametrize("spatial", [(13, 3), (8, 16)])
def test_levels_that_take_launches_of_their_own(backend, spatial):
    """Their layouts differ, and channels of the first are no whole vectors: where the second begins is not aligned."""
    maps = [("contiguous", (2, 19, 2, 4)), ("channels_last", (2, 64, *spatial))]
    teacher, student = ([features(shape, torch.float32, layout) for layout, shape in maps] for _ in range(2))
    check_stats(backend, teacher, [tokens_of(6, shape[1]) for _, shape in maps], student)


def test_levels_equal_single_calls(backend):
    """Bitwise: a level's result does not depend on what else is in the call."""
    levels = [problem((2, 10, 7, 9)), problem((2, 6, 4, 5))]
    t, e, s = ([x.detach() for level in levels for x in level[i]] for i in range(3))
    together = receptive_stats(t, e, s, None, True)
    for i in range(2):
        alone = receptive_stats([t[i]], [e[i]], [s[i]], None, True)
        assert torch.equal(together.error[i], alone.error[0])
        assert torch.equal(together.gram[i], alone.gram[0])


def test_without_student(backend):
    t, e, _ = problem((2, 10, 7, 9))
    check_stats(backend, t, e, [])


NO_STUDENT = r"customize: expected None where there is no student, got a bool tensor"


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_customized_by_no_student(backend, flag, grad):
    t, e, _ = problem((2, 10, 7, 9))
    t[0].requires_grad_(grad), e[0].requires_grad_(grad)
    customize = torch.tensor(flag, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{NO_STUDENT}"):
        receptive_stats(t, e, [], customize)
    with pytest.raises(ValueError, match=f"^{NO_STUDENT}"):
        torch.ops.maskd_kernels.receptive_stats(t, e, [], customize, False)


def test_customized_by_no_student_while_traced(backend):
    t, e, _ = (x[0].detach() for x in problem((2, 10, 7, 9)))
    customize = torch.tensor(True, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{NO_STUDENT}"):
        torch.func.vmap(lambda x: receptive_stats([x], [e], [], customize))(t[None])
    with pytest.raises(ValueError, match=f"^{NO_STUDENT}"), FakeTensorMode(allow_non_fake_inputs=True):
        receptive_stats([t], [e], [], customize)
    compiled = torch.compile(lambda x: receptive_stats([x], [e], [], customize).mass, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=NO_STUDENT):
        compiled(t)


def test_distance_alone(backend):
    t, _, s = problem((2, 10, 7, 9))
    check_stats(backend, t, [], s)


@pytest.mark.parametrize("wanted", ["student", "teacher", "tokens", "student and tokens"])
def test_only_what_requires_gradients(backend, wanted):
    t, e, s = problem((2, 10, 7, 9))
    for name, levels in (("teacher", t), ("tokens", e), ("student", s)):
        levels[0].requires_grad_(name in wanted)
    check_stats(backend, t, e, s)


@pytest.mark.parametrize("value", [-40.0, 40.0])
def test_saturated_masks(backend, value):
    """Logits of +-40: masks of 1 and of 4e-18, finite everywhere."""
    t = torch.ones(1, 4, 3, 5, device=DEVICE).requires_grad_()
    e = torch.full((2, 4), value / 4, device=DEVICE).requires_grad_()
    s = features((1, 4, 3, 5))
    with use_backend(backend):
        stats = receptive_stats([t], [e], [s], None, True)
        gradients = torch.autograd.grad(sum(x.sum() for x in stats if x.requires_grad), [t, e, s])
    expected = torch.sigmoid(torch.tensor(value, dtype=torch.float64, device=DEVICE))
    torch.testing.assert_close(stats.masks.double(), expected.expand(1, 2, 15), rtol=2e-6, atol=0)
    assert all(g.isfinite().all() for g in gradients)


def test_nan_is_not_hidden(backend):
    t, e, s = (x[0].detach() for x in problem((1, 10, 7, 9)))
    t[0, 3, 2, 4] = float("nan")
    with use_backend(backend):
        stats = receptive_stats([t], [e], [s], None, True)
    assert stats.masks[0, :, 2 * 9 + 4].isnan().all()
    assert stats.mass.isnan().all()
    assert stats.error.isnan().all()
    assert stats.masks.isnan().sum() == 6


@pytest.mark.parametrize("shape", [(0, 10, 7, 9), (2, 10, 0, 9)])
def test_empty(backend, shape):
    t, e, s = problem(shape)
    with use_backend(backend):
        stats = receptive_stats(t, e, s, torch.tensor(True, device=DEVICE), True)
        gradients = torch.autograd.grad(sum(x.sum() for x in stats if x.requires_grad), [*t, *e, *s])
    assert all((x == 0).all() for x in stats)
    assert (gradients[1] == 0).all()
    assert [g.shape for g in gradients] == [x[0].shape for x in (t, e, s)]


def test_backward_twice(backend):
    """A second backward gives the same, and neither inputs nor upstream gradients are touched."""
    t, e, s = problem((2, 10, 7, 9))
    inputs = [*t, *e, *s]
    before = [x.detach().clone() for x in inputs]
    with use_backend(backend):
        stats = receptive_stats(t, e, s, None, True)
        upstream = torch.randn_like(stats.error)
        kept = upstream.clone()
        first = torch.autograd.grad(stats.error, inputs, upstream, retain_graph=True)
        second = torch.autograd.grad(stats.error, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeatable(layout):
    """A hundred runs, bit for bit, also with another number of threads."""
    backend = "triton" if DEVICE == "cuda" else FLOAT64_BACKENDS[-1]
    t, e, s = problem((2, 64, 50, 84), layout=layout)
    inputs, threads = [*t, *e, *s], torch.get_num_threads()

    def results():
        stats = receptive_stats(t, e, s, None, True)
        return [*stats, *torch.autograd.grad(stats.error.sum() + stats.gram.sum(), inputs)]

    with use_backend(backend):
        expected = results()
        try:
            for run in range(100):
                torch.set_num_threads(1 + run % 3)
                assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)), f"run {run}"
        finally:
            torch.set_num_threads(threads)


@needs_native
def test_every_instruction_set():
    module = native.module()
    assert module.isas()[-1] == "baseline"
    best = module.isa()
    try:
        for isa in module.isas():
            module.select_isa(isa)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                for layout in ("contiguous", "channels_last"):
                    check_stats(
                        "native",
                        *problem((2, 19, 7, 19), dtype=dtype, layout=layout),
                        customize=torch.tensor(True, device=DEVICE),
                    )
    finally:
        module.select_isa(best)
    with pytest.raises(ValueError, match="'sse9' is unknown"):
        module.select_isa("sse9")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_conversions_match_torch(dtype):
    """Every half value reads exactly, and gradients round to nearest even, subnormals, overflow and NaN included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    t = torch.zeros(1, 1, every.numel(), dtype=dtype)
    with use_backend("native"):
        distance = receptive_stats([t], [], [every.reshape(1, 1, -1)]).distance
        assert torch.equal(distance.flatten(), every.float().square())
        # d student = 2 * upstream * (student - teacher): with student 0.5, the upstream gradient itself, rounded.
        values = torch.randn(200_000) * torch.logspace(-12, 6, 200_000)
        values[:3] = torch.tensor([65519.99, 65520.0, 1e9])
        positive = every[every > 0].float()  # in the order of their bits, so that neighbours are next to each other
        ties = (positive[:-1] + positive[1:]) / 2
        values = torch.cat([values, ties, -ties])
        s = torch.full((1, 1, len(values)), 0.5, dtype=dtype, requires_grad=True)
        distance = receptive_stats([torch.zeros_like(s)], [], [s]).distance
        (gradient,) = torch.autograd.grad(distance, s, values[None])
    assert torch.equal(gradient.flatten(), values.to(dtype))


@needs_native
def test_large_gradients_stream():
    """Past the size from which stores bypass the caches, odd sizes and offsets included."""
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            check_stats("native", *problem((1, 67, 173, 191), dtype=dtype, layout=layout))
            t, e, s = problem((1, 67, 173, 191), dtype=dtype, layout=layout)
            t[0].requires_grad_(False), e[0].requires_grad_(False)
            check_stats("native", t, e, s)


def test_gradcheck():
    (t,), (e,), (s,) = problem((2, 3, 3, 4), k=3, dtype=torch.float64)
    for backend in FLOAT64_BACKENDS:
        # Customized masks are left to the golden vectors: by definition they hide a gradient from the student.
        for customize in (None, torch.tensor(False, device=DEVICE)):

            def function(a, b, c, customize=customize):
                stats = receptive_stats([a], [b], [c], customize, True)
                return tuple(x for x in stats if x.requires_grad)

            with use_backend(backend):
                assert torch.autograd.gradcheck(function, (t, e, s))


def test_teacher_masks_are_not_differentiable(backend):
    t, e, s = problem((1, 4, 3, 3))
    with use_backend(backend):
        stats = receptive_stats(t, e, s, torch.tensor(True, device=DEVICE), False)
        assert not stats.teacher_masks.requires_grad
        assert stats.masks.requires_grad


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(backend, requires_grad):
    levels = [problem((2, 10, 7, 9)), problem((2, 6, 4, 5), layout="channels_last")]
    t, e, s = ([x.detach().requires_grad_(requires_grad) for level in levels for x in level[i]] for i in range(3))
    operator = torch.ops.maskd_kernels.receptive_stats.default
    with use_backend(backend):
        torch.library.opcheck(operator, (t, e, s, torch.tensor(True, device=DEVICE), True))
        torch.library.opcheck(operator, (t, e, [], None, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    """One graph, forward and backward; with dynamic shapes a new size recompiles nothing."""
    torch._dynamo.reset()
    compilations = []

    def counting(graph, inputs):
        compilations.append(1)
        return graph.forward

    def function(t, e, s):
        stats = receptive_stats([t], [e], [s], None, True)
        return stats.error / stats.mass + stats.gram.sum(-1), stats.sums

    with use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
        counted = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counting)
        for size in ((7, 9), (6, 11)) if dynamic else ((7, 9),):
            (t,), (e,), (s,) = problem((2, 10, *size))
            outputs = [f(t, e, s) for f in (function, compiled)]
            gradients = [torch.autograd.grad(sum(x.square().sum() for x in out), [t, e, s]) for out in outputs]
            for a, b in zip((*outputs[0], *gradients[0]), (*outputs[1], *gradients[1]), strict=True):
                assert_close(b, a, 2e-6, "compiled")
            counted(t, e, s)
        assert len(compilations) == 1


def test_autocast_changes_nothing(backend):
    t, e, s = problem((2, 10, 7, 9))
    with use_backend(backend):
        plain = receptive_stats(t, e, s, None, True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            cast = receptive_stats(t, e, s, None, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_triton_that_is_too_old(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.3.1")
    reason = backends.why_no_triton.__wrapped__("cuda")
    assert reason == "triton 3.4 or newer is needed, got 3.3.1"


def test_forced_backend_that_cannot_run():
    t, e, s = problem((1, 4, 3, 3), dtype=torch.float64)
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match=r"'triton' .* float64"):
        receptive_stats(t, e, s)
    meta = [torch.empty(1, 4, 3, 3, device="meta")]
    stats = receptive_stats(meta, [torch.empty(2, 4, device="meta")], meta)
    assert stats.masks.shape == (1, 2, 9)
