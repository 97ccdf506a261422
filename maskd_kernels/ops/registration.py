"""How every operator reaches PyTorch: through its dispatcher for whatever traces or watches, else directly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    return any(map(torch._C._functorch.is_legacy_batchedtensor, grad))  # is_grads_batched


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
    """Whether kernels may run outside the dispatcher: eagerly, and on what lies in memory, if on no meta device."""
    if not is_eager() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    return not any(map(Tensor.is_neg, tensors))  # negated views hold the opposite of their values in memory


_PLAIN = {Tensor, torch.nn.Parameter}


def as_saved(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors as autograd saves them: one made in inference mode is seen by another one with the same memory."""
    if not any(map(Tensor.is_inference, tensors)):
        return tensors
    return [
        x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        if type(x) is Tensor and x.is_inference()
        else x
        for x in tensors
    ]


class Backward(NamedTuple):
    """What an operator's gradients are computed from, beside those from upstream."""

    arguments: tuple[Any, ...]  # of the forward
    kept: list[Tensor]  # of its results, as ``keep`` chose
    needs: list[bool]  # of each argument: whether its gradient is wanted
    run: Callable[..., Any]  # ``{name}_backward``


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
        autograd: ``(call, *grad)``, with a ``Backward``, gives the gradients that are wanted, of all arguments.
        keep: ``(ctx, inputs, output)`` gives what of the results the backward needs, and may mark them.
        small: below so many elements in the first argument's levels the reference is faster on a CPU.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        reference: Callable[..., Any],
        autograd: Callable[..., Iterable[Any]] = lambda call, *grad: call.run(*call.arguments, *grad, call.needs),
        keep: Callable[..., Sequence[Tensor]] = lambda ctx, inputs, output: (),
        small: int = 0,
    ) -> None:
        self.name, self.forward, self.backward = name, forward, backward
        self.reference, self.autograd, self.keep = reference, autograd, keep
        self.small = small
        self._function: Any = type(f"maskd_kernels_{name}", (_Direct,), {})  # the name of the node in the graph

        def traced(ctx: Any, *grad: Any) -> Any:
            needs = [any(n) if isinstance(n, (list, tuple)) else n for n in ctx.needs_input_grad]
            of_tensors = [(span, kind if kind in (list, Tensor) else None) for span, kind in ctx.places]
            return _pack(of_tensors, self.differentiate(ctx, needs, grad, direct=False))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self.save(ctx, *_spread(inputs), inputs, output)

        def second_derivative(ctx: Any, *grad: Any) -> None:
            raise NotImplementedError(f"{name}_backward: has no derivative; differentiate {name} twice instead")

        torch.library.impl(f"maskd_kernels::{name}", "CompositeExplicitAutograd", forward)
        torch.library.impl(f"maskd_kernels::{name}_backward", "CompositeExplicitAutograd", backward)
        torch.library.register_autograd(f"maskd_kernels::{name}", traced, setup_context=setup_context)
        torch.library.register_autograd(f"maskd_kernels::{name}_backward", second_derivative)

    def __call__(self, *arguments: Any) -> Any:
        """The operator's result, differentiable."""
        tensors, places = _spread(arguments)
        if is_plain(tensors) and not tensors[0].is_meta and not self._is_small(arguments):
            if not torch.is_grad_enabled() or not any([x.requires_grad for x in tensors]):
                return self.forward(*arguments)
            of_results: list[_Place] = []
            results = _pack(of_results, self._function.apply((self, arguments, places, of_results), *tensors))
            return results if len(results) > 1 else results[0]
        compiling = torch.compiler.is_compiling()
        if not compiling:
            arguments = _pack(places, as_saved(tensors))
        if is_transformed():
            with full_precision(tensors[0]):
                return self.reference(*arguments)
        # Compiled code takes the backend that is set when it runs, which is not known while it is traced.
        if not compiling and self._is_small(arguments):
            return self.reference(*arguments)
        return _registered(self.name)(*arguments)

    def _is_small(self, arguments: tuple[Any, ...]) -> bool:
        """Whether PyTorch's own operations are faster on a CPU, as calling the kernels costs more than it saves."""
        levels: list[Tensor] = arguments[0]
        if not self.small or not levels[0].is_cpu or backends.current_backend() != "auto":
            return False
        return sum([x.numel() for x in levels]) < self.small

    def save(
        self, ctx: Any, tensors: Sequence[Tensor], places: list[_Place], inputs: tuple[Any, ...], output: Any
    ) -> None:
        """What the backward needs, in ``ctx``: the tensors among the inputs, and what ``keep`` chooses."""
        ctx.places, ctx.asked = places, backends.current_backend()
        ctx.save_for_backward(*tensors, *self.keep(ctx, inputs, output))

    def differentiate(self, ctx: Any, needs: list[bool], grad: Sequence[Any], direct: bool) -> list[Any]:
        """A gradient or None for each tensor; ``direct``: from the kernels where they may run."""
        saved, given = list(ctx.saved_tensors), _flatten(grad)
        arguments, kept = _pack(ctx.places, saved), saved[ctx.places[-1][0].stop :]
        if is_followed(given):
            gradients: Iterable[Any] = self._through_reference(arguments, needs, _leaves(grad))
        else:
            run = self.backward if direct and is_plain(given) else _registered(f"{self.name}_backward")
            with backends.running(ctx.asked):
                gradients = self.autograd(Backward(arguments, kept, needs, run), *grad)
        if all(needs):
            return list(gradients)
        rest = iter(gradients)
        of_all = zip(ctx.places, needs, strict=True)
        return [next(rest) if needed else None for (span, _), needed in of_all for _ in saved[span]]

    def _through_reference(self, arguments: tuple[Any, ...], needs: list[bool], grad: list[Any]) -> Sequence[Any]:
        """The gradients as PyTorch derives them from the reference: it can go on from there."""
        again = torch.is_grad_enabled()
        with torch.enable_grad(), full_precision(_flatten(arguments)[0]):
            own = [
                x if not needed else _own(x) if isinstance(x, Tensor) else [*map(_own, x)]
                for x, needed in zip(arguments, needs, strict=True)
            ]
            outputs = zip(_leaves(self.reference(*own)), grad, strict=True)
            reached = [(y, g) for y, g in outputs if g is not None and y.requires_grad]
            inputs = _flatten([x for x, needed in zip(own, needs, strict=True) if needed])
            if not reached:
                return [None] * len(inputs)
            results, upstream = zip(*reached, strict=True)
            return torch.autograd.grad(results, inputs, upstream, create_graph=again, allow_unused=True)


