"""What the registration of every operator with autograd shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register_gradient(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Autograd for an operator that has a second one, ``{name}_backward``, as its gradient; it ends there."""

    def second_derivative(ctx: Any, *grad: Any) -> None:
        raise NotImplementedError(f"{name}: second derivatives are not implemented")

    torch.library.register_autograd(f"maskd_kernels::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"maskd_kernels::{name}_backward", second_derivative)
