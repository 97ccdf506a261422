"""A copy of the teacher made for running only: batch norms folded, half precision, channels-last."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from maskd_kernels.distill.features import layer_name, tensors_in, unwrap
from maskd_kernels.distill.recording import Recorder
from maskd_kernels.distill.taps import Tap
from maskd_kernels.distill.teacher import as_call
from maskd_kernels.validation import check_module

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Preparation:
    """What ``prepare_teacher`` did; ``prepared.preparation``.

    Attributes:
        folded: the convolution that each folded batch norm went into.
        left: why each other batch norm is as it was.
        errors: of each tap, the L2 norm of the difference to the original's features over that of the original's;
            of several levels or runs, the largest. Empty without taps and example inputs.
    """

    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} batch norm(s) folded, {len(self.left)} left"]
        lines += [f"  {name} left: {why}" for name, why in self.left.items()]
        lines += [f"  tap {name or 'output'}: relative error {error:.2e}" for name, error in self.errors.items()]
        return "\n".join(lines)


def prepare_teacher(
    teacher: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    fold_batch_norm: bool = True,
    compile: bool = False,
    taps: Tap | str | Sequence[Tap | str] = (),
    example_inputs: Any = None,
) -> Any:
    """A copy of the teacher that computes the same features for less; the teacher itself stays as it is.

    Batch norms, torchvision's ``FrozenBatchNorm2d`` among them, are folded into the convolutions that feed them, and
    become ``nn.Identity`` under their names, so that taps on them stay valid. Which convolution feeds which batch norm
    is read off the model by ``torch.fx``, piece by piece where it cannot be traced as a whole, and checked in the
    first forward. A batch norm stays where its convolution has other readers in the model, runs elsewhere too, is
    tapped, or has hooks. A tap on a folded convolution would see other values, so ``Distiller`` and ``TokenTrainer``
    refuse it.

    A half ``dtype`` is that of autocast, in which the copy then runs by itself when it is called (not where one of its
    methods or layers is: use ``torch.autocast`` there), with the weights of convolutions and linear layers cast once
    and for all. It takes the inputs that the teacher takes: images and boxes stay float32, and what autocast deems
    fragile, norms that are left and all buffers too.

    Args:
        teacher: any model; wrappers of ``torch.compile`` and ``DistributedDataParallel`` are taken off.
        dtype: ``torch.bfloat16`` or ``torch.float16``; ``torch.float32`` casts a half teacher up; None keeps what the
            teacher has.
        channels_last: whether weights of 2-D and 3-D convolutions, and thereby features, lie channels-last.
        fold_batch_norm: whether batch norms are folded.
        compile: whether the copy comes back under ``torch.compile``. Without ``example_inputs`` batch norms are then
            folded only if the model can be traced as a whole.
        taps: the layers whose features are read, one or several, by name or as the ``Tap``s of ``Distiller``. Their
            outputs stay what they are: a convolution that is tapped is not folded into.
        example_inputs: for one forward, as ``Distiller`` takes them; with them layers that are run one by one (YOLO's)
            are traced one by one, the fold is checked at once, and the error of each tap measured.

    Returns:
        The copy, in eval mode, without gradients of parameters. Running it in training mode raises a
        ``RuntimeError``. ``copy.preparation`` says what was folded, what was left and why, and each tap's error.

    Raises:
        TypeError: the teacher is no module.
        ValueError: another dtype, one that cannot hold a weight, or a tap that names no layer.
        RuntimeError: the model runs a folded convolution otherwise than it was traced; a tap does not run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_kernels import prepare_teacher
        >>> teacher = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> prepared = prepare_teacher(teacher, taps=["2"], example_inputs=(torch.randn(2, 3, 32, 32),))
        >>> prepared.preparation.folded
        {'1': '0'}
        >>> prepared.preparation.errors["2"] < 1e-5
        True
    """
    check_module(teacher, "teacher")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected None or one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    taps = [taps] if isinstance(taps, (Tap, str)) else taps
    tapped = [tap.side(tap.teacher).resolved(teacher, "taps").names if isinstance(tap, Tap) else [tap] for tap in taps]
    names = list(dict.fromkeys(layer_name(teacher, name, "taps") for found in tapped for name in found))
    inner = unwrap(teacher)
    held = [x for layer in inner.modules() for x in vars(layer).values() if isinstance(x, Tensor) and not x.is_leaf]
    detached = {id(x): x.detach().clone() for x in held}  # results that layers keep: they cannot be copied
    model = copy.deepcopy(inner, detached).eval().requires_grad_(False)
    if isinstance(model, _UnderAutocast):  # prepared before
        dtype = dtype or model.half_dtype
        model.__class__ = type(model).__mro__[2]
    with _noting_what_runs(model) as ran:
        before = _features(model, names, example_inputs)

    report, checks = Preparation(), list[_Check]()
    model.preparation = report  # type: ignore[assignment]
    if fold_batch_norm:
        checks = _fold(model, names, report, ran, whole=compile and example_inputs is None)
    if dtype is not None and dtype.itemsize < 4:
        _to_half(model, dtype)
    elif dtype is not None:
        model.to(dtype)
    if channels_last:
        _lay_channels_last(model)
    model.register_forward_pre_hook(_refuse_training)

    after = _features(model, names, example_inputs)
    for name, levels in before.items():
        report.errors[name] = max(_relative_error(a, b) for a, b in zip(levels, after[name], strict=True))
    if compile:
        for check in checks:
            check.close()
        return torch.compile(model)
    return model


def _refuse_training(module: nn.Module, _inputs: Any) -> None:
    if module.training:
        raise RuntimeError("a prepared teacher is for running only: expected eval mode, got training mode; call eval()")


# Which convolution feeds which batch norm


class _Tracer(fx.Tracer):
    """Records, beside the graph, whose output each value is and which parameters are read by themselves."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None
        self.shown: dict[fx.Node, list[str]] = {}
        self.read: set[int] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, _batch_norms()) or module_qualified_name in self.opaque
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        try:
            output = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or name
            raise
        for node in _nodes(output):
            self.shown.setdefault(node, []).append(name)
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


