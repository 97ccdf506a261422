"""Which implementation runs: ``auto`` picks by device, or one is forced for tests and comparisons."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import TracebackType

import torch

from maskd_kernels import native

BACKENDS = ("auto", "reference", "native", "triton")
OLDEST_TRITON = (3, 4)  # the first whose kernels take tuples: PyTorch 2.8's


class BackendUnavailableError(RuntimeError):
    """A backend was forced that cannot run here or cannot take these tensors."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = _checked(os.environ.get("MASKD_KERNELS_BACKEND", "auto"), "MASKD_KERNELS_BACKEND")


class use_backend:
    """Forces a backend from here on; as a context manager, until the block ends.

    Args:
        name: ``auto`` (CUDA tensors: triton; CPU tensors: native, else reference; anything else: reference),
            ``reference``, ``native`` or ``triton``.

    Raises:
        ValueError: for another name.

    Example:
        >>> import maskd_kernels
        >>> with maskd_kernels.use_backend("reference"):
        ...     maskd_kernels.current_backend()
        'reference'
    """

    def __init__(self, name: str) -> None:
        global _forced
        self._previous = _forced
        _forced = _checked(name, "backend")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous


def current_backend() -> str:
    """The backend that is forced, or ``auto``."""
    return _forced


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU (``TRITON_INTERPRET=1`` before the first use)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def why_no_triton(device_type: str) -> str | None:
    """The reason Triton cannot run on this device type; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"it runs on CUDA tensors, got {device_type} (on CPU only by its interpreter: TRITON_INTERPRET=1)"
    import triton  # only where it would run; the package that holds it has several names

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {'.'.join(map(str, OLDEST_TRITON))} or newer is needed, got {triton.__version__}"
    return None


def why_unavailable(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason a backend cannot take tensors of this device type and compute dtype; None where it can."""
    if name == "native":
        if device_type != "cpu":
            return f"it runs on CPU tensors, got {device_type}"
        return native.why_unavailable()
    if name == "triton":
        if dtype == torch.float64:
            return "it computes in float32, got float64 tensors"
        return why_no_triton(device_type)
    return None


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors on this device that are computed in this dtype.

    Raises:
        BackendUnavailableError: when a forced backend cannot run, with the reason.
    """
    if _forced != "auto":
        reason = why_unavailable(_forced, device.type, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"backend {_forced!r} was asked for but is unavailable: {reason}")
        return _forced
    preferred = {"cuda": "triton", "cpu": "native"}.get(device.type, "reference")
    return preferred if why_unavailable(preferred, device.type, dtype) is None else "reference"
