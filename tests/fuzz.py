"""Random calls of the public functions against the reference in float64: ``python tests/fuzz.py --seed 123``.

A case is its seed: function, shapes, dtypes, memory layouts, what requires gradients, grad mode and backend follow from
it. Run as a program it goes on from the seed for ``--cases`` cases and prints those that fail.
"""

import argparse
import functools
import operator
import os
import random
import traceback

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from helpers import CAP, features
from torch.utils._pytree import tree_map_only

import maskd_kernels as mk
from maskd_kernels import backends, native

LAYOUTS = (
    *("contiguous", "channels_last", "sliced", "rows", "every_other", "transposed", "batch_inside"),
    *("expanded_batch", "expanded_pixels", "expanded_channels"),
)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Wrapper(torch.Tensor):
    """A subclass that has no memory itself, as DTensor and others have none: it holds a tensor."""

    @staticmethod
    def __new__(cls, inner):
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **place)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


def plain(x):
    """The values alone."""
    return (x.inner if isinstance(x, Wrapper) else x).detach().resolve_neg()


class Case:
    """The random choices of one case, and its tensors by name."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.tensors = {}
        pick = self.random
        self.name = pick.choice(sorted(FUNCTIONS))
        self.backend = pick.choice(("auto", "native", "native", "reference") if native.available() else ("reference",))
        if pick.random() < 0.06 and not backends.why_no_triton("cpu"):
            self.backend = "triton"  # interpreted: small maps, and no float64
        triton = self.backend == "triton"
        self.dtypes = [d for d in DTYPES if not (triton and d == torch.float64)]
        self.mixed, self.dtype = pick.random() < 0.4, pick.choice(self.dtypes)
        self.sizes = (1, 2, 5, 8) if triton else (1, 2, 5, 8, 17, 33)
        self.channels = (1, 3, 8) if triton else (1, 2, 3, 8, 19, 40)
        self.levels = pick.choice((1, 2) if triton else (1, 1, 2, 2, 3))
        self.batch = pick.choice((0, 1, 2, 3)) if pick.random() < 0.3 else pick.choice((1, 2))
        self.tokens = pick.choice((1, 2, 6) if triton else (1, 2, 6, 9))
        self.images = self.name in ON_IMAGES or pick.random() < 0.7
        self.shapes = [self._shape() for _ in range(self.levels)]
        self.channel_dim = -1 if self.name in CHANNELS_LAST and pick.random() < 0.25 else 1
        self.grad_mode = pick.choice((torch.enable_grad, torch.enable_grad, torch.enable_grad, torch.no_grad))
        self.odd = pick.choice((None,) * 4 + ("subclass", "negative"))

    def _shape(self):
        pick = self.random
        spatial = [pick.choice(self.sizes) for _ in range(2 if self.images else pick.choice((1, 3)))]
        if pick.random() < 0.07 and self.name not in GENERATIVE:  # a convolution takes no empty map
            spatial[pick.randrange(len(spatial))] = 0
        if pick.random() < 0.1:
            spatial = [1] * len(spatial)
        return (self.batch, pick.choice(self.channels), *spatial)

    def feature(self, name, shape, scale=1.0, dtype=None):
        """A map of this shape, in a layout and a dtype of its own."""
        pick = self.random
        dtype = dtype or (pick.choice(self.dtypes) if self.mixed else self.dtype)
        layout = pick.choice(LAYOUTS) if 0 not in shape else "contiguous"
        if layout == "transposed":
            x = features((*shape[:2], *reversed(shape[2:])), dtype, scale=scale, grad=False)
            x = x.permute(0, 1, *reversed(range(2, len(shape))))
        elif layout == "batch_inside":
            x = features((shape[1], shape[0], *shape[2:]), dtype, scale=scale, grad=False).transpose(0, 1)
        else:
            x = features(shape, dtype, layout, scale, grad=False)
        x = self._made_odd(x if self.channel_dim == 1 else x.movedim(1, -1), 0.5)
        return self._keep(name, x)

    def small(self, name, *shape, low=None, scale=0.5):
        """Tokens, weights, factors."""
        dtype = self.random.choice([d for d in DTYPES if d != torch.float16 and d in self.dtypes])
        x = torch.randn(shape, generator=self.generator) * scale
        x = (x if low is None else x.abs() + low).to(dtype)
        return self._keep(name, self._made_odd(x, 0.3))

    def _made_odd(self, x, share):
        if self.odd is None or self.random.random() > share:
            return x
        if self.odd == "subclass":
            return Wrapper(x)
        # As `x.conj().imag` has it, but in every layout: what is in memory are the values negated.
        return torch._neg_view(-x if 0 in x.stride() else x.neg_())

    def parameters(self, module, dtype=None):
        """A loss's own, by the names that ``torch.func.functional_call`` takes."""
        for name, x in module.named_parameters():
            x = x.detach() if dtype else x.detach() + 0.3 * torch.randn(x.shape, generator=self.generator)
            self._keep(f"module.{name}", x.to(dtype or self.random.choice((torch.float32, self.dtypes[-1]))))
        return [f"module.{name}" for name, _ in module.named_parameters()]

    def _keep(self, name, x):
        self.tensors[name] = x.requires_grad_(self.random.random() < 0.6)
        return name

    def weighting(self, level):
        c, k = self.shapes[level][1], self.tokens
        sizes = ((c, c, 3, 3), (c,), (k, c, 1, 1), (k,))
        # A 3x3 convolution's weights as large as training leaves them: no softmax of logits in the tens.
        scales = (1 / (3 * c**0.5), 0.5, 0.5, 0.5)
        return [
            self.small(f"weighting[{level}][{j}]", *size, scale=scale)
            for j, (size, scale) in enumerate(zip(sizes, scales, strict=True))
        ]

    def maps(self, name):
        return [self.feature(f"{name}[{i}]", shape) for i, shape in enumerate(self.shapes)]


