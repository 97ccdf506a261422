"""How every operator reaches PyTorch: through its dispatcher for whatever traces or transforms, else directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def is_eager() -> bool:
    """Whether nothing traces, transforms or watches what is called."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may run outside the dispatcher: eagerly, and on memory."""
    if not is_eager() or tensors[0].is_meta:
        return False
    # Negated views hold the opposite of their values in memory.
    return all([(type(x) is Tensor or type(x) is torch.nn.Parameter) and not x.is_neg() for x in tensors])


class Operator:
    """An operator of ``maskd_kernels`` with a second one, ``{name}_backward``, as its gradient; it ends there.

    Arguments are tensors, lists of tensors, and settings; results are one tensor, a list, or a tuple of both. On the
    way through PyTorch's dispatcher and back, forward and backward, a call loses a quarter of a millisecond, which is
    what a small map takes altogether; in eager mode the kernels are therefore called without it.

    Args:
        name: as registered with ``torch.library``.
        forward: the implementation.
        backward: the implementation of ``{name}_backward``.
        setup_context: ``(ctx, inputs, output)``, as ``torch.library.register_autograd`` takes it.
        autograd: ``(ctx, *grad)`` gives one gradient, or list of gradients, per argument; ``ctx.needs`` holds for each
            argument whether one is wanted, and ``ctx.run_backward`` calls ``{name}_backward``.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        setup_context: Callable[..., None],
        autograd: Callable[..., Any],
    ) -> None:
        self.name, self.forward, self.backward = name, forward, backward
        self.setup_context, self.autograd = setup_context, autograd
        self._function: Any = type(f"maskd_kernels_{name}", (_Direct,), {})  # the name of the node in the graph

        def traced(ctx: Any, *grad: Any) -> Any:
            ctx.needs = [any(n) if isinstance(n, (list, tuple)) else n for n in ctx.needs_input_grad]
            ctx.run_backward = _registered(f"{name}_backward")
            return autograd(ctx, *grad)

        def second_derivative(ctx: Any, *grad: Any) -> None:
            raise NotImplementedError(f"{name}: second derivatives are not implemented")

        torch.library.impl(f"maskd_kernels::{name}", "CompositeExplicitAutograd", forward)
        torch.library.impl(f"maskd_kernels::{name}_backward", "CompositeExplicitAutograd", backward)
        torch.library.register_autograd(f"maskd_kernels::{name}", traced, setup_context=setup_context)
        torch.library.register_autograd(f"maskd_kernels::{name}_backward", second_derivative)

    def __call__(self, *arguments: Any) -> Any:
        """The operator's result, differentiable."""
        tensors = _flatten(arguments)
        if not is_plain(tensors):
            return _registered(self.name)(*arguments)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.forward(*arguments)
        structure: list[Any] = []
        outputs = iter(self._function.apply(self, arguments, structure, *tensors))
        return _pack(structure[0], outputs)


def _registered(name: str) -> Any:
    return getattr(torch.ops.maskd_kernels, name)


def _flatten(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    return [x for item in nested for x in _flatten(item)] if isinstance(nested, (list, tuple)) else []


def _structure_of(nested: Any) -> Any:
    return None if isinstance(nested, Tensor) else type(nested)(map(_structure_of, nested))


def _pack(structure: Any, tensors: Iterator[Any]) -> Any:
    return next(tensors) if structure is None else type(structure)(_pack(item, tensors) for item in structure)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Operator, arguments: tuple[Any, ...], structure: list[Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        output = operator.forward(*arguments)
        operator.setup_context(ctx, arguments, output)
        structure.append(_structure_of(output))
        ctx.operator, ctx.structure = operator, structure[0]
        ctx.sizes = [len(_flatten(x)) for x in arguments]
        return tuple(_flatten(output))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        flags = iter(ctx.needs_input_grad[3:])
        ctx.needs = [any(list(islice(flags, size))) for size in ctx.sizes]
        operator, packed = ctx.operator, _pack(ctx.structure, iter(grad))
        # Under create_graph the operator runs, which says that it has no derivative.
        traced = torch.is_grad_enabled()
        ctx.run_backward = _registered(f"{operator.name}_backward") if traced else operator.backward
        gradients = operator.autograd(ctx, *packed) if isinstance(packed, tuple) else operator.autograd(ctx, packed)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        flat: list[Any] = [None, None, None]
        for gradient, size in zip(gradients, ctx.sizes, strict=True):
            if size:
                flat += gradient if isinstance(gradient, (list, tuple)) else [gradient]
        return tuple(flat)
