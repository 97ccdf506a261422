"""The loss with frozen tokens: against the exact one, and the gradient that the native kernel prepares ahead."""

import copy

import pytest
import torch
from helpers import CAP, DEVICE, assert_close, features
from torch import nn

from maskd_kernels import MaskModule, backends, maskd_loss, native, use_backend
from maskd_kernels.alike import Recollection
from maskd_kernels.ops import maskd_loss as loss_op

SHAPES = {
    "one level": [(2, 10, 7, 9)],
    "levels": [(2, 10, 13, 17), (2, 6, 7, 9), (2, 3, 1, 1)],
    "large": [(2, 70, 50, 84)],
    # Rows that do not start on vectors either.
    "past the caches": [(2, 131, 65, 63)],
    "one row": [(1, 5, 1, 40)],
    "one column": [(3, 5, 40, 1)],
}


@pytest.fixture(params=["native", "triton"], autouse=True)
def kernels(request):
    """Both that compute it: Triton's by its interpreter where there is no GPU."""
    reason = backends.why_unavailable(request.param, DEVICE, torch.float32)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def native_only(kernels):
    if kernels != "native":
        pytest.skip("about the native kernel")


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels ran, and whether they were to prepare gradients."""
    prepared, on_cpu, on_gpu = [], loss_op._native, loss_op._triton
    monkeypatch.setattr(loss_op, "_native", lambda *a: (prepared.append(len(a[4]) > 0), on_cpu(*a))[1])
    monkeypatch.setattr(loss_op, "_triton", lambda *a: (prepared.append(False), on_gpu(*a))[1])
    loss_op._upstream_of.cache_clear()
    return prepared


def make(shapes, tokens=6, weighted=True, dtype=torch.float32, teacher_dtype=None, layout="contiguous"):
    """Student, teacher, tokens and weighting of the levels; the student alone requires gradients."""
    student = [features(s, dtype, layout) for s in shapes]
    teacher = [features(s, teacher_dtype or dtype, layout, grad=False) for s in shapes]
    modules = [MaskModule(s[1], tokens, weighted).to(DEVICE).requires_grad_(False) for s in shapes]
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter is module.mask_token else 0.1)
    weighting = [m.weighting for m in modules] if weighted else None
    return student, teacher, [m.mask_token for m in modules], weighting


def both(inputs, factor=1.0, **options):
    student, teacher, tokens, weighting = inputs
    loss = maskd_loss(student, teacher, tokens, weighting=weighting, **options)
    return loss.detach(), torch.autograd.grad(factor * loss, student)


def exactly(inputs, factor=1.0, **options):
    student, teacher, tokens, weighting = inputs
    doubled = [s.detach().double().requires_grad_() for s in student]
    if weighting is not None:
        weighting = [type(w)(*(x.double() for x in w)) for w in weighting]
    with use_backend("reference"):
        teacher, tokens = [t.double() for t in teacher], [e.double() for e in tokens]
        return both((doubled, teacher, tokens, weighting), factor, **options)


def check(inputs, **options):
    dtype = min((x.dtype for x in (*inputs[0], *inputs[1])), key=lambda d: torch.finfo(d).bits)
    tight = 1e-12 if dtype == torch.float64 else 5e-6
    # Guessed, guessed, not guessed, not prepared, guessed; without guesses one is enough.
    for factor in (1.0, 1.0, -0.3, -0.3, -0.3) if backends.current_backend() == "native" else (-0.3,):
        loss, gradients = both(inputs, factor, **options)
        expected, expected_gradients = exactly(inputs, factor, **options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(loss, expected, tight, "loss")
        for x, got, wanted in zip(inputs[0], gradients, expected_gradients, strict=True):
            assert got.dtype == x.dtype
            assert_close(got, wanted, tight if x.dtype.itemsize > 2 else CAP[x.dtype], "gradient")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("customize", [False, True])
def test_shapes(shapes, layout, weighted, customize, kernels, calls):
    if kernels == "triton" and DEVICE == "cpu" and shapes in (SHAPES["large"], SHAPES["past the caches"]):
        pytest.skip("too many tiles for the interpreter")
    check(make(shapes, weighted=weighted, layout=layout), customize=customize)
    assert calls == ([True, True, True, False, True] if kernels == "native" else [False])


@pytest.mark.parametrize("layout", ["sliced", "every_other", "expanded_batch", "expanded_pixels", "expanded_channels"])
def test_layouts(layout, calls):
    check(make([(2, 10, 7, 9)], layout=layout))
    assert calls


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_strides_that_differ(changed, calls):
    """One map lies in rows of a larger image: read where it is, like the other, but elsewhere."""
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    if changed == "student":
        student = [features((2, 10, 7, 9), layout="rows")]
    else:
        teacher = [features((2, 10, 7, 9), layout="rows", grad=False)]
    check((student, teacher, tokens, weighting))
    check((student, teacher, tokens, weighting), customize=True)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(dtype, layout, kernels, calls):
    if kernels == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in float32")
    check(make([(2, 10, 13, 17), (2, 6, 7, 9)], dtype=dtype, layout=layout))
    other = torch.float64 if dtype == torch.float64 else torch.float32
    check(make([(2, 19, 40, 33)], dtype=dtype, teacher_dtype=other, weighted=False, layout=layout), eps=1e-5)
    assert len(calls) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 131, 128, 64), (2, 131, 130, 63), (2, 5, 26, 40)],
    ids=["rows on vectors", "rows across vectors", "not past the caches, runs of uneven pieces"],
)
def test_half_types_past_the_caches(shape, layout, dtype, native_only):
    inputs = make([shape], dtype=dtype, layout=layout)
    for factor in (
        1e4,
        1e4,
        1e4,
        -2e4,
    ):  # not guessed, not prepared, guessed, not guessed; far from float16's smallest numbers
        loss, (gradient,) = both(inputs, factor)
        expected, (wanted,) = exactly(inputs, factor)
        assert_close(loss, expected, 5e-6, "loss")
        assert_close(gradient, wanted, CAP[dtype], "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_round_as_pytorch_does(dtype, native_only):
    """Whole vectors and what is left of them: infinities, NaN, values too small to be normal, ties to even."""
    values = [
        float("inf"),
        float("-inf"),
        float("nan"),
        0.0,
        1e-39,
        -3e-8,
        65504.0,
        1.5,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1e38,
    ]
    student, teacher, tokens, _ = make([(1, 1, 1, 107)], tokens=1, weighted=False, dtype=dtype)
    with torch.no_grad():
        teacher[0].zero_()  # all masks are 1 / 2, and so is the gradient's factor up to what it is divided by
        student[0].copy_(torch.tensor(values).repeat(10)[:107])
    expected = (1.004 * student[0].detach().float()).to(dtype)
    for _ in range(3):  # not guessed, not prepared, guessed
        (gradient,) = both((student, teacher, tokens, None), factor=107 * 1.004)[1]
        assert torch.equal(gradient.isnan(), expected.isnan())
        assert torch.equal(gradient.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_eps(calls):
    check(make([(2, 6, 4, 5), (2, 6, 2, 2)], weighted=False), eps=3.0)
    assert calls


def test_many_images(calls):
    check(make([(37, 8, 3, 3), (37, 16, 2, 2)]))
    assert calls


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 64])
def test_token_counts(tokens, calls):
    check(make([(2, 19, 12, 11)], tokens=tokens))
    assert calls


def test_sequences(calls):
    student, teacher, tokens, _ = make([(2, 48, 30)], weighted=False)
    loss, (gradient,) = both(([s.mT for s in student], [t.mT for t in teacher], tokens, None), channel_dim=-1)
    expected, (wanted,) = exactly((student, teacher, tokens, None))
    assert_close(loss, expected, 5e-6, "loss")
    assert_close(gradient, wanted.mT, 5e-6, "gradient")
    assert len(calls) == 1


def test_a_wrong_guess_costs_no_bit(native_only):
    """Prepared ahead, or computed when the upstream gradient had changed: the same gradient."""
    for layout in ("contiguous", "channels_last"):
        inputs = make([(2, 40, 50, 84)], layout=layout)
        first = both(inputs, 0.7)  # guessed 1
        unprepared = both(inputs, 0.7)
        prepared = both(inputs, 0.7)
        for loss, (gradient,) in (unprepared, prepared):
            assert torch.equal(loss, first[0])
            assert torch.equal(gradient, first[1][0])


def test_a_changing_weight_is_not_guessed(calls, native_only):
    inputs = make([(2, 10, 7, 9)])
    for step in range(4):
        both(inputs, 0.1 * step)
    assert calls == [True, False, False, False]


def test_without_gradients_none_is_prepared(calls, native_only):
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    with torch.no_grad():
        loss = maskd_loss(student, teacher, tokens, weighting=weighting)
    assert not loss.requires_grad
    assert torch.equal(loss, maskd_loss(student, teacher, tokens, weighting=weighting))
    assert calls == [False, True]


def test_only_some_levels_require_gradients():
    inputs = make([(2, 10, 7, 9), (2, 6, 4, 5)])
    inputs[0][0].requires_grad_(False)
    loss = maskd_loss(*inputs[:3], weighting=inputs[3])
    loss.backward()
    assert inputs[0][0].grad is None
    inputs[0][0].requires_grad_()
    assert_close(inputs[0][1].grad, exactly(inputs)[1][1], 5e-6, "gradient")


def test_backward_twice():
    """The prepared gradient is handed out once: what its receiver does to it does not come back."""
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    loss = maskd_loss(student, teacher, tokens, weighting=weighting)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(second, kept)
    with pytest.raises(RuntimeError, match=r"second time|already been freed"):
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeatable_whatever_the_threads(layout, native_only):
    inputs = make([(2, 70, 50, 84), (2, 19, 13, 17)], layout=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(both(inputs))
    finally:
        torch.set_num_threads(before)
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_every_instruction_set(native_only):
    inputs = make([(2, 19, 25, 33)])
    module, found = native.module(), native.module().isa()
    expected, (wanted,) = exactly(inputs)
    try:
        for isa in module.isas():
            module.select_isa(isa)
            loss, (gradient,) = both(inputs)
            assert_close(loss, expected, 5e-6, f"loss, {isa}")
            assert_close(gradient, wanted, 5e-6, f"gradient, {isa}")
    finally:
        module.select_isa(found)


def test_edge_values():
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    vanished = [torch.full_like(tokens[0], -1e4)]
    loss, (gradient,) = both((student, [t.abs() for t in teacher], vanished, weighting))
    assert 0 <= loss < 1e-35
    assert gradient.abs().max() < 1e-35
    teacher[0][1, 3, 2, 2] = float("nan")
    loss, (gradient,) = both((student, teacher, tokens, weighting))
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert not gradient[0].isnan().any()
    extreme = [w._replace(projection_bias=torch.tensor([300.0, -300, 0, 299, 1, 2])) for w in weighting]
    loss, _ = both((*make([(2, 10, 7, 9)])[:2], tokens, extreme))
    assert loss.isfinite()
    for shape in ((0, 10, 7, 9), (2, 10, 0, 9)):
        loss, (gradient,) = both(make([shape]))
        assert loss == 0
        assert gradient.shape == shape


@pytest.mark.parametrize("trained", ["teacher", "tokens", "weighting"])
def test_whatever_else_is_trained_gets_its_gradient(trained, calls):
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    leaf = {"teacher": teacher[0], "tokens": tokens[0], "weighting": weighting[0].conv_weight}[trained]
    leaf.requires_grad_()
    maskd_loss(student, teacher, tokens, weighting=weighting).backward()
    assert leaf.grad.any()
    assert calls == []


def test_compiled_and_transformed_code_takes_the_operator(calls):
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    expected, (wanted,) = both((student, teacher, tokens, weighting))

    def loss_of(s):
        return maskd_loss(s, teacher[0], tokens[0], weighting=weighting[0])

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(student[0])
    assert_close(compiled.detach(), expected, 2e-6, "loss")
    assert_close(torch.autograd.grad(compiled, student)[0], wanted, 2e-6, "gradient")
    assert len(calls) == 1


def test_parameters_of_any_dtype():
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    halves = [type(w)(*(x.half() for x in w)) for w in weighting]
    rounded = [type(w)(*(x.float() for x in w)) for w in halves]
    half_tokens = [e.half() for e in tokens]
    got = both((student, teacher, half_tokens, halves))
    wanted = both((student, teacher, [e.float() for e in half_tokens], rounded))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1][0], wanted[1][0])


def test_parameters_of_any_layout():
    inputs = make([(2, 10, 7, 9)])
    student, teacher, tokens, weighting = inputs
    turned = [type(w)(*(x.movedim(0, -1).contiguous().movedim(-1, 0) for x in w)) for w in weighting]
    assert not turned[0].conv_weight.is_contiguous()
    got = both((student, teacher, [e.mT.contiguous().mT for e in tokens], turned))
    wanted = both(inputs)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1][0], wanted[1][0])


def test_module_keeps_its_guess_through_training(calls, native_only):
    from maskd_kernels import MasKDLoss

    loss_fn = MasKDLoss(10, loss_weight=7.0, custom_mask_warmup=2)
    student, teacher = features((2, 10, 7, 9)), features((2, 10, 7, 9), grad=False)
    for _ in range(5):
        loss_fn(student, teacher).backward()
    assert calls == [True, False, True, True, True]
    copied = copy.deepcopy(loss_fn)
    assert torch.equal(copied(student, teacher), loss_fn(student, teacher))


@pytest.fixture
def plans(monkeypatch):
    """The plans that calls leave to later ones, none at first."""
    kept, found = [], Recollection()
    put = found.put
    monkeypatch.setattr(found, "put", lambda *arguments: (kept.append(arguments[-1]), put(*arguments)))
    monkeypatch.setattr(loss_op, "_plans", found)
    return kept


def test_a_plan_is_made_once_per_kind_of_call(plans):
    inputs = make([(2, 10, 7, 9), (2, 6, 4, 5)])
    for _ in range(3):
        both(inputs)
    assert len(plans) == 1
    inputs[0][0] = inputs[0][0].detach().clone().requires_grad_()  # other memory
    both(inputs)
    assert len(plans) == 1
    check(make([(2, 10, 7, 9), (2, 6, 4, 5)], layout="channels_last"))
    check(make([(2, 10, 7, 9), (2, 6, 4, 5)], dtype=torch.bfloat16))
    check(make([(2, 10, 7, 9), (2, 6, 4, 5)], weighted=False))
    with torch.no_grad():
        maskd_loss(*inputs[:3], weighting=inputs[3])
    assert len(plans) == 5


def test_what_the_kernels_would_copy_is_not_recalled(plans, native_only):
    inputs = make([(2, 10, 7, 9)], layout="sliced")
    for _ in range(2):
        check(inputs)
    assert not plans
    student, teacher, tokens, _ = make([(2, 10, 7, 9)], weighted=False)
    teacher = [t.to(memory_format=torch.channels_last) for t in teacher]
    for _ in range(2):
        check((student, teacher, tokens, None))
    assert not plans


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"student": torch.zeros(2, 6, 6, 5)}, "student: expected"),
        ({"student": torch.zeros(2, 6, 6, 6, dtype=torch.int64)}, "student: expected float32"),
        ({"teacher": torch.zeros(3, 6, 6, 6)}, "student: expected"),
        ({"tokens": torch.zeros(6, 5)}, "tokens: expected"),
        ({"tokens": nn.Parameter(torch.zeros(6, 6, device="meta"), requires_grad=False)}, "tokens: expected device"),
        ({"weighting": torch.zeros(6)}, "weighting: expected MaskWeighting"),
        ({"channel_dim": 2}, "channel_dim: expected"),
    ],
    ids=["shape", "dtype", "batch", "tokens", "device", "weighting", "channel_dim"],
)
def test_a_plan_hides_no_error(change, error):
    (student,), (teacher,), (tokens,), (weighting,) = make([(2, 6, 6, 6)])
    call = {"student": student, "teacher": teacher, "tokens": tokens, "weighting": weighting, "channel_dim": 1}
    expected = maskd_loss(**call)
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()}
    with pytest.raises((ValueError, TypeError), match=error):
        maskd_loss(**{**call, **change})
    assert torch.equal(maskd_loss(**call), expected)


def test_a_plan_belongs_to_an_orientation():
    (student,), (teacher,), (tokens,), _ = make([(2, 6, 6, 6)], weighted=False)
    maskd_loss(student, teacher, tokens)
    turned = maskd_loss(student, teacher, tokens, channel_dim=-1)
    expected = maskd_loss(student.movedim(-1, 1), teacher.movedim(-1, 1), tokens)
    assert_close(turned, expected.detach(), 1e-7, "loss")


def test_a_plan_belongs_to_a_backend(calls):
    inputs = make([(2, 10, 7, 9)])
    loss, (gradient,) = both(inputs)
    with use_backend("reference"):
        expected, (wanted,) = both(inputs)
    assert len(calls) == 1
    assert_close(loss, expected, 5e-6, "loss")
    assert_close(gradient, wanted, 5e-6, "gradient")


def test_tokens_that_begin_to_be_trained_get_gradients(calls):
    student, teacher, tokens, weighting = make([(2, 10, 7, 9)])
    for _ in range(2):
        both((student, teacher, tokens, weighting))
    assert len(calls) == 2
    tokens[0].requires_grad_()
    maskd_loss(student, teacher, tokens, weighting=weighting).backward()
    assert tokens[0].grad.any()
    assert len(calls) == 2