# Each draws its arguments and returns what is called with the case's tensors, by name.


def maskd_loss(case):
    teacher, student = case.maps("teacher"), case.maps("student")
    tokens = [case.small(f"tokens[{i}]", case.tokens, s[1]) for i, s in enumerate(case.shapes)]
    weighting = []
    if case.images and case.random.random() < 0.5:
        weighting = [case.weighting(i) for i in range(case.levels)]
    if case.random.random() < 0.5:  # the kernels of frozen tokens, and their recalled calls
        for name in (*teacher, *tokens, *functools.reduce(operator.iadd, weighting, [])):
            case.tensors[name].requires_grad_(False)
    options = {"customize": case.random.random() < 0.4, "eps": case.random.choice((0.0, 1e-5))}
    options["return_dice"] = case.random.random() < 0.2

    def call(x):
        w = [mk.functional.MaskWeighting(*(x[n] for n in level)) for level in weighting] or None
        s, t, e = ([x[n] for n in names] for names in (student, teacher, tokens))
        return mk.maskd_loss(s, t, e, weighting=w, channel_dim=case.channel_dim, **options)

    return call


def receptive_masks(case):
    teacher, student = case.maps("teacher"), case.maps("student") if case.random.random() < 0.4 else None
    tokens = [case.small(f"tokens[{i}]", case.tokens, s[1]) for i, s in enumerate(case.shapes)]

    def call(x):
        s = None if student is None else [x[n] for n in student]
        t, e = [x[n] for n in teacher], [x[n] for n in tokens]
        return mk.receptive_masks(t, e, student=s, channel_dim=case.channel_dim)

    return call


def masked_features(case):
    name, (_, c, *_) = case.feature("x", case.shapes[0]), case.shapes[0]
    tokens = case.small("tokens", case.tokens, c)
    weighting = case.weighting(0) if case.images and case.random.random() < 0.5 else None

    def call(x):
        w = weighting and mk.functional.MaskWeighting(*(x[n] for n in weighting))
        return mk.masked_features(x[name], x[tokens], weighting=w, channel_dim=case.channel_dim)

    return call


def mask_weights(case):
    teacher, weighting = case.feature("teacher", case.shapes[0]), case.weighting(0)
    return lambda x: mk.functional.mask_weights(x[teacher], mk.functional.MaskWeighting(*(x[n] for n in weighting)))


def masked_mse(case):
    teacher, student = case.maps("teacher"), case.maps("student")
    masks = [case.small(f"masks[{i}]", s[0], case.tokens, *s[2:], low=0.1) for i, s in enumerate(case.shapes)]

    def call(x):
        given = ([x[n] for n in names] for names in (student, teacher, masks))
        return mk.masked_mse(*given, channel_dim=case.channel_dim)

    return call


def scale_pixels(case):
    maps = case.maps("x")
    scale = [case.small(f"scale[{i}]", s[0], *s[2:]) for i, s in enumerate(case.shapes)]
    return lambda x: mk.scale_pixels([x[n] for n in maps], [x[n] for n in scale], channel_dim=case.channel_dim)


def scale_channels(case):
    maps = case.maps("x")
    scale = [case.small(f"scale[{i}]", *s[:2]) for i, s in enumerate(case.shapes)]
    return lambda x: mk.scale_channels([x[n] for n in maps], [x[n] for n in scale], channel_dim=case.channel_dim)


