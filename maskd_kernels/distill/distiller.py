"""Distilling one model into another, whatever they are, by losses between their layers."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable loads the whole compiler
from torch.nn import functional as F

from maskd_kernels.distill.features import kind
from maskd_kernels.distill.recording import Recorder
from maskd_kernels.distill.taps import Layer, Tap, image_size
from maskd_kernels.distill.teacher import FrozenTeacher, as_call, cast_to
from maskd_kernels.validation import check_module

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}


class _Pair(NamedTuple):
    """A tap in these two models."""

    label: str
    student: Layer
    teacher: Layer


class _Call(NamedTuple):
    """What one call has recorded of both models."""

    student: dict[str, list[Any]]
    teacher: dict[str, list[Any]]
    student_size: tuple[int, int] | None
    teacher_size: tuple[int, int] | None


class Distiller(FrozenTeacher):
    """Runs the student and the teacher on the same input and computes the losses between their layers.

    The student's output comes back untouched, beside a dict of named, weighted losses to add to the task loss. The
    teacher runs in eval mode and without gradients, whatever mode the distiller is in; it is moved with the distiller
    but is no part of its ``state_dict()`` and parameters. Works under autocast and with models under ``torch.compile``
    (compiling the distiller itself compiles its losses alone).
    For several processes wrap the distiller: ``DistributedDataParallel(Distiller(student, ...))``, or ``fully_shard``
    the student's blocks, then the distiller. It can be copied and pickled, with copies of both models; the models
    themselves carry nothing of it between calls (under ``torch.compile``: hooks, which copies of them lose). A tap gets
    what its layer put out, whatever in-place operations follow. As a context manager it lets go of both models at the
    end.

    Args:
        student: the model to train.
        teacher: the model to learn from.
        taps: the losses: a Tap or several.
        example_inputs: for one forward of both models, in eval mode and without gradients, that shows the channels to
            align, and whether the losses take the features: a tuple of arguments, a dict of keywords, or the one
            argument (a tensor, a list of images). Without them the aligns are built in the first call; the optimizer
            must then be made after it. (``trainable_parameters`` refuses before.)
        teacher_inputs: called with the arguments of a call, returns the teacher's, as ``example_inputs``: another
            resolution, a batch's images alone, images without augmentation. None: the student's. Either way, floating
            inputs are cast to the dtype of a teacher in bfloat16 or float16.
        teacher_output: whether the teacher runs whole, and its output is kept in ``distiller.teacher_output``. Off: its
            forward ends as soon as every tapped layer has run, without heads and whatever else follows.

    How often a layer of the teacher runs is learned in a first, whole forward for each form of inputs (batch size,
    number of images, flags), and checked in one for each of the first eight image sizes. The teacher runs whole where
    the end would cut off forward hooks of others, where a tapped layer is inside ``torch.compile`` (a warning says so),
    and for good once a layer has run more or less often.

    Raises:
        ValueError: no layer of that name (the message lists near ones), two taps of one name, no taps; features that
            do not fit, with the tap's name and both shapes; a student in ``DistributedDataParallel`` where aligns or
            losses have parameters to train, which it would not synchronise.
        TypeError: taps that are none; features that a loss cannot take.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_kernels import Distiller, MasKDLoss, Tap
        >>> student, teacher = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Conv2d(3, 16, 3))
        >>> image = torch.randn(2, 3, 32, 32)
        >>> distiller = Distiller(student, teacher, [Tap("0", "0", MasKDLoss(16))], example_inputs=(image,))
        >>> optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.1)
        >>> output, losses = distiller(image)
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: Tap | Sequence[Tap],
        *,
        example_inputs: Any = None,
        teacher_inputs: Callable[..., Any] | None = None,
        teacher_output: bool = False,
    ) -> None:
        check_module(student, "student")
        if teacher_inputs is not None and not callable(teacher_inputs):
            raise TypeError(f"teacher_inputs: expected a function of a call's arguments, got {kind(teacher_inputs)}")
        super().__init__(teacher)
        self.student = student
        self.taps = _checked_taps(taps)
        self.teacher_inputs = teacher_inputs
        self.teacher_output: Any = None
        self._keeps_teacher_output = teacher_output
        self._pairs = [_resolved(tap, student, teacher) for tap in self.taps]
        labels = [pair.label for pair in self._pairs]
        if len(set(labels)) != len(labels):
            raise ValueError(f"taps: expected different names, got {', '.join(labels)}; set Tap(name=...)")
        self.losses = nn.ModuleList(tap.loss for tap in self.taps if isinstance(tap.loss, nn.Module))
        self.aligns = nn.ModuleList(_given_align(tap) for tap in self.taps)
        self.raw_losses: dict[str, Tensor] = {}
        self._built = not any(tap.builds_align for tap in self.taps)
        self._removed = False
        self._shards_checked = False
        self._gradient_checked = False
        self._refuse_wrapped_student()
        with self._teacher_in_eval():
            pass
        student_names = [name for pair in self._pairs for name in pair.student.names]
        teacher_names = [name for pair in self._pairs for name in pair.teacher.names]
        self._student_recorder = Recorder(student, "student", student_names)
        self._teacher_recorder = Recorder(teacher, "teacher", teacher_names)
        if example_inputs is not None:
            args, kwargs = as_call(example_inputs)
            self.build(*args, **kwargs)

    def train(self, mode: bool = True) -> Distiller:
        """Sets the mode of student and losses; the teacher stays in eval mode."""
        self.teacher.eval()
        super().train(mode)  # after it, for modules that are the student's as well
        return self

    @contextmanager
    def _teacher_in_eval(self) -> Iterator[None]:
        """The teacher in eval mode; modules that are the student's as well return to theirs."""
        student = set(self.student.modules())
        modes = [(module, module.training) for module in self.teacher.modules() if module in student]
        self.teacher.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def build(self, *args: Any, **kwargs: Any) -> None:
        """Runs both models once, in eval mode and without gradients, and builds the aligns that are due.

        Raises:
            ValueError, TypeError, RuntimeError: as a call would, for features that do not fit each other or the loss.
        """
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        try:
            _, call = self._run(args, kwargs, learn=True)
        finally:
            for module, mode in modes:
                module.training = mode
        self._build(call)
        for i, tap in enumerate(self.taps):
            student, teacher, single = self._fitted(i, call)
            with torch.enable_grad(), _without_traces(tap.loss, teacher[0].device) as loss:
                self._loss(i, loss, [s.detach().requires_grad_() for s in student], teacher, single, gradient=True)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer needs: the parameters of student, aligns and losses that require gradients.

        Raises:
            RuntimeError: aligns are not built yet.
        """
        if not self._built:
            raise RuntimeError(
                "trainable_parameters: the aligns are not built yet; give Distiller example_inputs, or call "
                "distiller.build(input) first"
            )
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Both models on the same input.

        Returns:
            The student's own output, and the losses by name, each times its weight. The values before weighting
            lie, detached, in ``raw_losses`` afterwards.

        Raises:
            RuntimeError: a layer did not run, its output was changed in place as in no call before, or the distiller
                has let go of its models.
            ValueError: features that do not fit: level counts, channels or sizes, with both shapes; in the first call,
                a student under ``fully_shard`` where aligns or losses have parameters to train and are not.
            TypeError: a layer that puts out no features.
        """
        if not self._shards_checked:
            self._refuse_sharded_student()
            self._shards_checked = True
        output, call = self._run(args, kwargs)
        if not self._built:
            self._build_late(call)
        if torch.is_grad_enabled() and not self._gradient_checked:
            self._warn_of_no_gradient(call)
            self._gradient_checked = True
        losses: dict[str, Tensor] = {}
        raw: dict[str, Tensor] = {}
        for i, (tap, pair) in enumerate(zip(self.taps, self._pairs, strict=True)):
            value = self._loss(i, tap.loss, *self._fitted(i, call))
            raw[pair.label] = value.detach()
            losses[pair.label] = value * tap.weight
        self.raw_losses = raw
        return output, losses

    @_disable_dynamo
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], learn: bool = False) -> tuple[Any, _Call]:
        if self._removed:
            raise RuntimeError("the distiller's hooks have been removed; make a new Distiller")
        own = (args, kwargs) if self.teacher_inputs is None else as_call(self.teacher_inputs(*args, **kwargs))
        teacher_args, teacher_kwargs = cast_to(self.teacher, own)
        with torch.no_grad(), self._teacher_in_eval():
            teacher_output, teacher = self._teacher_recorder.run(
                self.teacher, teacher_args, teacher_kwargs, learn=learn, output=self._keeps_teacher_output
            )
        self.teacher_output = teacher_output if self._keeps_teacher_output else None
        output, student = self._student_recorder.run(self.student, args, kwargs, learn=learn)
        return output, _Call(student, teacher, image_size((args, kwargs)), image_size((teacher_args, teacher_kwargs)))

    def _features(self, tap_index: int, call: _Call) -> tuple[list[Tensor], list[Tensor], bool]:
        """Both sides' levels, not yet aligned, and whether they are tensors rather than lists."""
        label, student_layer, teacher_layer = self._pairs[tap_index]
        student = student_layer.features(call.student, call.student_size, "student")
        teacher = teacher_layer.features(call.teacher, call.teacher_size, "teacher")
        if len(student.levels) != len(teacher.levels):
            raise ValueError(
                f"{label}: expected as many levels from the student as from the teacher, got {len(student.levels)} "
                f"and {len(teacher.levels)}: {_shapes(student.levels)} and {_shapes(teacher.levels)}; "
                "Tap(levels=...) chooses"
            )
        if student.keys and teacher.keys and student.keys != teacher.keys:
            raise ValueError(
                f"{label}: expected the same keys from student and teacher, got {', '.join(student.keys)} and "
                f"{', '.join(teacher.keys)}; Tap(levels=...) chooses"
            )
        return student.levels, teacher.levels, student.single and teacher.single

    def _fitted(self, tap_index: int, call: _Call) -> tuple[list[Tensor], list[Tensor], bool]:
        """Both sides' levels as the loss gets them."""
        student, teacher, single = self._features(tap_index, call)
        aligns = self.aligns[tap_index]
        assert isinstance(aligns, nn.ModuleList)
        if len(aligns) not in (0, len(student)):
            label = self._pairs[tap_index].label
            raise ValueError(f"{label}: expected {len(student)} align module(s), one per level, got {len(aligns)}")
        pairs = enumerate(zip(student, teacher, strict=True))
        return [self._fit(tap_index, level, s, t) for level, (s, t) in pairs], teacher, single

    def _fit(self, tap_index: int, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        tap, pair, aligns = self.taps[tap_index], self._pairs[tap_index], self.aligns[tap_index]
        label = f"{pair.label}[{level}]"
        if student.dim() != teacher.dim():
            hint = "; a grid makes maps of token sequences" if 3 in (student.dim(), teacher.dim()) else ""
            shapes = f"{kind(student)} and {kind(teacher)}"
            raise ValueError(f"{label}: expected features [N, C, *spatial] of as many axes, got {shapes}{hint}")
        before = student
        if len(aligns):  # type: ignore[arg-type]
            student = aligns[level](student)  # type: ignore[index]
        shapes = f"{kind(student)} and {kind(teacher)}"
        if student is not before:
            shapes += f" ({kind(before)} before align)"
        by_loss = tap.align is None or (tap.align == "auto" and not tap.builds_align)
        if student.shape[1] != teacher.shape[1] and not by_loss:
            raise ValueError(f"{label}: expected the teacher's channels after align, got {shapes}")
        if student.shape[2:] == teacher.shape[2:]:
            return student
        if student.dim() == 3 and -1 in (pair.student.channel_dim, pair.teacher.channel_dim):
            raise ValueError(
                f"{label}: expected token sequences of one length, got {shapes}; Tap(grid=..., prefix_tokens=...) "
                "makes maps of them, which Tap(resize=True) can interpolate"
            )
        if not tap.resize:
            raise ValueError(
                f"{label}: expected features of one size, got {shapes}; Tap(resize=True) interpolates the student's"
            )
        return F.interpolate(student, size=teacher.shape[2:], mode=_INTERPOLATION[student.dim()], align_corners=False)

    def _loss(
        self,
        tap_index: int,
        loss: Callable[..., Tensor],
        student: list[Tensor],
        teacher: list[Tensor],
        single: bool,
        gradient: bool = False,
    ) -> Tensor:
        """The loss's value, its gradient tried; its complaints get the tap's name, both shapes, dtypes that differ."""
        try:
            value = loss(student[0], teacher[0]) if single else loss(student, teacher)
            if not isinstance(value, Tensor):
                raise TypeError(f"expected a tensor of it, got {kind(value)}")
            if gradient and value.requires_grad:
                torch.autograd.grad(value.sum(), student, allow_unused=True)
            return value
        except (ValueError, TypeError, RuntimeError) as error:
            if type(error) not in (ValueError, TypeError, RuntimeError):  # out of memory, for one
                raise
            shapes = f"{_shapes(student)} and {_shapes(teacher)}"
            if student[0].dtype != teacher[0].dtype:
                shapes += f" of {student[0].dtype} and {teacher[0].dtype}"
            raise type(error)(f"{self._pairs[tap_index].label}: the loss cannot take {shapes}: {error}") from error

    def _build(self, call: _Call) -> list[str]:
        """Builds the aligns of all ``auto`` taps; names those that were due."""
        if self._built:
            return []
        built = []
        for i, tap in enumerate(self.taps):
            if not tap.builds_align:
                continue
            student, teacher, _ = self._features(i, call)
            convolutions = nn.ModuleList()
            for s, t in zip(student, teacher, strict=True):
                if s.shape[1] == t.shape[1] or s.dim() != t.dim() or s.dim() not in _CONVOLUTIONS:
                    convolutions.append(nn.Identity())
                    continue
                dtype = next((p.dtype for p in self.student.parameters() if p.is_floating_point()), s.dtype)
                with torch.inference_mode(False):  # else it could never train
                    convolution = _CONVOLUTIONS[s.dim()](s.shape[1], t.shape[1], kernel_size=1)
                    convolutions.append(convolution.to(device=s.device, dtype=dtype))
                built.append(f"{self._pairs[i].label} {s.shape[1]} to {t.shape[1]} channels")
            self.aligns[i] = convolutions
        self._built = True
        self._refuse_wrapped_student()
        return built

    def _build_late(self, call: _Call) -> None:
        built = self._build(call)
        if not built:
            return
        what = f"aligns were built in the first call ({'; '.join(built)})"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(f"{what}, too late for DDP; give Distiller example_inputs before wrapping it")
        warnings.warn(
            f"{what}; make the optimizer from trainable_parameters() after it, or give Distiller example_inputs",
            stacklevel=3,
        )

    def _warn_of_no_gradient(self, call: _Call) -> None:
        if not any(p.requires_grad for p in self.student.parameters()):
            return
        for i, pair in enumerate(self._pairs):
            student, _, _ = self._features(i, call)
            if not any(s.requires_grad for s in student):
                warnings.warn(
                    f"{pair.label}: the student's features have no gradient, so that this loss trains nothing of it: "
                    "all layers before are frozen, or they run in a checkpoint with use_reentrant=True (use False)",
                    stacklevel=3,
                )

    def _refuse_wrapped_student(self) -> None:
        parameters = [*self.aligns.parameters(), *self.losses.parameters()]
        wrapped = isinstance(self.student, nn.parallel.DistributedDataParallel)
        if wrapped and any(p.requires_grad for p in parameters):
            raise ValueError(
                "student: a DistributedDataParallel does not synchronise the parameters of aligns and losses; wrap the "
                "distiller instead: DistributedDataParallel(Distiller(student, ...))"
            )

    def _refuse_sharded_student(self) -> None:
        # Whoever has sharded a model has imported this; nobody else need pay for it.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        sharded: Any = getattr(fsdp, "FSDPModule", ())
        if isinstance(self, sharded) or not any(isinstance(module, sharded) for module in self.student.modules()):
            return
        parameters = [*self.aligns.parameters(), *self.losses.parameters()]
        if any(p.requires_grad and not hasattr(p, "full_tensor") for p in parameters):
            raise ValueError(
                "student: fully_shard does not synchronise the parameters of aligns and losses; shard the distiller "
                "too: fully_shard(distiller)"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if not self._built and any(key.startswith(f"{prefix}aligns.") for key in state_dict):
            raise RuntimeError(
                "load_state_dict: the aligns are not built yet; give Distiller example_inputs, or call "
                "distiller.build(input) first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def remove(self) -> None:
        """Lets go of both models, compiled ones included; the distiller cannot be called any more."""
        self._student_recorder.remove()
        self._teacher_recorder.remove()
        self._removed = True


def _checked_taps(taps: Any) -> list[Tap]:
    found = [taps] if isinstance(taps, Tap) else list(taps) if isinstance(taps, Iterable) else taps
    if not isinstance(found, list):
        raise TypeError(f"taps: expected a Tap or several, got {type(taps).__name__}")
    for i, tap in enumerate(found):
        if not isinstance(tap, Tap):
            raise TypeError(f"taps[{i}]: expected a Tap(student, teacher, loss), got {type(tap).__name__}")
    if not found:
        raise ValueError("taps: expected at least one Tap, got none")
    return found


def _resolved(tap: Tap, student: nn.Module, teacher: nn.Module) -> _Pair:
    layer = tap.side(tap.student).resolved(student, "student")
    label = tap.name or ", ".join(layer.names) or "output"
    return _Pair(label, layer, tap.side(tap.teacher).resolved(teacher, "teacher"))


def _given_align(tap: Tap) -> nn.ModuleList:
    if isinstance(tap.align, nn.Module) and not isinstance(tap.align, nn.ModuleList):
        return nn.ModuleList([tap.align])
    if tap.align is None or isinstance(tap.align, str):
        return nn.ModuleList()
    return nn.ModuleList(tap.align)


def _shapes(levels: Sequence[Tensor]) -> str:
    return ", ".join(kind(x) for x in levels)


@contextmanager
def _without_traces(loss: Callable[..., Tensor], device: torch.device) -> Iterator[Callable[..., Tensor]]:
    """A copy of the loss to try it with: neither its buffers nor random numbers will be others afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield copy.deepcopy(loss)
