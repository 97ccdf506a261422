"""What the Triton launchers launch, compiled for GPUs that are not there.

The operators run as they would on a GPU, with a stand-in for Triton's driver that compiles and launches nothing: what
is looked at are the very kernels, arguments and specialisations that users get.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.cases import FASTER_RCNN, RETINANET
from maskd_kernels import MaskModule, backends, functional, use_backend
from maskd_kernels import triton as kernels
from maskd_kernels.ops.attention_stats import attention_stats
from maskd_kernels.ops.scale_pixels import scale_pixels
from maskd_kernels.ops.squared_error import squared_error
from maskd_kernels.triton import launch

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("planar", "interleaved")
CHANNELS = 256
Sizes = tuple[tuple[int, ...], ...]
LEVELS: Sizes = ((8, 16), (4, 8), (5, 5), (3, 3), (1, 2))  # some in rows of whole vectors, some not


class Workload(NamedTuple):
    """What kernels are launched for, with as many levels as ``LEVELS``: the same kernels."""

    images: int
    sizes: Sizes


WORKLOADS = {
    "RetinaNet P3-P7, N=2": Workload(2, RETINANET),
    "Faster R-CNN P2-P6, N=16": Workload(16, FASTER_RCNN),
}


class Walk(NamedTuple):
    """How many feature maps a kernel's loop over channels reads and writes."""

    reads: int
    writes: int


# Scenario and kernel, of those that walk the feature maps.
WALKS = {
    "loss receptive_stats.forward_kernel": Walk(2, 0),
    "loss receptive_stats.student_kernel": Walk(2, 1),
    "tokens receptive_stats.forward_kernel": Walk(2, 0),
    "tokens receptive_stats.backward_kernel": Walk(2, 2),
    "scale scale_pixels.forward_kernel": Walk(1, 1),
    "scale scale_pixels.backward_kernel": Walk(2, 1),
    "error squared_error.forward_kernel": Walk(2, 0),
    "error squared_error.backward_kernel": Walk(2, 1),
    "attention attention_stats.forward_kernel": Walk(1, 0),
    "attention attention_stats.backward_kernel": Walk(1, 1),
}
TOKENS = (1, 8, 16, 64)  # numbers of tokens, beside the six of "loss", with which the forward pass is counted
WALKS |= {f"K={k} receptive_stats.forward_kernel": Walk(2, 0) for k in TOKENS}


def jit_functions() -> dict[str, Any]:
    """Every Triton kernel, by name."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__)]
    modules = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    return {
        f"{name}.{attribute}": value
        for name, module in modules.items()
        for attribute, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.module == module.__name__
    }


class Launched(NamedTuple):
    """A launch that the driver saw."""

    grid: tuple[int, ...]
    total_bytes: int  # of all tensors that it was given


def total_bytes(arguments: Any) -> int:
    """Of the tensors in nested tuples; what lies at one address counts once."""
    found: dict[int, int] = {}

    def look(argument: Any) -> None:
        if isinstance(argument, torch.Tensor):
            found[argument.data_ptr()] = max(argument.nbytes, found.get(argument.data_ptr(), 0))
        elif isinstance(argument, tuple):
            for part in argument:
                look(part)

    look(arguments)
    return sum(found.values())


class Driver:
    """What Triton asks of its driver. Compiles for ``architecture``, and remembers what was launched."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.launches: list[str] = []
        self.launched: dict[str, Launched] = {}  # the last of each name
        limits = {"max_shared_mem": 1 << 30, "multiprocessor_count": {80: 108, 90: 132, 100: 148}[architecture]}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits,
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches.append(source.fn.__name__)
            self.launched[source.fn.__name__] = Launched(arguments[:3], total_bytes(arguments[3:]))

        return launch


def compile_anew() -> None:
    """Forgets what was compiled in this process: a kernel keeps the driver that it was first launched by."""
    launch.forget()
    for function in jit_functions().values():
        function.device_caches.clear()


def install(architecture: int) -> Driver:
    """Makes the stand-in Triton's driver, for this process."""
    backends.why_no_triton = lambda device_type: None
    compile_anew()
    stand_in = Driver(architecture)
    driver.set_active(stand_in)
    return stand_in


def pyramid(
    dtype: torch.dtype, interleaved: bool, grad: bool = False, sizes: Sizes = LEVELS, images: int = 2
) -> list[torch.Tensor]:
    layout = torch.channels_last if interleaved else torch.contiguous_format
    maps = [torch.empty(images, CHANNELS, *size, dtype=dtype, memory_format=layout) for size in sizes]
    return [x.requires_grad_(grad) for x in maps]


