"""``maskd-kernels verify``: every backend, on this machine, against plain PyTorch in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from maskd_kernels import backends, functional, native, reference, use_backend
from maskd_kernels.mask_weighting import MaskWeighting
from maskd_kernels.ops.masked_conv import masked_conv

# Largest error allowed, relative to the largest value of a result of this dtype: the caps of the package's tests.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Each dtype once, and each layout.
KINDS = (
    (torch.float32, torch.contiguous_format),
    (torch.float32, torch.channels_last),
    (torch.float16, torch.contiguous_format),
    (torch.bfloat16, torch.channels_last),
    (torch.float64, torch.contiguous_format),
)
BATCH, TOKENS = 2, 6
PYRAMID = ((19, 7, 9), (40, 33, 17), (5, 1, 1))  # channels, height, width: on no boundary of vectors or tiles
LARGE = ((256, 48, 48),)  # shared among threads, and written past the caches
LOSS_WEIGHT = 100  # in float16 the gradients of large maps would else be subnormal numbers, of a few bits
Shapes = Sequence[tuple[int, int, int]]
Call = Callable[..., list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and what it is called with."""

    name: str
    call: Call
    draw: Callable[[], list[Tensor]]  # its arguments, on the CPU in float64
    maps: int  # the first so many are feature maps, in the dtype and layout that are tried
    trained: int | None = None  # the first so many have gradients; None: all
    exact: Call | None = None  # another formula than the call's own
    dtypes: tuple[torch.dtype, ...] = tuple(ALLOWED)


@dataclasses.dataclass
class Outcome:
    """How a backend fared."""

    name: str
    compared: int = 0
    worst: float = 0.0  # share of what is allowed
    skipped: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


# ---- What is compared --------------------------------------------------------------------------


def _maps(count: int, shapes: Shapes) -> list[Tensor]:
    return [torch.randn(BATCH, *shape, dtype=torch.float64) for _ in range(count) for shape in shapes]


def _tokens(shapes: Shapes) -> list[Tensor]:
    return [torch.randn(TOKENS, c, dtype=torch.float64) / 2 for c, _, _ in shapes]


def _weighting(shapes: Shapes) -> list[Tensor]:
    sizes = [size for c, _, _ in shapes for size in ([c, c, 3, 3], [c], [TOKENS, c, 1, 1], [TOKENS])]
    return [torch.randn(size, dtype=torch.float64) / 10 for size in sizes]