def _registered(name: str) -> Any:
    return getattr(torch.ops.maskd_kernels, name)


def _own(x: Tensor) -> Tensor:
    """Another tensor with the same history: the same one may be given twice, or one depend on another."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _leaves(nested: Any) -> list[Any]:
    return [x for item in nested for x in _leaves(item)] if isinstance(nested, (list, tuple)) else [nested]


def _flatten(items: Sequence[Any]) -> list[Tensor]:
    """The tensors among the items, and in those that are lists."""
    found: list[Any] = []
    for item in items:
        if isinstance(item, (list, tuple)):
            found += item
        else:
            found.append(item)
    return [x for x in found if isinstance(x, Tensor)]


_Place = tuple[slice, Any]  # where the tensors of an item are in a list of all; list, Tensor, or an item without


def _spread(items: Sequence[Any]) -> tuple[list[Tensor], list[_Place]]:
    """The tensors among the items, and in those that are lists; and where each item's are."""
    tensors: list[Tensor] = []
    places: list[_Place] = []
    for item in items:
        start, kind = len(tensors), item
        if isinstance(item, (list, tuple)):
            kind = list
            tensors += item
        elif isinstance(item, Tensor):
            kind = Tensor
            tensors.append(item)
        places.append((slice(start, len(tensors)), kind))
    return tensors, places


def _pack(places: Sequence[_Place], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The items with these tensors."""
    return tuple(
        [tensors[span] if kind is list else tensors[span.start] if kind is Tensor else kind for span, kind in places]
    )


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: tuple[Operator, tuple[Any, ...], list[_Place], list[_Place]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        operator, arguments, places, of_results = call
        output = operator.forward(*arguments)
        operator.save(ctx, as_saved(tensors), places, arguments, output)
        results, found = _spread(output if isinstance(output, tuple) else (output,))
        of_results += found
        ctx.operator, ctx.outputs = operator, of_results
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        flags = ctx.needs_input_grad[1:]
        needs = [any(flags[span]) for span, _ in ctx.places]
        return None, *ctx.operator.differentiate(ctx, needs, _pack(ctx.outputs, grad), direct=True)