def squared_error(case):
    pred, target = case.maps("pred"), case.maps("target")
    scale = [case.small(f"scale[{i}]", *s[:2]) for i, s in enumerate(case.shapes)]
    scaled = case.random.random() < 0.5

    def call(x):
        factors = [x[n] for n in scale] if scaled else None
        p, t = [x[n] for n in pred], [x[n] for n in target]
        return mk.squared_error(p, t, channel_scale=factors, channel_dim=case.channel_dim)

    return call


def attention_stats(case):
    maps = case.maps("x")
    return lambda x: mk.attention_stats([x[n] for n in maps], channel_dim=case.channel_dim)


def dice_diversity(case):
    maps = case.maps("masks")
    return lambda x: mk.dice_diversity([x[n] for n in maps])


def _called(module, names, buffers, x, *arguments, **options):
    """The module's result with its parameters taken from the case's tensors."""
    given = {name.removeprefix("module."): x[name] for name in names} | {k: b.clone() for k, b in buffers.items()}
    return torch.func.functional_call(module, given, arguments, options)


def maskd_module(case):
    pick = case.random
    warmup, weighted = pick.choice((0, 5)), case.images and pick.random() < 0.6
    module = mk.MasKDLoss(
        [s[1] for s in case.shapes], case.tokens, weighted, custom_mask_warmup=warmup, loss_weight=7.0
    )
    teacher, student, names = case.maps("teacher"), case.maps("student"), case.parameters(module)
    if pick.random() < 0.5:
        for name in (*teacher, *names):
            case.tensors[name].requires_grad_(False)
    buffers = dict(module.named_buffers())
    return lambda x: _called(module, names, buffers, x, [x[n] for n in student], [x[n] for n in teacher])


def _generative(case, make):
    """Features and parameters of a loss with convolutions: those take no mixture of dtypes."""
    dtype = case.dtype if case.dtype != torch.float16 else torch.float32
    channels = [s[1] if case.random.random() < 0.5 else 5 for s in case.shapes]
    module = make(channels, [s[1] for s in case.shapes])
    names = case.parameters(module, dtype)
    student = [
        case.feature(f"student[{i}]", (s[0], c, *s[2:]), dtype=dtype)
        for i, (c, s) in enumerate(zip(channels, case.shapes, strict=True))
    ]
    teacher = case.maps("teacher")

    def call(x, **options):
        return _called(module, names, {}, x, [x[n] for n in student], [x[n] for n in teacher], **options)

    return call


def mgd_module(case):
    pick = case.random
    if case.backend != "triton" and pick.random() < 0.4:  # the path of kept pixels
        case.shapes, case.dtype, case.mixed = [(case.batch, 128, 33, 33)], torch.float32, False
    on_channel = pick.random() < 0.3
    call = _generative(case, lambda s, t: mk.MGDLoss(s, t, lambda_mgd=0.65, mask_on_channel=on_channel))
    sizes = [(s[0], s[1], 1, 1) if on_channel else (s[0], 1, *s[2:]) for s in case.shapes]
    keep = [torch.rand(size, generator=case.generator) > 0.65 for size in sizes]
    return lambda x: call(x, keep=keep)


def amd_module(case):
    pick = case.random
    # A threshold no attention lies on: rounding does not decide.
    options = {"threshold": pick.choice((0.91, 1.07)), "mask_salient": pick.random() < 0.5, "reduction": 1}
    options |= {"channel_adaptive": pick.random() < 0.7, "channel_source": pick.choice(("teacher", "student"))}
    return _generative(case, lambda s, t: mk.AMDLoss(s, t, **options))


CHANNELS_LAST = {"maskd_loss", "receptive_masks", "masked_features", "masked_mse"}
CHANNELS_LAST |= {"scale_pixels", "scale_channels", "squared_error", "attention_stats"}
GENERATIVE = {"mgd_module", "amd_module"}
ON_IMAGES = {"mask_weights", *GENERATIVE}
FUNCTIONS = {
    f.__name__: f
    for f in (
        maskd_loss,
        maskd_module,
        mgd_module,
        amd_module,
        receptive_masks,
        masked_features,
        mask_weights,
        masked_mse,
        scale_pixels,
        scale_channels,
        squared_error,
        attention_stats,
        dice_diversity,
    )
}


def flatten(x):
    return [x] if isinstance(x, torch.Tensor) else [y for item in x for y in flatten(item)]


