"""How every operator reaches PyTorch: through its dispatcher for whatever traces or watches, else directly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maskd_kernels import backends


def is_transformed() -> bool:
    """Whether functorch or forward-mode AD follows what is called: they see into PyTorch's own operations only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_followed(grad: Sequence[Tensor]) -> bool:
    """Whether a backward must go through PyTorch's own operations: its result is differentiated again, or batched."""
    if torch.is_grad_enabled() or is_transformed():
        return True
    return any([torch._C._functorch.is_legacy_batchedtensor(g) for g in grad])  # is_grads_batched


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Leaves the autocast region of the tensor's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_eager() -> bool:
    """Whether nothing traces, transforms or watches what is called."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or is_transformed()
    )


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may run outside the dispatcher: eagerly, and on memory."""
    if not is_eager():
        return False
    # Negated views hold the opposite of their values in memory.
    return all(
        [(type(x) is Tensor or type(x) is torch.nn.Parameter) and not x.is_neg() and not x.is_meta for x in tensors]
    )


def as_saved(x: Tensor) -> Tensor:
    """The tensor as autograd saves it: one made in inference mode is seen by another tensor with the same memory."""
    if type(x) is not Tensor or not x.is_inference():
        return x
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class Backward(NamedTuple):
    """What an operator's gradients are computed from, beside those from upstream."""

    arguments: tuple[Any, ...]  # of the forward
    kept: list[Tensor]  # of its results, as ``keep`` chose
    needs: list[bool]  # of each argument: whether its gradient is wanted
    run: Callable[..., Any]  # ``{name}_backward``


def per_argument(arguments: Sequence[Any], needs: Sequence[bool], gradients: Iterable[Any]) -> tuple[Any, ...]:
    """Gradients that follow each other, those that are wanted, in the structure of the arguments."""
    rest, result = iter(gradients), []
    for argument, needed in zip(arguments, needs, strict=True):
        places = [_Place if needed else None for _ in _flatten(argument)]
        result.append(_pack(places if isinstance(argument, (list, tuple)) else [*places, None][0], rest))
    return tuple(result)


