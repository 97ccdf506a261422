"""Running a model and keeping what its tapped layers put out, as they put it out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import map_tensors, tensors_in, unwrap


class _Kept(NamedTuple):
    """A tensor that a layer put out."""

    x: Tensor
    version: int | None  # of the tensor then; None: a copy, or not known
    copy: Tensor | None  # from then


class Recorder:
    """Runs one model, and records the outputs of some of its layers.

    Hooks are in the model only while it runs, so that it can be copied, pickled and exported at any other time. Layers
    inside ``torch.compile`` are the exception: compiled code keeps the hooks it was compiled with, and does not notice
    later ones.

    An in-place operation after a layer would change what has been recorded. The first forward in each mode (training
    or not) runs eagerly and with copies, and shows by the tensors' versions which ones change; from then on these alone
    are copied, and a change of any other is an error.

    Args:
        model: what will run.
        role: what it is, for messages.
        names: the layers, as ``named_modules`` of the unwrapped model spells them.
    """

    def __init__(self, model: nn.Module, role: str, names: Sequence[str]) -> None:
        self.role = role
        self.names = list(dict.fromkeys(names))
        self._records: dict[str, list[tuple[Any, list[_Kept]]]] | None = None  # of the forward under way
        self._copied: set[tuple[str, int]] = set()  # layer, number of the tensor in its output
        self._learned: set[bool] = set()
        self._learning = False
        self._handles: dict[str, Any] = {}
        self._attach(model, [name for name in self.names if inside_compiled(model, name)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _attach(self, model: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._handles:
                layer = unwrap(model).get_submodule(name)
                self._handles[name] = layer.register_forward_hook(_Hook(self, name))

    def remove(self, names: Sequence[str] | None = None) -> None:
        """Takes hooks out of the model: all, or those of some layers."""
        for name in list(self._handles) if names is None else names:
            self._handles.pop(name).remove()

    def run(
        self, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], learn: bool = False
    ) -> tuple[Any, dict[str, list[Any]]]:
        """The model's output, and what each layer put out, run by run.

        Raises:
            RuntimeError: an in-place operation changed a layer's output in this forward, and in none before.
        """
        compiled = [name for name in self.names if inside_compiled(model, name)]
        self._learning = learn or model.training not in self._learned
        self._records = {}
        self._attach(model, self.names)
        try:
            eager = bool(compiled) and self._learning
            with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
                output = model(*args, **kwargs)
            records = {name: [self._outcome(name, *run) for run in runs] for name, runs in self._records.items()}
        finally:
            self._records = None
            self.remove([name for name in self.names if name not in compiled])
        self._learned.add(model.training)
        return output, records

    def record(self, name: str, output: Any) -> None:
        """Called by the hooks."""
        records = self._records
        if records is None:  # somebody else's call, or an activation checkpoint that runs its layers again
            return
        kept = [self._kept(x, (name, i) in self._copied) for i, x in enumerate(tensors_in(output))]
        records.setdefault(name, []).append((output, kept))

    def _kept(self, x: Tensor, copied: bool) -> _Kept:
        if torch.compiler.is_compiling():
            return _Kept(x.clone() if copied else x, None, None)
        if x.is_inference():  # has no version, and autograd could not save it
            with torch.inference_mode(False):
                return _Kept(x.clone(), None, None)
        if copied:
            return _Kept(x.clone(), None, None)
        return _Kept(x, x._version, x.clone() if self._learning else None)

    def _outcome(self, name: str, output: Any, kept: list[_Kept]) -> Any:
        """A layer's output, with copies in place of tensors that have changed since."""
        found = []
        for i, (x, version, copy) in enumerate(kept):
            if version is not None and x._version != version:
                self._copied.add((name, i))
                if copy is None:
                    raise RuntimeError(
                        f"{self.role} {name!r}: an in-place operation after this layer changed its output, as in no "
                        "call before; what it put out is lost for this call, and copied in later ones (build() with "
                        "such inputs shows it beforehand)"
                    )
                x = copy
            found.append(x)
        remaining = iter(found)
        return map_tensors(output, lambda _: next(remaining))


class _Hook:
    """A forward hook. Whoever copies or pickles a model that has it gets, in its place, something that does nothing."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.recorder.record(self.name, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes any arguments, returns None, and loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


def inside_compiled(model: nn.Module, name: str) -> bool:
    """Whether a layer's hooks are compiled with something that contains it."""
    module: Any = model
    inner = unwrap(model)
    while module is not inner:
        if is_compiled(module):
            return True
        module = module.module
    for part in name.split(".") if name else []:
        if is_compiled(module):
            return True
        module = getattr(module, part)
    return module._compiled_call_impl is not None


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has this very module."""
    return isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None
