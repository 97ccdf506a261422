"""Where a forward may end once its tapped layers have run, learned from one that ran whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from maskd_kernels.distill.features import unwrap


class ForwardEnd(BaseException):
    """Ends a model's forward. No ``Exception``, so that models that catch those let it pass."""

    def __init__(self, owner: object) -> None:
        super().__init__("the forward has been ended where its last tapped layer had run")
        self.owner = owner


@dataclass
class Plan:
    """When the tapped layers have run.

    A layer that runs once has run when it ends. One that runs several times may run once more: what is awaited is the
    end of the innermost module that runs once and had all its runs in it.
    """

    runs: dict[str, int]  # of each tapped layer
    awaited: set[str]  # modules that must have ended
    cut: list[str]  # modules that would have ended later
    never: list[str]  # those of them that would have started later as well

    def spares_hooks(self, model: nn.Module) -> bool:
        """Whether no hook of others, before or after a forward, is in what is cut."""
        inner = unwrap(model)
        try:
            layers = [inner.get_submodule(name) for name in self.cut]
            unseen = [inner.get_submodule(name) for name in self.never]
        except AttributeError:  # a layer has been taken out since
            return False
        wrappers = []
        while model is not inner:
            wrappers.append(model)
            model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
        hooked = any(layer._forward_hooks or hasattr(layer, "_hf_hook") for layer in (*wrappers, *layers))
        hooked |= any(layer._forward_pre_hooks for layer in unseen)
        return not (hooked or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


@dataclass
class _ModuleCall:
    name: str
    inside: tuple[int, ...]  # numbers of the calls under way, outermost first
    start: int  # times are numbers of calls that have ended
    end: int | None = None


class Watch:
    """Every call of a module in one forward."""

    def __init__(self) -> None:
        self._calls: list[_ModuleCall] = []
        self._open: list[int] = []
        self._time = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks in all modules for the time of a forward."""
        with ExitStack() as hooks:
            for name, layer in unwrap(model).named_modules():
                hooks.enter_context(layer.register_forward_pre_hook(self._started(name)))
                hooks.enter_context(layer.register_forward_hook(self._ended(name)))
            yield

    def _started(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any) -> None:
            self._calls.append(_ModuleCall(name, tuple(self._open), self._time))
            self._open.append(len(self._calls) - 1)

        return note

    def _ended(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            while self._open:  # calls within that ended by an exception which the model caught
                call = self._calls[self._open.pop()]
                if call.name == name:
                    self._time += 1
                    call.end = self._time
                    return

        return note

    def plan(self, names: Sequence[str]) -> Plan | None:
        """When these layers have run; None: only at the end, or never."""
        times = Counter(call.name for call in self._calls)
        awaited: set[str] = set()
        last = 0
        for name in names:
            runs = [call for call in self._calls if call.name == name]
            awaited_call = runs[0] if len(runs) == 1 else self._around(runs, times)
            if awaited_call is None or not awaited_call.name or awaited_call.end is None:
                return None
            awaited.add(awaited_call.name)
            last = max(last, awaited_call.end)
        cut = dict.fromkeys(call.name for call in self._calls if call.end is None or call.end > last)
        never = dict.fromkeys(call.name for call in self._calls if call.start >= last)
        return Plan({name: times[name] for name in names}, awaited, list(cut), list(never))

    def _around(self, runs: list[_ModuleCall], times: Counter[str]) -> _ModuleCall | None:
        if not runs:
            return None
        shared = set(runs[0].inside).intersection(*(call.inside for call in runs))
        around = [self._calls[i] for i in sorted(shared, reverse=True)]
        return next((call for call in around if times[call.name] == 1), None)


def form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What decides which layers run, of a call's arguments: tensors by their axes and batch, flags, how many there are.

    Neither image sizes nor values, but for booleans and, as arguments themselves, whole numbers and strings. Of an
    image's annotations (a dict in a list), whose number is another in every call, tensors count by their axes alone.
    """
    flags = tuple(value if isinstance(value, (int, str)) else None for value in (*args, *kwargs.values()))
    return flags, tuple(_form(value) for value in args), tuple((key, _form(value)) for key, value in kwargs.items())


def _form(inputs: Any, annotation: bool = False) -> Hashable:
    if isinstance(inputs, Tensor):
        return inputs.dim(), inputs.shape[0] if inputs.dim() >= 3 and not annotation else None
    if isinstance(inputs, Mapping):
        return tuple((key, _form(value, annotation)) for key, value in inputs.items() if isinstance(key, Hashable))
    if isinstance(inputs, (list, tuple)):
        forms = tuple(_form(value, annotation or isinstance(value, Mapping)) for value in inputs)
        return forms if any(found is not None for found in forms) else None
    return inputs if isinstance(inputs, bool) else None
