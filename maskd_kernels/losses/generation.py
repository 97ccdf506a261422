"""What the generative losses (MGD, AMD) share: align the student, mask it, generate the teacher's features from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from maskd_kernels import functional
from maskd_kernels.ops.registration import full_precision
from maskd_kernels.validation import Levels, as_features, check_channels, level_name, match_count, shape_of

Channels = int | Sequence[int]


def _align(student: int, teacher: int) -> nn.Module:
    return nn.Conv2d(student, teacher, kernel_size=1) if student != teacher else nn.Identity()


def _generation(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )


class GenerativeLoss(nn.Module):
    """Align, mask, generate, compare: ``alpha / N * sum (G(keep * align(S)) - T)^2``.

    ``state_dict`` keys: ``align.*`` (a 1x1 convolution, only where channels differ), ``generation.0.*`` and
    ``generation.2.*`` (3x3 convolutions). With lists of channels, the level's number follows ``align`` and, unless it
    is shared, ``generation``.
    """

    def __init__(
        self, student_channels: Channels, teacher_channels: Channels, name: str | None, shared_generation: bool
    ) -> None:
        super().__init__()
        self.name = name
        self.student_channels = check_channels(student_channels, "student_channels")
        self.teacher_channels = check_channels(teacher_channels, "teacher_channels")
        match_count(self.student_channels, "student_channels", self.teacher_channels, "teacher_channels")
        self.per_level = not isinstance(teacher_channels, int)
        self.align: nn.Module | None
        self.generation: nn.Module
        pairs = list(zip(self.student_channels, self.teacher_channels, strict=True))
        if not self.per_level:
            ((student, teacher),) = pairs
            self.align = _align(student, teacher) if student != teacher else None
            self.generation = _generation(teacher)
            return
        self.align = nn.ModuleList(_align(student, teacher) for student, teacher in pairs)
        if not shared_generation:
            self.generation = nn.ModuleList(_generation(teacher) for _, teacher in pairs)
        elif len(set(self.teacher_channels)) > 1:
            raise ValueError(f"shared_generation: expected equal teacher_channels, got {self.teacher_channels}")
        else:
            self.generation = _generation(self.teacher_channels[0])

    def _validated(self, preds_s: Levels, preds_t: Levels) -> tuple[list[Tensor], list[Tensor]]:
        student, teacher = as_features(preds_s, "preds_S", 1), as_features(preds_t, "preds_T", 1)
        match_count(student, "preds_S", teacher, "preds_T")
        if self.per_level:
            match_count(student, "preds_S", self.student_channels, "student_channels")
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            channels = (
                self.student_channels[i if self.per_level else 0],
                self.teacher_channels[i if self.per_level else 0],
            )
            for x, c, name in ((s, channels[0], "preds_S"), (t, channels[1], "preds_T")):
                if x.dim() != 4 or x.shape[1] != c:
                    label = level_name(name, i, len(student))
                    hint = "; token sequences take Tap(grid=...)" if x.dim() == 3 else ""
                    raise ValueError(f"{label}: expected [N, {c}, H, W], got {shape_of(x)}{hint}")
            if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
                label, other = level_name("preds_S", i, len(student)), level_name("preds_T", i, len(student))
                raise ValueError(
                    f"{label}: expected batch and size of {shape_of(t)} like {other}, got {shape_of(s)}; "
                    "resize the student first"
                )
            if s.device != t.device:
                raise ValueError(f"preds_S: expected device {t.device} like preds_T, got {s.device}")
        return student, teacher

    def _aligned(self, student: list[Tensor]) -> list[Tensor]:
        if self.align is None:
            return student
        aligns: Any = self.align if self.per_level else [self.align] * len(student)
        return [align(s) for align, s in zip(aligns, student, strict=True)]

    def _blocks(self, levels: int) -> list[Any]:
        blocks = self.generation
        return list(blocks) if isinstance(blocks, nn.ModuleList) else [blocks] * levels

    def _generated(self, masked: list[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self._blocks(len(masked)), masked, strict=True)]

    @staticmethod
    def _compared(
        generated: list[Tensor], teacher: list[Tensor], alpha: float, channel_scale: list[Tensor] | None = None
    ) -> Tensor:
        error = functional.squared_error(generated, teacher, channel_scale=channel_scale)
        with full_precision(error):
            return error.sum() * (alpha / max(error.shape[1], 1))