class Operator:
    """An operator of ``maskd_kernels`` with a second one, ``{name}_backward``, as its gradient.

    Arguments are tensors, lists of tensors, and settings; results are one tensor, a list, or a tuple of both. On the
    way through PyTorch's dispatcher and back, forward and backward, a call loses a quarter of a millisecond, which is
    what a small map takes altogether; in eager mode the kernels are therefore called without it.

    Where PyTorch must see into the computation, it is the reference's: under functorch's transforms, in forward-mode
    AD, and for a gradient that is differentiated itself.

    Args:
        name: as registered with ``torch.library``.
        forward: the implementation.
        backward: the implementation of ``{name}_backward``.
        reference: the same result by PyTorch's own operations.
        autograd: ``(call, *grad)``, with a ``Backward``, gives one gradient, or list of gradients, per argument.
        keep: ``(ctx, inputs, output)`` gives what of the results the backward needs, and may mark them.
        small: below so many elements in the first argument's levels the reference is faster on a CPU.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        reference: Callable[..., Any],
        autograd: Callable[..., Any],
        keep: Callable[..., Sequence[Tensor]] = lambda ctx, inputs, output: (),
        small: int = 0,
    ) -> None:
        self.name, self.forward, self.backward = name, forward, backward
        self.reference, self.autograd, self.keep = reference, autograd, keep
        self.small = small
        self._function: Any = type(f"maskd_kernels_{name}", (_Direct,), {})  # the name of the node in the graph

        def traced(ctx: Any, *grad: Any) -> Any:
            needs = [any(n) if isinstance(n, (list, tuple)) else n for n in ctx.needs_input_grad]
            return self.differentiate(ctx, needs, grad, direct=False)

        def second_derivative(ctx: Any, *grad: Any) -> None:
            raise NotImplementedError(f"{name}_backward: has no derivative; differentiate {name} twice instead")

        torch.library.impl(f"maskd_kernels::{name}", "CompositeExplicitAutograd", forward)
        torch.library.impl(f"maskd_kernels::{name}_backward", "CompositeExplicitAutograd", backward)
        torch.library.register_autograd(f"maskd_kernels::{name}", traced, setup_context=self.save)
        torch.library.register_autograd(f"maskd_kernels::{name}_backward", second_derivative)

    def __call__(self, *arguments: Any) -> Any:
        """The operator's result, differentiable."""
        tensors = _flatten(arguments)
        if not torch.compiler.is_compiling() and any([x.is_inference() for x in tensors]):
            tensors = [as_saved(x) for x in tensors]
            arguments = _pack(_structure_of(arguments), iter(tensors))
        if is_transformed():
            with full_precision(tensors[0]):
                return self.reference(*arguments)
        if self._is_small(arguments):
            return self.reference(*arguments)
        if not is_plain(tensors):
            return _registered(self.name)(*arguments)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.forward(*arguments)
        structure: list[Any] = []
        outputs = iter(self._function.apply(self, arguments, structure, *tensors))
        return _pack(structure[0], outputs)

    def _is_small(self, arguments: tuple[Any, ...]) -> bool:
        """Whether PyTorch's own operations are faster on a CPU, as calling the kernels costs more than it saves."""
        # Compiled code takes the backend that is set when it runs, which is not known while it is traced.
        if not self.small or torch.compiler.is_compiling() or backends.current_backend() != "auto":
            return False
        levels: list[Tensor] = arguments[0]
        return levels[0].is_cpu and sum([x.numel() for x in levels]) < self.small

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """What the backward needs, in ``ctx``, as ``torch.library.register_autograd`` calls it."""
        kept, tensors = self.keep(ctx, inputs, output), _flatten(inputs)
        ctx.inputs, ctx.asked = _structure_of(inputs), backends.current_backend()
        ctx.save_for_backward(*tensors, *kept)

    def differentiate(self, ctx: Any, needs: list[bool], grad: tuple[Any, ...], direct: bool) -> Any:
        """One gradient, or list of gradients, per argument; ``direct``: from the kernels where they may run."""
        saved = iter(ctx.saved_tensors)
        arguments, kept = _pack(ctx.inputs, saved), list(saved)
        if is_followed(_flatten(grad)):
            return self._through_reference(arguments, needs, _leaves(grad))
        direct = direct and is_plain(_flatten(grad))
        run = self.backward if direct else _registered(f"{self.name}_backward")
        with backends.running(ctx.asked):
            return self.autograd(Backward(arguments, kept, needs, run), *grad)

    def _through_reference(self, arguments: tuple[Any, ...], needs: list[bool], grad: list[Any]) -> tuple[Any, ...]:
        """The gradients as PyTorch derives them from the reference: it can go on from there."""
        again = torch.is_grad_enabled()
        with torch.enable_grad(), full_precision(_flatten(arguments)[0]):
            own = [
                _pack(_structure_of(x), map(_own, _flatten(x))) if needed else x
                for x, needed in zip(arguments, needs, strict=True)
            ]
            outputs = zip(_leaves(self.reference(*own)), grad, strict=True)
            reached = [(y, g) for y, g in outputs if g is not None and y.requires_grad]
            inputs = _flatten([x for x, needed in zip(own, needs, strict=True) if needed])
            found: Sequence[Any] = [None] * len(inputs)
            if reached:
                results, upstream = zip(*reached, strict=True)
                found = torch.autograd.grad(results, inputs, upstream, create_graph=again, allow_unused=True)
        return per_argument(arguments, needs, found)


def _registered(name: str) -> Any:
    return getattr(torch.ops.maskd_kernels, name)


def _own(x: Tensor) -> Tensor:
    """Another tensor with the same history: the same one may be given twice, or one depend on another."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _leaves(nested: Any) -> list[Any]:
    return [x for item in nested for x in _leaves(item)] if isinstance(nested, (list, tuple)) else [nested]


def _flatten(nested: Any) -> list[Tensor]:
    return [x for x in _leaves(nested) if isinstance(x, Tensor)]


class _Place:
    """Where a tensor was."""


def _structure_of(nested: Any) -> Any:
    if isinstance(nested, (list, tuple)):
        return tuple(map(_structure_of, nested)) if isinstance(nested, tuple) else list(map(_structure_of, nested))
    return _Place if isinstance(nested, Tensor) else nested


def _pack(structure: Any, tensors: Iterator[Any]) -> Any:
    if isinstance(structure, (list, tuple)):
        return type(structure)(_pack(item, tensors) for item in structure)
    return next(tensors) if structure is _Place else structure


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Operator, arguments: tuple[Any, ...], structure: list[Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        output = operator.forward(*arguments)
        operator.save(ctx, arguments, output)
        structure.append(_structure_of(output))
        ctx.operator, ctx.structure = operator, structure[0]
        ctx.sizes = [len(_flatten(x)) for x in arguments]
        return tuple(_flatten(output))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        flags = iter(ctx.needs_input_grad[3:])
        needs = [any(list(islice(flags, size))) for size in ctx.sizes]
        packed = _pack(ctx.structure, iter(grad))
        gradients = ctx.operator.differentiate(ctx, needs, packed if isinstance(packed, tuple) else (packed,), True)
        flat: list[Any] = [None, None, None]
        for gradient, size in zip(gradients, ctx.sizes, strict=True):
            if size:
                flat += gradient if isinstance(gradient, (list, tuple)) else [gradient]
        return tuple(flat)
