"""Random calls of the public functions against the reference in float64: ``python tests/fuzz.py --seed 123``.

A case is its seed: function, shapes, dtypes, memory layouts, what requires gradients, grad mode and backend follow from
it. Run as a program it goes on from the seed for ``--cases`` cases and prints those that fail.
"""

import argparse
import functools
import operator
import random
import traceback

import torch
from helpers import CAP, features

import maskd_kernels as mk
from maskd_kernels import native

LAYOUTS = ("contiguous", "channels_last", "sliced", "rows", "every_other", "expanded_batch", "expanded_pixels")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Plain(torch.Tensor):
    """A subclass that changes nothing, as DTensor and others are subclasses."""


class Case:
    """The random choices of one case, and its tensors by name."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.tensors = {}
        pick = self.random
        self.backend = pick.choice(("auto", "native", "native", "reference") if native.available() else ("reference",))
        self.mixed, self.dtype = pick.random() < 0.3, pick.choice(DTYPES)
        self.levels = pick.choice((1, 1, 2, 3))
        self.batch = pick.choice((0, 1, 2, 3)) if pick.random() < 0.3 else pick.choice((1, 2))
        self.tokens = pick.choice((1, 2, 6, 9))
        self.images = pick.random() < 0.7
        self.shapes = [self._shape() for _ in range(self.levels)]
        self.grad_mode = pick.choice((torch.enable_grad, torch.enable_grad, torch.enable_grad, torch.no_grad))
        self.odd = pick.choice((None,) * 8 + ("subclass", "negative"))
        self.name = pick.choice(sorted(FUNCTIONS))

    def _shape(self):
        pick = self.random
        spatial = [pick.choice((1, 2, 5, 8, 17, 33)) for _ in range(2 if self.images else pick.choice((1, 3)))]
        if pick.random() < 0.05:
            spatial[pick.randrange(len(spatial))] = 0
        if pick.random() < 0.1:
            spatial = [1] * len(spatial)
        return (self.batch, pick.choice((1, 2, 3, 8, 19, 40)), *spatial)

    def feature(self, name, shape, scale=1.0):
        """A map of this shape, in a layout and a dtype of its own."""
        pick = self.random
        dtype = pick.choice(DTYPES) if self.mixed else self.dtype
        layout = pick.choice(LAYOUTS) if 0 not in shape else "contiguous"
        x = features(shape, dtype, layout, scale, grad=False)
        if self.odd == "negative" and dtype in (torch.float32, torch.float64):
            x = torch.complex(torch.zeros_like(x), x).conj().imag
        elif self.odd == "subclass" and pick.random() < 0.5:
            x = x.as_subclass(Plain)
        return self._keep(name, x)

    def small(self, name, *shape, low=None):
        """Tokens, weights, factors."""
        dtype = self.random.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        x = torch.randn(shape, generator=self.generator) * 0.5
        x = (x if low is None else x.abs() + low).to(dtype)
        if self.odd == "subclass" and self.random.random() < 0.3:
            x = x.as_subclass(Plain)
        return self._keep(name, x)

    def _keep(self, name, x):
        self.tensors[name] = x.requires_grad_(self.random.random() < 0.6)
        return name

    def maps(self, name):
        return [self.feature(f"{name}[{i}]", shape) for i, shape in enumerate(self.shapes)]


# Each draws its arguments and returns what is called with the case's tensors, by name.


def maskd_loss(case):
    teacher, student = case.maps("teacher"), case.maps("student")
    tokens = [case.small(f"tokens[{i}]", case.tokens, s[1]) for i, s in enumerate(case.shapes)]
    weighting = []
    if case.images and case.random.random() < 0.5:
        for i, (_, c, *_) in enumerate(case.shapes):
            sizes = ((c, c, 3, 3), (c,), (case.tokens, c, 1, 1), (case.tokens,))
            weighting.append([case.small(f"weighting[{i}][{j}]", *size) for j, size in enumerate(sizes)])
    if case.random.random() < 0.5:  # the kernels of frozen tokens, and their recalled calls
        for name in (*teacher, *tokens, *functools.reduce(operator.iadd, weighting, [])):
            case.tensors[name].requires_grad_(False)
    options = {"customize": case.random.random() < 0.4, "eps": case.random.choice((0.0, 1e-5))}
    options["return_dice"] = case.random.random() < 0.2

    def call(x):
        w = [mk.functional.MaskWeighting(*(x[n] for n in level)) for level in weighting] or None
        s, t, e = ([x[n] for n in names] for names in (student, teacher, tokens))
        return mk.maskd_loss(s, t, e, weighting=w, **options)

    return call


def receptive_masks(case):
    teacher, student = case.maps("teacher"), case.maps("student") if case.random.random() < 0.4 else None
    tokens = [case.small(f"tokens[{i}]", case.tokens, s[1]) for i, s in enumerate(case.shapes)]

    def call(x):
        s = None if student is None else [x[n] for n in student]
        return mk.receptive_masks([x[n] for n in teacher], [x[n] for n in tokens], student=s)

    return call


def masked_features(case):
    name, (_, c, *_) = case.feature("x", case.shapes[0]), case.shapes[0]
    tokens = case.small("tokens", case.tokens, c)
    return lambda x: mk.masked_features(x[name], x[tokens])


def masked_mse(case):
    teacher, student = case.maps("teacher"), case.maps("student")
    masks = [case.small(f"masks[{i}]", s[0], case.tokens, *s[2:], low=0.1) for i, s in enumerate(case.shapes)]
    return lambda x: mk.masked_mse(*([x[n] for n in names] for names in (student, teacher, masks)))


def scale_pixels(case):
    maps = case.maps("x")
    scale = [case.small(f"scale[{i}]", s[0], *s[2:]) for i, s in enumerate(case.shapes)]
    return lambda x: mk.scale_pixels([x[n] for n in maps], [x[n] for n in scale])


def scale_channels(case):
    maps = case.maps("x")
    scale = [case.small(f"scale[{i}]", *s[:2]) for i, s in enumerate(case.shapes)]
    return lambda x: mk.scale_channels([x[n] for n in maps], [x[n] for n in scale])


def squared_error(case):
    pred, target = case.maps("pred"), case.maps("target")
    scale = [case.small(f"scale[{i}]", *s[:2]) for i, s in enumerate(case.shapes)]
    scaled = case.random.random() < 0.5

    def call(x):
        factors = [x[n] for n in scale] if scaled else None
        return mk.squared_error([x[n] for n in pred], [x[n] for n in target], channel_scale=factors)

    return call


def attention_stats(case):
    maps = case.maps("x")
    return lambda x: mk.attention_stats([x[n] for n in maps])


def dice_diversity(case):
    maps = case.maps("masks")
    return lambda x: mk.dice_diversity([x[n] for n in maps])


FUNCTIONS = {
    f.__name__: f
    for f in (
        maskd_loss,
        receptive_masks,
        masked_features,
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


def run(seed):
    """Raises where the case of this seed is not as exact as PyTorch is."""
    case = Case(seed)
    call = FUNCTIONS[case.name](case)
    lowest = min((x.dtype for x in case.tensors.values()), key=lambda d: torch.finfo(d).bits)
    for _ in range(case.random.choice((1, 3))):  # later calls are recalled ones, with other values
        plain = {n: x.as_subclass(torch.Tensor).detach().resolve_neg() for n, x in case.tensors.items()}
        plain = {n: x.clone().requires_grad_(case.tensors[n].requires_grad) for n, x in plain.items()}
        doubles = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in plain.items()}
        with mk.use_backend("reference"):
            exact = results(call, doubles, case.grad_mode)
            eager = results(call, plain, case.grad_mode)
        with mk.use_backend(case.backend):
            got = results(call, case.tensors, case.grad_mode)
        assert got.keys() == exact.keys(), f"{sorted(got)}, expected {sorted(exact)}"
        for name, value in got.items():
            assert value.shape == exact[name].shape, f"{name}: {value.shape}, expected {exact[name].shape}"
            floor = {torch.float64: 1e-10, torch.float32: 4e-6}.get(value.dtype, torch.finfo(value.dtype).eps)
            if value.dtype == torch.float64 and lowest != torch.float64:
                floor = 4e-6
            theirs = off(eager[name], exact[name])
            allowed = max(min(max(2 * theirs, floor), max(CAP[lowest], floor)), theirs)
            error = off(value, exact[name])
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
