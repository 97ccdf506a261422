"""Running a model and keeping what its tapped layers put out, as they put it out."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import map_tensors, tensors_in, unwrap
from maskd_kernels.distill.stopping import ForwardEnd, Plan, Watch, form, sizes

_ENDED: Any = object()
_PLANS = 64  # forms of inputs that are remembered
_SIZES = 8  # of one form, in which a model runs whole to see that the size does not decide how often layers run


class _EndNotBorneError(Exception):
    """A model failed because its forward was ended."""


class _Kept(NamedTuple):
    """A tensor that a layer put out."""

    x: Tensor
    version: int | None  # of the tensor then; None: a copy, or not known
    copy: Tensor | None  # from then


class _FormPlan(NamedTuple):
    """Of one form of inputs."""

    plan: Plan | None
    sizes: set[Hashable]  # that it has been seen to hold for


class Recorder:
    """Runs one model, and records the outputs of some of its layers.

    Hooks are in the model only while it runs, so that it can be copied, pickled and exported at any other time. Layers
    inside ``torch.compile`` are the exception: compiled code keeps the hooks it was compiled with, and does not notice
    later ones.

    An in-place operation after a layer would change what has been recorded. The first forward in each mode (training
    or not) runs eagerly and with copies, and shows by the tensors' versions which ones change; from then on these alone
    are copied, and a change of any other is an error.

    Where the output is not wanted, the forward ends as soon as the layers have run. How often each does is learned, for
    each form of inputs, in a forward that runs whole, and seen again in the first one of each other image size, up to
    eight; where one of them or a later forward finds it otherwise, all later ones run whole.

    Forwards of the model in other threads are none of its business.

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
        self._learned: set[tuple[bool, bool]] = set()  # training; inference mode, which shows no change of a tensor
        self._learning = False
        self._plans: dict[tuple[bool, Hashable], _FormPlan] = {}
        self._thread = 0  # of the forward under way
        self._plan: Plan | None = None  # of the forward under way
        self._awaited: set[str] = set()
        self._ended = False
        self._whole = False  # for good
        self._handles: dict[str, Any] = {}
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(f"{role}: DataParallel splits features over devices; use DistributedDataParallel")
        self._attach(model, [name for name in self.names if inside_compiled(model, name)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_records": None}

    def _attach(self, model: nn.Module, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._handles:
                layer = unwrap(model).get_submodule(name)
                self._handles[name] = layer.register_forward_hook(_Hook(self, name))

    def _detach(self, model: nn.Module) -> None:
        for name in [name for name in self._handles if not inside_compiled(model, name)]:
            self._handles.pop(name).remove()

    def remove(self) -> None:
        """Takes the hooks of compiled layers out of the model."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def run(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        *,
        learn: bool = False,
        output: bool = True,
    ) -> tuple[Any, dict[str, list[Any]]]:
        """The model's output, and what each layer put out, run by run.

        Args:
            model: the model.
            args: its arguments.
            kwargs: its keywords.
            learn: learn anew how often layers run, and what is changed in place.
            output: whether the output is wanted; else the forward may end early, and None stands for it.

        Raises:
            RuntimeError: an in-place operation changed a layer's output in this forward, and in none before.
        """
        mode = (model.training, torch.is_inference_mode_enabled())
        learn = learn or mode not in self._learned
        key, size = (model.training, form(args, kwargs)), sizes(args, kwargs)
        ends = not output and not self._runs_whole(model)
        watch = Watch() if ends and (learn or not self._planned(key, size)) else None
        plan = self._plans[key].plan if ends and watch is None else None
        if plan is not None and not plan.spares_hooks(model):
            plan = None
        self._records, self._learning, self._ended, self._thread = {}, learn, False, threading.get_ident()
        self._plan, self._awaited = plan, set(plan.awaited) if plan is not None else set()
        try:
            result = self._forward(model, args, kwargs, watch)
            records = {name: [self._outcome(name, *run) for run in runs] for name, runs in self._records.items()}
        except _EndNotBorneError:
            self._whole = True
            return self.run(model, args, kwargs, learn=learn, output=output)
        finally:
            self._records, self._plan = None, None
        self._learned.add(mode)
        if watch is not None:
            self._plan_for(key, size, watch.plan(self.names), anew=learn)
        if plan is not None and result is not _ENDED:  # layers ran more or less often, or it caught the end
            self._whole = True
        return (None if result is _ENDED else result), records

    def _planned(self, key: tuple[bool, Hashable], size: Hashable) -> bool:
        if key not in self._plans:
            return False
        plan, seen = self._plans[key]
        return plan is None or size in seen or len(seen) >= _SIZES

    def _plan_for(self, key: tuple[bool, Hashable], size: Hashable, plan: Plan | None, anew: bool) -> None:
        if anew or key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = _FormPlan(plan, {size})
            return
        before, seen = self._plans[key]
        seen.add(size)
        if before is None or plan is None or (plan.runs, plan.awaited) != (before.runs, before.awaited):
            self._whole = True

    def _runs_whole(self, model: nn.Module) -> bool:
        """Whether it cannot end early. Hooks that are compiled would have to end compiled code."""
        compiled = next((name for name in self.names if inside_compiled(model, name)), None)
        if compiled is not None and not self._whole:
            self._whole = True
            warnings.warn(
                f"{self.role}: under torch.compile it runs whole, as {compiled!r} is inside. To have it end after its "
                "last tap, compile what is read alone (model.backbone = torch.compile(model.backbone)) and tap that",
                stacklevel=3,
            )
        return self._whole

    def _forward(self, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], watch: Watch | None) -> Any:
        """The model's output, or _ENDED, with hooks in it for the time of the forward."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._detach, model)
            self._attach(model, self.names)
            for name in self._awaited.difference(self.names):
                layer = unwrap(model).get_submodule(name)
                stack.enter_context(layer.register_forward_hook(lambda *_, name=name: self._ran(name)))
            if watch is not None:
                stack.enter_context(watch.watching(model))
            if (watch is not None or self._learning) and any(is_compiled(module) for module in model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                return model(*args, **kwargs)
            except ForwardEnd as end:
                if end.owner is not self:
                    raise
                return _ENDED
            except Exception as error:
                if self._ended:
                    raise _EndNotBorneError from error
                raise

    def record(self, name: str, output: Any) -> None:
        """Called by the hooks."""
        records = self._records
        if records is None or self._ended or self._elsewhere():  # or a checkpoint that runs its layers again
            return
        if not torch.compiler.is_compiling():
            output = map_tensors(output, lambda x: x)  # the model may change the list or dict itself
        kept = [self._kept(x, (name, i) in self._copied) for i, x in enumerate(tensors_in(output))]
        records.setdefault(name, []).append((output, kept))
        if self._plan is not None:
            self._ran(name)

    def _elsewhere(self) -> bool:
        """Whether this is somebody else's forward, in another thread."""
        return not torch.compiler.is_compiling() and threading.get_ident() != self._thread

    def _ran(self, name: str) -> None:
        if self._elsewhere():
            return
        self._awaited.discard(name)
        plan, records = self._plan, self._records
        if plan is None or records is None or self._awaited or self._ended:
            return
        if all(len(records.get(tapped, ())) == runs for tapped, runs in plan.runs.items()):
            self._ended = True
            raise ForwardEnd(self)

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
            # What changes memory and no version (x.data, other libraries) shows by the values, while they are copied.
            if version is not None and (x._version != version or (copy is not None and not torch.equal(x, copy))):
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
