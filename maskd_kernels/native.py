"""The compiled C++ kernels, loaded on first use. Says why they are missing."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.utils import deterministic
from torch.utils.dlpack import from_dlpack


class NativeUnavailableError(RuntimeError):
    """The C++ extension is not there or cannot be loaded."""


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        # After torch: its OpenMP runtime is then the one that the extension shares.
        module = importlib.import_module("maskd_kernels._native")
    except ImportError as error:
        return (
            None,
            f"the C++ extension could not be loaded ({error}); it is built by `pip install` where a compiler is",
        )
    isa = os.environ.get("MASKD_KERNELS_ISA")
    if isa and isa not in module.isas():
        raise ValueError(f"MASKD_KERNELS_ISA: expected one of {', '.join(module.isas())}, got {isa!r}")
    if isa:
        module.select_isa(isa)
    return module, None


def available() -> bool:
    """Whether the C++ kernels can be used."""
    return _load()[0] is not None


def why_unavailable() -> str | None:
    """The reason the C++ kernels cannot be used; None where they can."""
    return _load()[1]


def module() -> ModuleType:
    """The extension module.

    Raises:
        NativeUnavailableError: where it is missing, with the reason.
    """
    loaded, reason = _load()
    if loaded is None:
        raise NativeUnavailableError(reason)
    return loaded


# csrc/common.h, DType; integers in python/checks.h
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int64: 4}


def empty(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] = ()) -> Tensor:
    """An uninitialised dense CPU tensor, contiguous by default; a large one in memory kept from step to step.

    Idle memory never exceeds twice what was in use at one time; ``release_memory()`` returns it to the system.
    """
    tensor: Tensor = from_dlpack(module().new_tensor(shape, stride, DTYPE_CODES[dtype]))
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.fill_(math.nan)  # as torch.empty does
    return tensor


def address(x: Tensor | None) -> tuple[int, int, int]:
    """Contiguous memory as the extension takes it: address, dtype code, elements; zeros for none."""
    if x is None or x.numel() == 0:
        return 0, 0, 0
    if not x.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got {list(x.shape)} with strides {list(x.stride())}")
    return x.data_ptr(), DTYPE_CODES[x.dtype], x.numel()


def release_memory() -> None:
    """Returns the memory kept for gradients, as far as no tensor uses it, to the system."""
    if available():
        module().release_idle_memory()