def results(call, tensors, grad_mode):
    """Outputs, and the gradients of a random combination of them, taken twice."""
    with grad_mode():
        outputs = flatten(call(tensors))
        inputs = {n: x for n, x in tensors.items() if x.requires_grad}
        total, generator = 0.0, torch.Generator().manual_seed(0)
        for y in outputs:
            noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            total = total + (y * noise.to(y.dtype)).sum().double() if y.requires_grad else total
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    if isinstance(total, torch.Tensor) and inputs:
        first, second = (
            torch.autograd.grad(total, inputs.values(), retain_graph=True, allow_unused=True) for _ in "ab"
        )
        for name, a, b in zip(inputs, first, second, strict=True):
            assert (a is None) == (b is None), f"gradient of {name}: there once"
            if a is not None:
                assert torch.equal(a, b) or a.isnan().any(), f"gradient of {name}: another one the second time"
                assert a.dtype == inputs[name].dtype, f"gradient of {name}: {a.dtype}"
                found[f"gradient of {name}"] = a
    return found


def off(a, b):
    """The largest error relative to the largest value."""
    return ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if b.numel() else 0.0


def errors_nearby(call, case, values):
    """PyTorch's own errors: in the case's very memory, then with inputs that differ from it in their last bits."""
    with mk.use_backend("reference"):
        for seed in range(9):
            generator = torch.Generator().manual_seed(seed)
            inputs = case.tensors
            if seed > 0:
                inputs = {}
                for name, x in values.items():
                    last_bits = 2 * torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator, dtype=x.dtype)
                    inputs[name] = (x.detach() * (1 + last_bits)).requires_grad_(x.requires_grad)
            doubles = {n: plain(x).double() for n, x in inputs.items()}
            doubles = {n: x.requires_grad_(inputs[n].requires_grad) for n, x in doubles.items()}
            exact = results(call, doubles, case.grad_mode)
            yield {n: off(x, exact[n]) for n, x in results(call, inputs, case.grad_mode).items()}


def run(seed):
    """Raises where the case of this seed is not as exact as PyTorch is."""
    case = Case(seed)
    call = FUNCTIONS[case.name](case)
    lowest = min((x.dtype for x in case.tensors.values()), key=lambda d: torch.finfo(d).bits)
    for _ in range(case.random.choice((1, 3))):  # later calls are recalled ones, with other values
        values = {n: plain(x).clone().requires_grad_(x.requires_grad) for n, x in case.tensors.items()}
        doubles = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in values.items()}
        with mk.use_backend("reference"):
            exact = results(call, doubles, case.grad_mode)
            eager = results(call, values, case.grad_mode)
        with mk.use_backend(case.backend):
            got = results(call, case.tensors, case.grad_mode)
        assert got.keys() == exact.keys(), f"{sorted(got)}, expected {sorted(exact)}"
        for name, value in got.items():
            assert value.shape == exact[name].shape, f"{name}: {value.shape}, expected {exact[name].shape}"
            # The interpreter cuts bfloat16 off where hardware rounds: the error of each rounding doubles.
            cut = 2 if case.backend == "triton" and lowest == torch.bfloat16 else 1
            floor = {torch.float64: 1e-10, torch.float32: 4e-6}.get(value.dtype, cut * torch.finfo(value.dtype).eps)
            if value.dtype == torch.float64 and lowest != torch.float64:
                floor = 4e-6
            cap = max(cut * CAP[lowest], floor)
            theirs, error = off(eager[name], exact[name]), off(value, exact[name])
            allowed = max(min(max(2 * theirs, floor), cap), theirs)
            if error > allowed:  # one result of PyTorch's may be exact by chance
                theirs = max(theirs, *(errors[name] for errors in errors_nearby(call, case, values)))
                allowed = max(min(2 * theirs, cap), theirs)
            assert error <= allowed, f"{name}: error {error:.2e} of the largest value, allowed {allowed:.2e}"
        with torch.no_grad():
            for n, x in case.tensors.items():
                if not n.startswith("masks") and 0 not in x.stride():
                    x.mul_(0.9)


def describe(seed):
    """What is in a case, for whoever has to mend it."""
    case = Case(seed)
    FUNCTIONS[case.name](case)
    lines = [f"seed {seed}: {case.name} on {case.backend}, {case.grad_mode.__name__}, {case.odd}"]
    for name, x in case.tensors.items():
        lines.append(f"  {name}: {x.dtype} {list(x.shape)} {x.stride()}{' trained' if x.requires_grad else ''}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1)
    arguments = parser.parse_args()
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        try:
            run(seed)
        except Exception:
            failed += 1
            print(describe(seed), traceback.format_exc(limit=-2), sep="\n", flush=True)
    print(f"{arguments.cases} cases from seed {arguments.seed} on, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
