"""Operators ``scale_pixels``, ``squared_error`` and ``attention_stats``: the same cases for each, on every backend."""

import pytest
import torch
from helpers import CAP, DEVICE, assert_close, features
from torch.utils._python_dispatch import TorchDispatchMode

from maskd_kernels import backends, native, reference, use_backend
from maskd_kernels.ops.attention_stats import attention_stats
from maskd_kernels.ops.scale_pixels import scale_pixels
from maskd_kernels.ops.squared_error import squared_error

LAYOUTS = ["contiguous", "channels_last", "sliced", "rows", "every_other"]
LAYOUTS += ["expanded_batch", "expanded_pixels", "expanded_channels"]
SHAPES = [(2, 10, 7, 9), (1, 4, 1, 1), (2, 19, 8, 16), (1, 3, 5, 1), (2, 37, 1, 131), (1, 2, 40, 33), (2, 70, 33)]
FLOAT64_BACKENDS = ["reference"] + ["native"] * (DEVICE == "cpu" and native.available())


def small(shape, dtype):
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def scale_inputs(shape, dtype=torch.float32, layout="contiguous", other=None):
    return [features(shape, dtype, layout)], [small((shape[0], *shape[2:]), dtype)]


def error_inputs(shape, dtype=torch.float32, layout="contiguous", other=None):
    return [features(shape, dtype, layout)], [features(shape, other or dtype, layout)], [small(shape[:2], dtype)]


def unscaled_inputs(shape, dtype=torch.float32, layout="contiguous", other=None):
    return [features(shape, dtype, layout)], [features(shape, other or dtype, layout)], []


def attention_inputs(shape, dtype=torch.float32, layout="contiguous", other=None):
    return ([features(shape, dtype, layout)],)


OPERATORS = {
    "scale_pixels": (scale_pixels, reference.scale_pixels, scale_inputs),
    "squared_error": (squared_error, reference.squared_error, error_inputs),
    "squared_error_unscaled": (squared_error, reference.squared_error, unscaled_inputs),
    "attention_stats": (attention_stats, reference.attention_stats, attention_inputs),
}


@pytest.fixture(params=list(OPERATORS))
def operator(request):
    return request.param


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [x for item in outputs for x in flat(item)]


def differentiate(outputs, inputs, upstream):
    total = 0.0
    for i, x in enumerate(outputs):
        # Numbers that every dtype has, so that all are differentiated with the same.
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).bfloat16().float().half()
        total = total + (x.sum() if upstream == "sum" else (x * noise.to(x)).sum())
    return torch.autograd.grad(total, inputs, allow_unused=True)