def _split(x: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    return [list(x[i : i + size]) for i in range(0, len(x), size)]


def _maskd(*inputs: Tensor, levels: int, weighted: bool, customize: bool, published: bool = False) -> list[Tensor]:
    student, teacher, tokens = _split(inputs[: 3 * levels], levels)
    weighting = [MaskWeighting(*w) for w in _split(inputs[3 * levels :], 4)] if weighted else None
    if published:
        of_level: Sequence[MaskWeighting | None] = weighting or [None] * levels
        each = zip(student, teacher, tokens, of_level, strict=True)
        loss = torch.stack([reference.published_maskd_loss(*level, customize, 1e-5) for level in each]).sum()
    else:
        loss = functional.maskd_loss(student, teacher, tokens, weighting=weighting, customize=customize, eps=1e-5)
    return [LOSS_WEIGHT * loss]


def _maskd_case(name: str, shapes: Shapes, *, weighted: bool, customize: bool = False, frozen: bool = False) -> Case:
    call = partial(_maskd, levels=len(shapes), weighted=weighted, customize=customize)
    return Case(
        name,
        call,
        lambda: [*_maps(2, shapes), *_tokens(shapes), *(_weighting(shapes) if weighted else [])],
        maps=2 * len(shapes),
        trained=len(shapes) if frozen else None,
        exact=partial(call, published=True),
    )


def _masked_features(x: Tensor, tokens: Tensor, *weighting: Tensor) -> list[Tensor]:
    return list(functional.masked_features(x, tokens, weighting=MaskWeighting(*weighting)))


def _masked_conv(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    keep = torch.arange(x.shape[2] * x.shape[3], device=x.device).reshape(x.shape[2:]) % 3 == 0
    return [masked_conv(x, keep.expand(len(x), -1, -1).contiguous(), weight, bias)]


def cases() -> list[Case]:
    """Every operator: outputs, and gradients of random upstream gradients."""
    one = PYRAMID[1:2]
    ((c, h, w),) = one

    def drawn(maps: int, *sizes: Sequence[int]) -> Callable[[], list[Tensor]]:
        return lambda: [*_maps(maps, one), *(torch.randn(*size, dtype=torch.float64) for size in sizes)]

    return [
        _maskd_case("maskd_loss, frozen tokens", PYRAMID, weighted=True, frozen=True),
        _maskd_case("maskd_loss, frozen tokens, unweighted", PYRAMID, weighted=False, frozen=True),
        _maskd_case("maskd_loss, frozen tokens, customised", PYRAMID, weighted=True, customize=True, frozen=True),
        _maskd_case("maskd_loss, frozen tokens, large", LARGE, weighted=False, frozen=True),
        _maskd_case("maskd_loss, all trained", PYRAMID, weighted=True),
        _maskd_case("maskd_loss, all trained, customised", PYRAMID, weighted=True, customize=True),
        Case("masked_features", _masked_features, lambda: [*_maps(1, one), *_tokens(one), *_weighting(one)], 1),
        Case("masked_mse", lambda s, t, m: [functional.masked_mse(s, t, m.square())], drawn(2, [BATCH, 3, h, w]), 2),
        Case("scale_pixels", lambda x, s: [functional.scale_pixels(x, s)], drawn(1, [BATCH, h, w]), 1),
        Case("scale_channels", lambda x, s: [functional.scale_channels(x, s)], drawn(1, [BATCH, c]), 1),
        Case(
            "squared_error",
            lambda p, t, s: [functional.squared_error(p, t, channel_scale=s)],
            drawn(2, [BATCH, c]),
            2,
        ),
        Case("attention_stats", lambda x: list(functional.attention_stats(x)), drawn(1), 1),
        Case("masked_conv", _masked_conv, drawn(1, [8, c, 3, 3], [8]), 1, dtypes=(torch.float32,)),
    ]


# ---- Comparing ---------------------------------------------------------------------------------


def _run(call: Call, inputs: Sequence[Tensor], upstream_seed: int, like: Sequence[Tensor] = ()) -> list[Tensor]:
    """Outputs and gradients; upstream gradients are rounded to the dtypes of what they are ``like``."""
    outputs = call(*inputs)
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    upstream = [g.to(y.dtype).to(x) for g, x, y in zip(upstream, outputs, like or outputs, strict=True)]
    leaves = [x for x in inputs if x.requires_grad]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def _inputs(case: Case, seed: int, dtype: torch.dtype, layout: torch.memory_format, device: str) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = case.draw()
    small = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [x.to(device, dtype).contiguous(memory_format=layout) for x in drawn[: case.maps]]
    inputs = [*maps, *(x.to(device, small) for x in drawn[case.maps :])]
    trained = len(inputs) if case.trained is None else case.trained
    return [x.requires_grad_(i < trained) for i, x in enumerate(inputs)]


def _compare(case: Case, seed: int, backend: str, kind: tuple[torch.dtype, torch.memory_format], device: str) -> float:
    """The largest share of what is allowed.

    Raises:
        ValueError: it is above 1, or a second run gave other bits.
    """
    inputs = _inputs(case, seed, *kind, device)
    exact_inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    with use_backend(backend):
        results = _run(case.call, inputs, seed)
        again = _run(case.call, inputs, seed) if backend != "reference" else results
    with use_backend("reference"):
        exact = _run(case.exact or case.call, exact_inputs, seed, like=results[: len(case.call(*inputs))])
    worst = 0.0
    for number, (got, same, expected) in enumerate(zip(results, again, exact, strict=True)):
        largest = max(expected.abs().max().item(), 1e-30)
        share = (got.double() - expected).abs().max().item() / largest / ALLOWED[got.dtype]
        what = f"result {number}, {str(got.dtype)[6:]} {list(got.shape)}"
        if not share <= 1:
            raise ValueError(f"{what}: off by {share * ALLOWED[got.dtype]:.1e}, allowed {ALLOWED[got.dtype]:.1e}")
        if not torch.equal(got, same):
            raise ValueError(f"{what}: a second run gave other bits")
        worst = max(worst, share)
    return worst


def check(name: str, backend: str, device: str) -> Outcome:
    """One backend over all cases. Whatever a case raises is a problem of the backend, and not the end."""
    outcome = Outcome(name)
    for seed, case in enumerate(cases()):
        for kind in KINDS:
            if kind[0] not in case.dtypes or backends.why_unavailable(backend, device, kind[0]) is not None:
                continue  # a library's convolution is no kernel of ours; Triton takes no float64
            try:
                outcome.worst = max(outcome.worst, _compare(case, seed, backend, kind, device))
            except Exception as error:
                layout = ", channels-last" if kind[1] == torch.channels_last else ""
                message = (str(error).splitlines() or [""])[0]
                outcome.problems.append(f"{case.name}, {str(kind[0])[6:]}{layout}: {type(error).__name__}: {message}")
            outcome.compared += 1
    return outcome


def outcomes(wanted: Sequence[str]) -> Iterator[Outcome]:
    """Each backend in turn, the native one with every instruction set of this processor."""
    gpu = torch.cuda.is_available()
    if "reference" in wanted:
        yield check("reference", "reference", "cpu")
        if gpu:
            yield check("reference, CUDA", "reference", "cuda")
    if "native" in wanted:
        reason = native.why_unavailable()
        if reason is not None:
            yield Outcome("native", skipped=reason)
        else:
            module = native.module()
            chosen = module.isa()
            try:
                for isa in module.isas():
                    module.select_isa(isa)
                    yield check(f"native, {isa}", "native", "cpu")
            finally:
                module.select_isa(chosen)
    if "triton" in wanted:
        device = "cuda" if gpu else "cpu"
        reason = backends.why_no_triton(device)
        interpreted = ", interpreted" if backends.interpreting() else ""
        yield Outcome("triton", skipped=reason) if reason else check(f"triton{interpreted}", "triton", device)


def verify(wanted: Sequence[str] = (), show: Callable[[str], None] = print) -> bool:
    """Compares and reports.

    Args:
        wanted: backends that must run here; none: whatever does.
        show: called with each line as soon as it is known.

    Returns:
        Whether everything is as it should be.
    """
    right = True
    for outcome in outcomes(wanted or backends.BACKENDS[1:]):
        if outcome.skipped is not None:
            show(f"{outcome.name:20s} {'missing' if wanted else 'skipped'}: {outcome.skipped}")
            right &= not wanted
            continue
        failed = len(outcome.problems)
        verdict = f"{failed} of {outcome.compared} calls off" if failed else f"{outcome.compared} calls right"
        show(f"{outcome.name:20s} {verdict}, the worst other error is {outcome.worst:.0%} of what is allowed")
        for problem in outcome.problems:
            show(f"    {problem}")
        right &= not failed
    show("everything is as it should be" if right else "something is off: please report it with `maskd-kernels info`")
    return right