@dataclass
class _Traces:
    """What tracing says of a model: calls by layer, in all pieces; names are those of the model."""

    calls: dict[str, list[fx.Node]] = field(default_factory=dict)
    shown: dict[fx.Node, list[str]] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    piece: dict[str, str] = field(default_factory=dict)
    kept: set[fx.Node] = field(default_factory=set)  # values that the model stores
    read: set[int] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)


def _batch_norms() -> tuple[type[nn.Module], ...]:
    torchvision = sys.modules.get("torchvision.ops.misc")  # not imported: no model has its batch norm
    return (*_BATCH_NORMS, torchvision.FrozenBatchNorm2d) if torchvision else _BATCH_NORMS


def _nodes(value: Any) -> Iterator[fx.Node]:
    """The traced values in any structure."""
    if isinstance(value, fx.Proxy):
        yield value.node
    elif isinstance(value, dict):
        yield from _nodes(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _nodes(item)


@contextmanager
def _noting_what_runs(model: nn.Module) -> Iterator[set[str]]:
    """The layers whose own forward runs: a container's may not, when its layers are called one by one."""
    ran: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: ran.add(name))
        for name, layer in model.named_modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _trace(model: nn.Module, whole: bool, ran: set[str]) -> _Traces:
    """Traces the model or, unless ``whole``, the largest pieces of it that can be, of those that ``ran``, if known."""
    # Tracing may leave its values in the model: it gets a copy, with the same parameters and buffers.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    scratch = copy.deepcopy(model, shared)
    layers = {layer: name for name, layer in scratch.named_modules()}
    traces, pieces = _Traces(), [scratch]
    while pieces:
        piece = pieces.pop()
        if not any(isinstance(m, _batch_norms()) for m in piece.modules()):
            continue
        if ran and layers[piece] not in ran:
            pieces += piece.children()
            continue
        inside = dict(piece.named_modules())
        opaque: set[str] = set()
        while True:
            tracer = _Tracer(opaque)
            try:
                graph = tracer.trace(piece)
            except Exception as error:
                if tracer.failed is None:  # the piece's own forward
                    traces.failures[layers[piece]] = str(error).strip().split("\n")[0] or type(error).__name__
                    pieces += [] if whole else piece.children()
                    break
                opaque.add(tracer.failed)
                continue
            pieces += [] if whole else [inside[name] for name in opaque]
            _read_graph(traces, graph, tracer, layers[piece], {n: layers[m] for n, m in inside.items()})
            for module in inside.values():
                traces.kept.update(_nodes(vars(module)))
            break
    return traces


def _read_graph(traces: _Traces, graph: fx.Graph, tracer: _Tracer, piece: str, names: dict[str, str]) -> None:
    for node in graph.nodes:
        if node.op == "call_module":
            name = names[node.target]
            traces.calls.setdefault(name, []).append(node)
            traces.names[node] = name
            traces.piece[name] = piece
    for node, shown in tracer.shown.items():
        traces.shown[node] = [names[name] for name in shown]
    traces.read |= tracer.read


