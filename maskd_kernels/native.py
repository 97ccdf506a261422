"""The compiled C++ kernels, loaded on first use. Says why they are missing."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType


class NativeUnavailableError(RuntimeError):
    """The C++ extension is not there or cannot be loaded."""


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        # torch first: its OpenMP runtime is then the one that the extension shares.
        importlib.import_module("torch")
        module = importlib.import_module("maskd_kernels._native")
    except ImportError as error:
        return (
            None,
            f"the C++ extension could not be loaded ({error}); it is built by `pip install` where a compiler is",
        )
    isa = os.environ.get("MASKD_KERNELS_ISA")
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