def loss(
    dtype: torch.dtype,
    interleaved: bool,
    train_all: bool = False,
    tokens: int = 6,
    only_forward: bool = False,
    sizes: Sizes = LEVELS,
    images: int = 2,
) -> Callable[[], Any]:
    modules = [MaskModule(CHANNELS, tokens).requires_grad_(train_all) for _ in sizes]
    weighting = [m.weighting for m in modules]
    embeddings = [m.mask_token for m in modules]
    student, teacher = (pyramid(dtype, interleaved, grad, sizes, images) for grad in (True, train_all))

    def run() -> Any:
        value = functional.maskd_loss(student, teacher, embeddings, weighting=weighting)
        return value if only_forward else value.backward()

    return run


def scale(dtype: torch.dtype, interleaved: bool, sizes: Sizes = LEVELS, images: int = 2) -> Callable[[], Any]:
    factors = [torch.ones(images, *size, requires_grad=True) for size in sizes]
    x, gradients = (pyramid(dtype, interleaved, grad, sizes, images) for grad in (True, False))
    return lambda: torch.autograd.backward(scale_pixels(x, factors), gradients)


def error(dtype: torch.dtype, interleaved: bool, sizes: Sizes = LEVELS, images: int = 2) -> Callable[[], Any]:
    factors = [torch.ones(images, CHANNELS, requires_grad=True) for _ in sizes]
    pred, target = (pyramid(dtype, interleaved, grad, sizes, images) for grad in (True, False))
    return lambda: squared_error(pred, target, factors).sum().backward()


def attention(dtype: torch.dtype, interleaved: bool, sizes: Sizes = LEVELS, images: int = 2) -> Callable[[], Any]:
    x = pyramid(dtype, interleaved, True, sizes, images)
    gradients = [torch.ones(images, *size) for size in sizes] + [torch.ones(images, CHANNELS) for _ in sizes]
    return lambda: torch.autograd.backward([y for level in attention_stats(x) for y in level], gradients)


SCENARIOS: dict[str, Callable[..., Callable[[], Any]]] = {
    "loss": loss,
    "tokens": functools.partial(loss, train_all=True),
    "scale": scale,
    "error": error,
    "attention": attention,
}
TOKEN_SCENARIOS = {f"K={k}": functools.partial(loss, tokens=k, only_forward=True) for k in TOKENS}


class Compiled(NamedTuple):
    """A kernel as a scenario got it."""

    scenario: str
    name: str
    dtype: str
    layout: str
    architecture: int
    kernel: Any  # Triton's
    launches: dict[str, Launched]  # of each workload, where asked for

    @property
    def key(self) -> str:
        return f"{self.scenario} {self.name} {self.layout} {self.dtype} sm_{self.architecture}"


def itemsize(compiled: Compiled) -> int:
    """Bytes of an element of the features."""
    size: int = getattr(torch, compiled.dtype).itemsize
    return size


def compile_kernels(
    architecture: int,
    dtype: str,
    layout: str,
    scenarios: Collection[str],
    wanted: Callable[[str], bool] | None = None,
    workloads: Collection[str] = (),
) -> Iterator[Compiled]:
    """Each kernel of each scenario, of those ``wanted`` by name, and what it is launched with for each workload."""
    active = install(architecture)
    functions = jit_functions()
    skipped = [f for name, f in functions.items() if wanted is not None and not wanted(name)]
    for function in skipped:
        function.run = lambda *_, **__: None
    try:
        for scenario in scenarios:
            compile_anew()
            launched: dict[str, dict[str, Launched]] = {}
            with use_backend("triton"):
                prepare = functools.partial((SCENARIOS | TOKEN_SCENARIOS)[scenario], getattr(torch, dtype))
                prepare(layout == "interleaved")()
                for name in workloads:
                    active.launched.clear()
                    prepare(layout == "interleaved", images=WORKLOADS[name].images, sizes=WORKLOADS[name].sizes)()
                    launched[name] = dict(active.launched)
            for name, function in functions.items():
                for i, kernel in enumerate(function.device_caches[architecture][0].values()):
                    own = {workload: found[kernel.name] for workload, found in launched.items() if kernel.name in found}
                    yield Compiled(scenario, f"{name}{i or ''}", dtype, layout, architecture, kernel, own)
    finally:
        for function in skipped:
            del function.run