# Folding


def _fold(model: nn.Module, taps: list[str], report: Preparation, ran: set[str], whole: bool) -> list[_Check]:
    layers = dict(model.named_modules())
    norms = {name: layer for name, layer in layers.items() if isinstance(layer, _batch_norms())}
    tapped = [layers[name] for name in taps]
    traces = _trace(model, whole, ran) if norms else _Traces()
    checks: dict[str, _Check] = {}
    for name, norm in norms.items():
        convolution, why = _feeder(name, traces, layers, tapped)
        if convolution is None:
            report.left[name] = why
            continue
        _absorb(layers[convolution], norm)
        identity = nn.Identity().eval()
        model.set_submodule(name, identity)
        for other, layer in model.named_modules(remove_duplicate=False):  # a batch norm with several names
            if layer is norm:
                model.set_submodule(other, identity)
        report.folded[name] = convolution
        for shown in {shown for call in traces.calls[convolution] for shown in traces.shown[call]}:
            layers[shown].folded_batch_norm = name  # layer_name refuses to tap it
        piece = traces.piece[convolution]
        if piece not in checks:
            checks[piece] = _Check(layers[piece], whole=not piece)
        checks[piece].watch(convolution, layers[convolution], name, identity)
    return list(checks.values())


def _feeder(
    name: str, traces: _Traces, layers: dict[str, nn.Module], tapped: list[nn.Module]
) -> tuple[str | None, str]:
    """The convolution that a batch norm can be folded into, or None and why there is none."""
    norm: Any = layers[name]
    if type(norm) not in _batch_norms():
        return None, f"is a {type(norm).__name__}, which may do more than normalise"
    if norm.running_mean is None or norm.running_var is None:
        return None, "normalises by the batch's own statistics"
    calls = traces.calls.get(name)
    if not calls:
        reasons = "; ".join(f"{piece or 'the model'} cannot be traced: {why}" for piece, why in traces.failures.items())
        return None, reasons or "does not run when the model is traced"
    feeding = {traces.names.get(x, "") if isinstance(x, fx.Node) else "" for node in calls for x in node.args[:1]}
    source = next(iter(feeding), "")
    if len(feeding) != 1 or type(layers.get(source)) not in _CONVOLUTIONS:
        return None, "is not fed by a convolution, or not always by the same"
    convolution: Any = layers[source]
    if isinstance(convolution, _TRANSPOSED) and convolution.groups > 1:
        return None, f"{source} is a transposed convolution with groups"
    outputs = traces.calls[source]
    if len(outputs) != len(calls) or any(list(out.users) != [call] for out, call in zip(outputs, calls, strict=True)):
        return None, f"the output of {source} has other readers"
    if traces.kept.intersection(outputs):
        return None, f"the model stores the output of {source}"
    tensors = (*_tensors(convolution), *_tensors(norm))
    if any(id(t) in traces.read for t in tensors):
        return None, f"the model reads weights of {source} or of the batch norm by itself"
    shown = {layers[other] for out in outputs for other in traces.shown[out]}
    if any(layer in shown for layer in tapped):
        return None, f"{source} is tapped"
    if any(_has_hooks(layer) for layer in (norm, *shown)):
        return None, f"{source} or the batch norm has hooks"
    return source, ""


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _absorb(convolution: Any, norm: Any) -> None:
    """Folds in float64, so that each weight is rounded once."""

    def exact(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to("cpu", torch.float64)

    weight, bias = fuse_conv_bn_weights(
        exact(convolution.weight),  # type: ignore[arg-type]
        exact(convolution.bias),
        exact(norm.running_mean),  # type: ignore[arg-type]
        exact(norm.running_var),  # type: ignore[arg-type]
        norm.eps,
        exact(norm.weight),
        exact(norm.bias),
        transpose=isinstance(convolution, _TRANSPOSED),
    )
    like = convolution.weight
    convolution.weight = nn.Parameter(weight.to(like), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(like), requires_grad=False)


class _Check:
    """Sees in a piece's first forward that its folded convolutions run as they were traced, and then goes.

    What runs in a piece is known only while the piece itself does. A model traced as a whole may be run in parts.
    """

    def __init__(self, piece: nn.Module, whole: bool) -> None:
        self.whole = self.active = whole
        self.outputs: dict[str, list[Tensor]] = {}
        self.pairs: dict[str, list[Any]] = {}
        self.piece = [
            piece.register_forward_pre_hook(self.enter),
            piece.register_forward_hook(self.leave, always_call=True),
        ]

    def watch(self, convolution: str, layer: nn.Module, norm: str, identity: nn.Module) -> None:
        self.pairs[convolution] = [
            layer.register_forward_hook(functools.partial(self.ran, convolution)),
            identity.register_forward_pre_hook(functools.partial(self.read, convolution, norm)),
        ]

    def enter(self, _module: nn.Module, _inputs: Any) -> None:
        self.active = True

    def ran(self, convolution: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if not self.active:
            self.refuse(convolution)
        self.outputs.setdefault(convolution, []).append(output)

    def read(self, convolution: str, norm: str, _module: nn.Module, inputs: Any) -> None:
        if not any(inputs[0] is output for output in self.outputs.pop(convolution, [])):
            self.refuse(convolution)
        for handle in self.pairs.pop(convolution):
            handle.remove()

    def leave(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.active = self.whole
        unread, self.outputs = list(self.outputs), {}
        if output is None:  # the forward was ended by an exception
            return
        if unread:
            self.refuse(unread[0])
        self.close()

    def refuse(self, convolution: str) -> None:
        raise RuntimeError(
            f"prepare_teacher: the convolution {convolution!r}, into which a batch norm was folded, runs otherwise "
            "than it was traced; pass example_inputs, which show what runs, name it in taps, so that it is left as it "
            "is, or turn fold_batch_norm off"
        )

    def close(self) -> None:
        for handle in (*self.piece, *(handle for pair in self.pairs.values() for handle in pair)):
            handle.remove()


# Precision and layout


def _to_half(model: nn.Module, dtype: torch.dtype) -> None:
    """Runs the model under autocast, which finds the weights of convolutions and linear layers cast already."""
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        for key, tensor in layer.named_parameters(recurse=False):
            if key not in ("weight", "bias"):
                continue
            half = tensor.to(dtype)
            if not half.isfinite().all() and tensor.isfinite().all():
                largest = tensor.abs().max().item()
                raise ValueError(f"dtype: {dtype} cannot hold {name}.{key}, whose largest value is {largest:.3g}")
            setattr(layer, key, nn.Parameter(half, requires_grad=False))
    model.half_dtype = dtype  # type: ignore[assignment]
    model.__class__ = _under_autocast(type(model))  # type: ignore[arg-type]


class _UnderAutocast(nn.Module):
    half_dtype: torch.dtype
    preparation: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = next((x for tensors in (self.parameters(), self.buffers()) for x in tensors), None)
        with torch.autocast("cpu" if own is None else own.device.type, self.half_dtype, enabled=own is not None):
            return super().forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = self._plain()
        copied = _again_under_autocast(copy.deepcopy(plain, memo), self.half_dtype, self.preparation)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return _again_under_autocast, (self._plain(), self.half_dtype, self.preparation)

    def _plain(self) -> Any:
        """The same model of its own class, which knows how to copy itself: an ``fx.GraphModule`` has its own way."""
        model_class: Any = type(self).__mro__[2]
        plain = model_class.__new__(model_class)
        plain.__dict__ = self.__dict__
        return plain


@functools.cache
def _under_autocast(model_class: Any) -> Any:
    return type(model_class.__name__, (_UnderAutocast, model_class), {})


def _again_under_autocast(model: Any, half_dtype: torch.dtype, preparation: Preparation) -> Any:
    model.half_dtype, model.preparation = half_dtype, preparation
    model.__class__ = _under_autocast(model.__class__)
    return model


def _lay_channels_last(model: nn.Module) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for layer in model.modules():
        if not isinstance(layer, nn.modules.conv._ConvNd):
            continue
        weight = layer._parameters.get("weight")  # none where it is computed: weight norm, other parametrisations
        if weight is not None and weight.dim() in formats:
            laid = weight.contiguous(memory_format=formats[weight.dim()])
            layer.weight = nn.Parameter(laid, requires_grad=False)


# How far the features are off


def _features(model: nn.Module, names: list[str], inputs: Any) -> dict[str, list[Tensor]]:
    """The named layers' features in one forward: of each layer its levels, run after run. None without inputs."""
    if inputs is None:
        return {}
    with torch.no_grad():
        _, records = Recorder(model, "taps", names).run(model, *as_call(inputs))
    features = {name: [x for run in records.get(name, []) for x in tensors_in(run)] for name in names}
    for name, levels in features.items():
        if not levels:
            raise RuntimeError(f"taps: the layer {name!r} did not run with these example_inputs")
    return features


def _relative_error(original: Tensor, prepared: Tensor) -> float:
    expected, got = original.double(), prepared.double()
    return float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
