"""Distilling one model into another, whatever they are, by losses between their layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskd_kernels.distill.features import FrozenTeacher, as_levels, find_layer

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass
class Tap:
    """One loss between a layer of the student and a layer of the teacher.

    Args:
        student: the layer's name, as ``named_modules`` spells it (``"backbone.fpn"``).
        teacher: likewise.
        loss: called with the student's and the teacher's features; modules and functions alike. It gets tensors where
            the layer puts out a tensor, else lists of them (one per level).
        align: ``"auto"`` builds a 1x1 convolution for each level whose channels differ; None: nothing is aligned;
            or a module of yours (a list of them, one per level).
        name: the loss's name in the results; the student's layer by default.
        weight: factor on the loss.
        resize: whether student features of another size are interpolated to the teacher's. Off: an error.
        channel_dim: 1, or -1 for ``[N, *spatial, C]`` (token sequences); losses always get ``[N, C, *spatial]``.

    A layer that runs several times in one forward (a head shared by the levels) counts as a list of levels.
    """

    student: str
    teacher: str
    loss: Callable[..., Tensor]
    align: str | nn.Module | Sequence[nn.Module] | None = "auto"
    name: str | None = None
    weight: float = 1.0
    resize: bool = False
    channel_dim: int = 1
    label: str = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"loss: expected a module or function, got {type(self.loss).__name__}")
        if isinstance(self.align, str) and self.align != "auto":
            raise ValueError(f"align: expected 'auto', None or modules, got {self.align!r}")
        if self.channel_dim not in (1, -1):
            raise ValueError(f"channel_dim: expected 1 or -1, got {self.channel_dim!r}")
        self.label = self.name or self.student or "output"


class Distiller(FrozenTeacher):
    """Runs the student and the teacher on the same input and computes the losses between their layers.

    The student's output comes back untouched, beside a dict of named, weighted losses to add to the task loss. The
    teacher runs in eval mode and without gradients, whatever mode the distiller is in; it is moved with the distiller
    but is no part of its ``state_dict()`` and parameters. Works with models wrapped by ``torch.compile`` or
    ``DistributedDataParallel``, inside DDP itself, and under autocast. As a context manager it removes its
    hooks from both models at the end.

    Args:
        student: the model to train.
        teacher: the model to learn from.
        taps: the losses.
        example_inputs: arguments for one forward of both models, in eval mode and without gradients, that shows the
            channels to align. Without them the aligns are built in the first call; the optimizer must then be
            made after it. (``trainable_parameters`` refuses before.)

    Raises:
        ValueError: no layer of that name (the message lists near ones), two taps of one name, no taps.

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
        taps: Sequence[Tap],
        *,
        example_inputs: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(teacher)
        if not taps:
            raise ValueError("taps: expected at least one Tap, got none")
        labels = [tap.label for tap in taps]
        if len(set(labels)) != len(labels):
            raise ValueError(f"taps: expected different names, got {', '.join(labels)}; set Tap(name=...)")
        self.student = student
        self.taps = list(taps)
        self.losses = nn.ModuleList(tap.loss for tap in taps if isinstance(tap.loss, nn.Module))
        self.aligns = nn.ModuleList(_given_align(tap) for tap in taps)
        self.raw_losses: dict[str, Tensor] = {}
        self._built = all(tap.align != "auto" for tap in taps)
        self._captured: dict[str, list[Any]] | None = None
        self._handles: list[Any] | None = []
        for role, model in (("student", student), ("teacher", teacher)):
            for name in dict.fromkeys(getattr(tap, role) for tap in taps):
                layer = find_layer(model, name, role)
                self._handles.append(layer.register_forward_hook(self._recorder(f"{role} {name}")))
        teacher.eval()
        if example_inputs is not None:
            self.build(*example_inputs)

    def _recorder(self, key: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Only while a call is under way: activation checkpoints run layers again in the backward.
            if self._captured is not None:
                self._captured.setdefault(key, []).append(output)

        return record

    def train(self, mode: bool = True) -> Distiller:
        """Sets the mode of student and losses; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def build(self, *args: Any, **kwargs: Any) -> None:
        """Runs both models once, in eval mode and without gradients, and builds the aligns that are due."""
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        try:
            _, captured = self._run(args, kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
        self._build(captured)

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
            RuntimeError: a layer did not run, or the hooks have been removed.
            ValueError: features that do not fit: level counts, channels or sizes, with both shapes.
            TypeError: a layer that puts out no tensors.
        """
        output, captured = self._run(args, kwargs)
        if not self._built:
            self._build_late(captured)
        losses: dict[str, Tensor] = {}
        raw: dict[str, Tensor] = {}
        for i, tap in enumerate(self.taps):
            student, teacher, single = self._features(tap, captured)
            student = [self._fit(i, level, s, t) for level, (s, t) in enumerate(zip(student, teacher, strict=True))]
            value = tap.loss(student[0], teacher[0]) if single else tap.loss(student, teacher)
            raw[tap.label] = value.detach()
            losses[tap.label] = value * tap.weight
        self.raw_losses = raw
        return output, losses

    def _run(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, list[Any]]]:
        if self._handles is None:
            raise RuntimeError("the distiller's hooks have been removed; make a new Distiller")
        self.teacher.eval()
        captured: dict[str, list[Any]] = {}
        self._captured = captured
        try:
            with torch.no_grad():
                self.teacher(*args, **kwargs)
            output = self.student(*args, **kwargs)
        finally:
            self._captured = None
        return output, captured

    def _features(self, tap: Tap, captured: dict[str, list[Any]]) -> tuple[list[Tensor], list[Tensor], bool]:
        sides = []
        for role, name in (("student", tap.student), ("teacher", tap.teacher)):
            runs = captured.get(f"{role} {name}")
            if not runs:
                raise RuntimeError(
                    f"{role}: the layer {name!r} did not run in this forward (or a compiled model had run before the "
                    "Distiller was made: make it first)"
                )
            output = runs[0] if len(runs) == 1 else runs
            levels, keys = as_levels(output, f"{role} {name!r}")
            if tap.channel_dim == -1:
                levels = [level.movedim(-1, 1) for level in levels]
            sides.append((levels, keys, isinstance(output, Tensor), isinstance(output, dict)))
        (student, student_keys, single, student_dict), (teacher, teacher_keys, other_single, teacher_dict) = sides
        if len(student) != len(teacher):
            raise ValueError(
                f"{tap.label}: expected as many levels from the student as from the teacher, "
                f"got {len(student)} and {len(teacher)}"
            )
        if student_dict and teacher_dict and student_keys != teacher_keys:
            raise ValueError(
                f"{tap.label}: expected the same keys from student and teacher, "
                f"got {', '.join(student_keys)} and {', '.join(teacher_keys)}"
            )
        return student, teacher, single and other_single

    def _fit(self, tap_index: int, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        tap, aligns = self.taps[tap_index], self.aligns[tap_index]
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        label = f"{tap.label}[{level}]"
        if student.dim() != teacher.dim() or student.dim() < 3:
            raise ValueError(f"{label}: expected features [N, C, *spatial] of as many axes, got {shapes}")
        assert isinstance(aligns, nn.ModuleList)
        if len(aligns):
            if level >= len(aligns):
                raise ValueError(f"{label}: expected {len(aligns)} level(s), one per align module, got more")
            student = aligns[level](student)
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(f"{label}: expected the teacher's channels after align, got {shapes}")
        if student.shape[2:] != teacher.shape[2:]:
            if not tap.resize:
                raise ValueError(
                    f"{label}: expected features of one size, got {shapes}; Tap(resize=True) interpolates the student's"
                )
            mode = _INTERPOLATION[student.dim()]
            student = F.interpolate(student, size=teacher.shape[2:], mode=mode, align_corners=False)
        return student

    def _build(self, captured: dict[str, list[Any]]) -> list[str]:
        """Builds the aligns of all ``auto`` taps; names those that were due."""
        if self._built:
            return []
        built = []
        for i, tap in enumerate(self.taps):
            if tap.align != "auto":
                continue
            student, teacher, _ = self._features(tap, captured)
            convolutions = nn.ModuleList()
            for s, t in zip(student, teacher, strict=True):
                if s.shape[1] == t.shape[1] or s.dim() != t.dim() or s.dim() not in _CONVOLUTIONS:
                    convolutions.append(nn.Identity())
                    continue
                dtype = next((p.dtype for p in self.student.parameters() if p.is_floating_point()), s.dtype)
                convolution = _CONVOLUTIONS[s.dim()](s.shape[1], t.shape[1], kernel_size=1)
                convolutions.append(convolution.to(device=s.device, dtype=dtype))
                built.append(f"{tap.label} {s.shape[1]} to {t.shape[1]} channels")
            self.aligns[i] = convolutions
        self._built = True
        return built

    def _build_late(self, captured: dict[str, list[Any]]) -> None:
        built = self._build(captured)
        if not built:
            return
        what = f"aligns were built in the first call ({'; '.join(built)})"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(f"{what}, too late for DDP; give Distiller example_inputs before wrapping it")
        warnings.warn(
            f"{what}; make the optimizer from trainable_parameters() after it, or give Distiller example_inputs",
            stacklevel=3,
        )

    def remove(self) -> None:
        """Removes the hooks from both models; the distiller cannot be called any more."""
        for handle in self._handles or []:
            handle.remove()
        self._handles = None


def _given_align(tap: Tap) -> nn.ModuleList:
    if isinstance(tap.align, nn.Module) and not isinstance(tap.align, nn.ModuleList):
        return nn.ModuleList([tap.align])
    if tap.align is None or isinstance(tap.align, str):
        return nn.ModuleList()
    return nn.ModuleList(tap.align)
