"""Which implementation runs: ``auto`` picks by device, or one is forced for tests and comparisons."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import weakref
from contextvars import ContextVar
from types import TracebackType

import torch

from maskd_kernels import native

BACKENDS = ("auto", "reference", "native", "triton")
OLDEST_TRITON = (3, 4)  # the first whose kernels take tuples: PyTorch 2.8's

TRITON_IMAGES = 65535  # of a batch, at most: CUDA's limit on the second axis of a grid


class BackendUnavailableError(RuntimeError):
    """A backend was forced that cannot run here or cannot take these tensors."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_from_environment = os.environ.get("MASKD_KERNELS_BACKEND", "auto")  # checked when used: importing raises nothing
_of_block: ContextVar[str | None] = ContextVar("maskd_kernels_backend", default=None)
# The process's default is the last one's name. A `with` block takes its own back, in whatever order blocks overlap.
_calls: list[tuple[str, weakref.ref[use_backend]]] = []
_changing_calls = threading.Lock()


class use_backend:
    """Forces a backend for the whole process; as a context manager, for the block and its own thread or task alone.

    A backward uses the backend of its forward, wherever it runs; compiled code takes the one that is set when it runs.
    Second derivatives, forward-mode AD and functorch's transforms are the reference's, whatever is forced.

    Args:
        name: ``auto`` (CUDA tensors: triton, but float64 and batches of more than 65535 images reference; CPU
            tensors: native, else reference; anything else: reference), ``reference``, ``native`` or ``triton``.

    Raises:
        ValueError: for another name.

    Example:
        >>> import maskd_kernels
        >>> with maskd_kernels.use_backend("reference"):
        ...     maskd_kernels.current_backend()
        'reference'
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "backend")
        self._outer: list[str | None] = []
        with _changing_calls:
            # Who is gone enters no block any more: what was set before it never comes back.
            final = [i for i, (_, call) in enumerate(_calls) if call() is None]
            del _calls[: final[-1] if final else 0]
            _calls.append((name, weakref.ref(self)))

    def __enter__(self) -> use_backend:
        with _changing_calls:
            _calls[:] = [entry for entry in _calls if entry[1]() is not self]
        self._outer.append(_of_block.get())
        _of_block.set(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _of_block.set(self._outer.pop())


class running:
    """This backend for the block, which calls nothing of the user's: how a backward follows its forward."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._before = _of_block.set(self._name)

    def __exit__(self, *_: object) -> None:
        _of_block.reset(self._before)


def current_backend() -> str:
    """The backend that is forced, or ``auto``.

    Raises:
        ValueError: ``MASKD_KERNELS_BACKEND`` names none.
    """
    forced = _of_block.get()
    if forced is not None:
        return forced
    calls = _calls[-1:]  # at once: another thread may empty it
    return calls[0][0] if calls else _checked(_from_environment, "MASKD_KERNELS_BACKEND")


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


def why_unavailable(name: str, device_type: str, dtype: torch.dtype, images: int = 1) -> str | None:
    """The reason a backend cannot take batches of this device type, compute dtype and size; None where it can."""
    if name == "native":
        if device_type != "cpu":
            return f"it runs on CPU tensors, got {device_type}"
        return native.why_unavailable()
    if name == "triton":
        if dtype == torch.float64:
            return "it computes in float32, got float64 tensors"
        if images > TRITON_IMAGES:
            return f"it takes batches of at most {TRITON_IMAGES} images, got {images}"
        return why_no_triton(device_type)
    return None


def resolve(device: torch.device, dtype: torch.dtype, asked: str | None = None, images: int = 1) -> str:
    """The backend for tensors on this device that are computed in this dtype.

    Args:
        device: of the tensors.
        dtype: of the computation, or of the features: float64 alone makes a difference.
        asked: what ``current_backend()`` was when the call began; None: what it is now.
        images: in the batch.

    Raises:
        BackendUnavailableError: when a forced backend cannot run, with the reason.
    """
    return _resolved(asked or current_backend(), device, dtype, images if images > TRITON_IMAGES else 1)


@functools.cache  # every call pays for this
def _resolved(asked: str, device: torch.device, dtype: torch.dtype, images: int) -> str:
    if asked != "auto":
        reason = why_unavailable(asked, device.type, dtype, images)
        if reason is not None:
            raise BackendUnavailableError(f"backend {asked!r} was asked for but is unavailable: {reason}")
        return asked
    preferred = {"cuda": "triton", "cpu": "native"}.get(device.type, "reference")
    return preferred if why_unavailable(preferred, device.type, dtype, images) is None else "reference"