def check(backend, name, inputs, upstream="random"):
    """Values and gradients against float64: at most twice as far off as PyTorch in the same dtypes, and the cap."""
    function, oracle, _ = OPERATORS[name]
    leaves = [x for group in inputs for x in group if x.requires_grad]
    doubles = [[x.detach().double().requires_grad_(x.requires_grad) for x in group] for group in inputs]
    exact = flat(oracle(*doubles))
    exact_gradients = differentiate(exact, [x for group in doubles for x in group if x.requires_grad], upstream)
    eager = flat(oracle(*inputs))
    eager_gradients = differentiate(eager, leaves, upstream)
    with use_backend(backend):
        got = flat(function(*inputs))
        gradients = differentiate(got, leaves, upstream)

    def off(a, b):
        return 0.0 if not b.numel() else (a.double() - b).abs().max().item() / max(b.abs().max().item(), 1e-30)

    results = (*got, *gradients), (*eager, *eager_gradients), (*exact, *exact_gradients)
    for i, (a, plain, b) in enumerate(zip(*results, strict=True)):
        kind = f"output {i}" if i < len(got) else f"gradient {i - len(got)}"
        assert (a.dtype, a.shape) == (plain.dtype, plain.shape), kind
        # Triton's interpreter cuts bfloat16 off where hardware rounds to nearest: twice the rounding error.
        least = {torch.float64: 1e-10, torch.float32: 2e-6}.get(a.dtype, torch.finfo(a.dtype).eps)
        assert_close(a, b, min(max(2 * off(plain, b), least), CAP[a.dtype]), f"{name} {kind}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("upstream", ["random", "sum"])
def test_shapes(backend, operator, shape, upstream):
    check(backend, operator, OPERATORS[operator][2](shape), upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 20, 7, 9), (2, 24, 8, 9), (2, 24, 6, 9), (2, 24, 8, 12)]
)  # rows of whole vectors or not
def test_layouts_and_dtypes(backend, operator, shape, layout, dtype):
    check(backend, operator, OPERATORS[operator][2](shape, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(operator, layout):
    for backend in FLOAT64_BACKENDS:
        check(backend, operator, OPERATORS[operator][2]((2, 19, 7, 9), torch.float64, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_stream(operator, layout, dtype):
    """Many blocks, results that bypass the caches, odd sizes."""
    for backend in FLOAT64_BACKENDS[1:]:
        check(backend, operator, OPERATORS[operator][2]((1, 67, 173, 191), dtype, layout))


@pytest.mark.parametrize("c", [1, 2, 257, 2048, 4096])
def test_channel_counts(operator, c):
    for backend in FLOAT64_BACKENDS:
        for layout in ("contiguous", "channels_last"):
            check(backend, operator, OPERATORS[operator][2]((1, c, 3, 5), layout=layout))


def test_pyramid(backend, operator):
    shapes = [(2, 10, 13, 17), (2, 6, 7, 9), (2, 10, 4, 5), (2, 1, 2, 3), (2, 10, 1, 1)]
    levels = [OPERATORS[operator][2](shape) for shape in shapes]
    check(backend, operator, [[x for level in levels for x in level[i]] for i in range(len(levels[0]))])


def test_levels_that_differ(backend, operator):
    """In size, channels, layout and dtype, in one call."""
    levels = [
        OPERATORS[operator][2]((2, 16, 8, 12)),
        OPERATORS[operator][2]((2, 8, 7, 9)),
        OPERATORS[operator][2]((2, 24, 4, 6), layout="channels_last"),
        OPERATORS[operator][2]((2, 5, 3, 3), torch.bfloat16, "channels_last"),
        OPERATORS[operator][2]((2, 16, 2, 4), torch.bfloat16),
    ]
    check(backend, operator, [[x for level in levels for x in level[i]] for i in range(len(levels[0]))])


def test_triton_launches_on_the_device_of_its_tensors(operator, monkeypatch):
    if reason := backends.why_unavailable("triton", DEVICE, torch.float32):
        pytest.skip(reason)
    launch = pytest.importorskip("maskd_kernels.triton.launch")
    inputs, entered, guard = OPERATORS[operator][2]((2, 10, 7, 9)), [], launch.is_elsewhere
    monkeypatch.setattr(launch, "is_elsewhere", lambda x: (entered.append(x), guard(x))[1])
    with use_backend("triton"):
        outputs = flat(OPERATORS[operator][0](*inputs))
        assert [x.data_ptr() for x in entered] == [inputs[0][0].data_ptr()]
        differentiate(outputs, [x for group in inputs for x in group], "sum")
    assert [x.data_ptr() for x in entered] == [inputs[0][0].data_ptr()] * 2


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_nothing_to_do(backend, operator, shape):
    inputs = OPERATORS[operator][2](shape)
    outputs = flat(OPERATORS[operator][0](*inputs))
    assert all(x.isfinite().all() for x in outputs)
    leaves = [x for group in inputs for x in group]
    gradients = differentiate(outputs, leaves, "sum")
    assert all(g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("contiguous", "channels_last"),
        ("channels_last", "contiguous"),
        ("contiguous", "rows"),
        ("rows", "contiguous"),
    ],
)
def test_layouts_that_differ(backend, first, second):
    pred, target = [features((2, 10, 7, 9), layout=first)], [features((2, 10, 7, 9), layout=second)]
    check(backend, "squared_error", (pred, target, [small((2, 10), torch.float32)]))
    # The upstream gradient of scale_pixels comes in whatever layout the next operation has.
    x, scale = [features((2, 10, 7, 9), layout=first)], [small((2, 7, 9), torch.float32)]
    upstream = features((2, 10, 7, 9), layout=second, grad=False)
    got = torch.autograd.grad(scale_pixels(x, scale)[0], [x[0], scale[0]], upstream)
    assert_close(got[0], upstream.double() * scale[0].double().reshape(2, 1, 7, 9), 2e-6, "x")
    assert_close(got[1], (upstream.double() * x[0].double()).sum(1), 2e-6, "scale")


@pytest.mark.parametrize(("first", "second"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_dtypes_that_differ(backend, first, second):
    check(backend, "squared_error", error_inputs((2, 10, 7, 9), first, other=second))


def test_only_what_requires_gradients(backend, operator):
    count = len(OPERATORS[operator][2]((2, 10, 7, 9)))
    for wanted in range(count):
        inputs = OPERATORS[operator][2]((2, 10, 7, 9))
        for i, group in enumerate(inputs):
            for x in group:
                x.requires_grad_(i == wanted)
        if inputs[wanted]:
            check(backend, operator, inputs)


def test_backward_twice(backend, operator):
    inputs = OPERATORS[operator][2]((2, 10, 7, 9))
    leaves = [x for group in inputs for x in group]
    before = [x.detach().clone() for x in leaves]
    outputs = flat(OPERATORS[operator][0](*inputs))
    upstream = [torch.randn_like(x) for x in outputs]
    kept = [x.clone() for x in upstream]
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream)
    for a, b in ((first, second), (upstream, kept), (leaves, before)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeatable(operator, layout):
    """A hundred runs, bit for bit, also with another number of threads."""
    backend = "triton" if DEVICE == "cuda" else FLOAT64_BACKENDS[-1]
    inputs, threads = OPERATORS[operator][2]((2, 64, 50, 84), layout=layout), torch.get_num_threads()

    def results():
        outputs = flat(OPERATORS[operator][0](*inputs))
        leaves = [x for group in inputs for x in group]
        return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]

    with use_backend(backend):
        expected = results()
        try:
            for run in range(100):
                torch.set_num_threads(1 + run % 3)
                assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)), f"run {run}"
        finally:
            torch.set_num_threads(threads)


@pytest.mark.skipif(not native.available(), reason="the C++ kernels were not built")
def test_every_instruction_set(operator):
    module = native.module()
    best = module.isa()
    try:
        for isa in module.isas():
            module.select_isa(isa)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                for layout in ("contiguous", "channels_last"):
                    check("native", operator, OPERATORS[operator][2]((2, 19, 7, 19), dtype, layout))
    finally:
        module.select_isa(best)


def test_gradcheck(operator):
    inputs = OPERATORS[operator][2]((2, 3, 3, 4), torch.float64)
    leaves = [x for group in inputs for x in group]
    sizes = [len(group) for group in inputs]

    def function(*tensors):
        iterator = iter(tensors)
        return tuple(flat(OPERATORS[operator][0](*([next(iterator) for _ in range(size)] for size in sizes))))

    for backend in FLOAT64_BACKENDS:
        with use_backend(backend):
            assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(backend, operator, requires_grad):
    shapes = [((2, 10, 7, 9), "contiguous"), ((2, 6, 4, 5), "channels_last")]
    levels = [OPERATORS[operator][2](shape, layout=layout) for shape, layout in shapes]
    inputs = tuple(
        [x.detach().requires_grad_(requires_grad) for level in levels for x in level[i]] for i in range(len(levels[0]))
    )
    name = OPERATORS[operator][0].__name__
    torch.library.opcheck(getattr(torch.ops.maskd_kernels, name).default, inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, operator, dynamic):
    torch._dynamo.reset()
    function = OPERATORS[operator][0]

    def loss(inputs):
        return sum(x.square().sum() for x in flat(function(*inputs)))

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for size in ((7, 9), (6, 11)) if dynamic else ((7, 9),):
        inputs = OPERATORS[operator][2]((2, 10, *size))
        leaves = [x for group in inputs for x in group]
        outputs = [f(inputs) for f in (loss, compiled)]
        gradients = [torch.autograd.grad(x, leaves) for x in outputs]
        for a, b in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
            assert_close(b, a, 2e-6, "compiled")


def test_overflowing_half_precision(backend):
    """A sum of squares far beyond float16's largest number is exact enough: it accumulates in float32."""
    pred = [torch.full((1, 8, 16, 16), 100.0, dtype=torch.float16, device=DEVICE)]
    target = [torch.full((1, 8, 16, 16), -100.0, dtype=torch.float16, device=DEVICE)]
    assert squared_error(pred, target).item() == 8 * 256 * 40000.0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_has_no_gradient_at_zero(backend, memory_format):
    """|x| has none there: as PyTorch's sign(0) = 0."""
    x = torch.zeros(1, 3, 4, 4, device=DEVICE).contiguous(memory_format=memory_format).requires_grad_()
    attention, _ = attention_stats([x])
    assert torch.equal(torch.autograd.grad(attention[0].sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(5, 7), (300, 310)])
def test_results_may_be_changed_in_place(backend, layout, size):
    """As the next layer's ReLU(inplace=True) does."""
    if backend == "triton" and size[0] > 5 and DEVICE == "cpu":
        size = (9, 9)  # the interpreter is slow
    x, scale = features((1, 4, *size), layout=layout), small((1, *size), torch.float32)
    (y,) = scale_pixels([x], [scale])
    assert y.stride() == x.stride()
    y = y.relu_()
    expected = (x.detach() * scale.detach().reshape(1, 1, *size)).relu()
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, (expected > 0) * scale.detach().double().reshape(1, 1, *size), 1e-6, "x")


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU launching is what costs")
def test_small_maps_go_to_pytorch(operator):
    """Where calling an operator costs more than it saves; the results are the same."""
    for shape, small_one in (((2, 4, 5, 6), True), ((2, 64, 80, 80), False)):
        inputs = OPERATORS[operator][2](shape)
        outputs = flat(OPERATORS[operator][0](*inputs))
        assert ("maskd_kernels" in str(outputs[0].grad_fn)) != small_one
        with use_backend(FLOAT64_BACKENDS[-1]):
            forced = flat(OPERATORS[operator][0](*inputs))
        for i, (a, b) in enumerate(zip(outputs, forced, strict=True)):
            assert_close(a, b, 2e-6, f"output {i}")


def test_whoever_watches_sees_the_operator(operator):
    """In eager mode kernels are called directly; a dispatch mode, and whatever traces, meets the operator instead."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    inputs = OPERATORS[operator][2]((2, 64, 80, 80))
    plain = flat(OPERATORS[operator][0](*inputs))
    upstream = [torch.randn_like(x) for x in plain]
    leaves = [x for x in flat(inputs) if x.requires_grad]
    gradients = torch.autograd.grad(plain, leaves, upstream)
    with Watch():
        watched = flat(OPERATORS[operator][0](*inputs))
        watched_gradients = torch.autograd.grad(watched, leaves, upstream)
    name = operator.removesuffix("_unscaled")
    assert f"maskd_kernels.{name}.default" in seen
    assert f"maskd_kernels.{name}_backward.default" in seen
    for a, b in zip((*plain, *gradients), (*watched, *watched_gradients), strict=True):
        assert torch.equal(a, b)


def test_attention_where_there_is_no_number(backend):
    """The sign of a NaN is 0, as PyTorch has it."""
    x = torch.tensor([1.0, float("nan"), -2.0, 0.0], device=DEVICE).reshape(1, 1, 2, 2).requires_grad_()
    attention, _ = attention_stats([x])
    (gradient,) = torch.autograd.grad(attention, x, [torch.full_like(attention[0], 3.0)])
    assert gradient.flatten().tolist() == [3.0, 0.0, -3.0, 0.0]


def test_channel_scale_of_other_strides(backend):
    x, y = (torch.randn(2, 5, 3, 4, device=DEVICE) for _ in range(2))
    scale = torch.randn(5, 2, device=DEVICE).T
    assert_close(squared_error([x], [y], [scale]), squared_error([x], [y], [scale.contiguous()]), 1e-6, "error")
