"""Masked distillation in torchdistill's registries: what its YAML files name, once they import this module.

``dependencies: [{name: maskd_kernels.integrations.torchdistill}]``. Its boxes train what the student's (auxiliary)
wrapper holds, and nothing of a criterion. So the losses, with their aligns and generation blocks, are blocks of the
wrapper ``Student4MaskedDistillation``, and the criterion's term ``MaskedDistillationLoss`` names a block and the layers
that it compares. ``TeacherWithReceptiveTokens`` and ``TokenDiceLoss`` learn tokens on a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels.distill import Layer, TokenTrainer
from maskd_kernels.losses import AMDLoss, MasKDLoss, MasKDSegLoss, MGDLoss

try:
    from torchdistill.common.main_util import is_main_process
    from torchdistill.losses.registry import register_mid_level_loss
    from torchdistill.models.registry import register_auxiliary_model_wrapper
    from torchdistill.models.util import load_module_ckpt, save_module_ckpt, wrap_if_distributed
    from torchdistill.models.wrapper import AuxiliaryModelWrapper
except ImportError as error:
    raise ImportError(
        f"maskd_kernels.integrations.torchdistill needs torchdistill: pip install 'torchdistill>=1.1' ({error})"
    ) from error

LOSSES: Mapping[str, type[nn.Module]] = {loss.__name__: loss for loss in (MasKDLoss, MasKDSegLoss, MGDLoss, AMDLoss)}


class Block(nn.Module):
    """A loss, and the 1x1 convolutions that give the student's features the teacher's channels.

    Args:
        key: ``MasKDLoss``, ``MasKDSegLoss``, ``MGDLoss`` or ``AMDLoss``.
        kwargs: the loss's arguments.
        student_channels: for the two MasKD losses: channels of the student's levels; one number for a single level.
            None: those of the teacher. MGD and AMD have aligns of their own.

    Raises:
        ValueError: an unknown key, or another number of levels.
    """

    def __init__(
        self, key: str, kwargs: Mapping[str, Any] | None = None, student_channels: int | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if key not in LOSSES:
            raise ValueError(f"key: expected one of {', '.join(LOSSES)}, got {key!r}")
        self.loss: Any = LOSSES[key](**(kwargs or {}))
        self.aligns = nn.ModuleList()
        if student_channels is None:
            return
        if not isinstance(self.loss, (MasKDLoss, MasKDSegLoss)):
            raise ValueError(f"student_channels: expected as an argument of {key}, in kwargs")
        modules: Any = [self.loss.mask_module] if isinstance(self.loss, MasKDSegLoss) else self.loss.mask_modules
        teacher = [m.mask_token.shape[1] for m in modules]
        student = [student_channels] if isinstance(student_channels, int) else list(student_channels)
        if len(student) != len(teacher):
            raise ValueError(f"student_channels: expected one per level, {len(teacher)}, got {student}")
        for s, t in zip(student, teacher, strict=True):
            self.aligns.append(nn.Conv2d(s, t, kernel_size=1) if s != t else nn.Identity())

    def forward(self, student: Tensor | list[Tensor], teacher: Tensor | list[Tensor]) -> Tensor:
        """The loss of features ``[N, C, *spatial]`` or lists of levels."""
        if len(self.aligns) and isinstance(student, Tensor):
            student = self.aligns[0](student)
        elif len(self.aligns):
            student = [align(s) for align, s in zip(self.aligns, student, strict=True)]
        return self.loss(student, teacher)


@register_auxiliary_model_wrapper
class Student4MaskedDistillation(AuxiliaryModelWrapper):
    """The student with the blocks of its masked distillation, which are trained, moved and wrapped with it.

    Args:
        student_model: the student.
        blocks: by name, the arguments of :class:`Block`, and optionally ``ckpt``: a file that the block is loaded from
            where it exists, and saved to after every epoch.
        device: as torchdistill passes it, like the arguments after it.
        device_ids: of ``DistributedDataParallel``.
        distributed: whether student and blocks are wrapped.
        find_unused_parameters: of ``DistributedDataParallel``.

    .. code-block:: YAML

        auxiliary_model_wrapper:
          key: 'Student4MaskedDistillation'
          kwargs:
            blocks:
              mgd:
                key: 'MGDLoss'
                kwargs: {student_channels: [48, 576], teacher_channels: [256, 512], lambda_mgd: 0.5}
    """

    def __init__(
        self,
        student_model: nn.Module,
        blocks: Mapping[str, Mapping[str, Any]],
        device: torch.device,
        device_ids: list[int] | None,
        distributed: bool,
        find_unused_parameters: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        where = (device, device_ids, distributed, find_unused_parameters)
        self.student_model = wrap_if_distributed(student_model, *where)
        self.blocks = nn.ModuleDict()
        self.files: dict[str, str] = {}
        for name, config in blocks.items():
            options = dict(config)
            file = options.pop("ckpt", None)
            block = Block(**options).to(device)
            if file is not None:
                self.files[name] = file
                if Path(file).is_file():
                    load_module_ckpt(block, device, file)
            self.blocks[name] = wrap_if_distributed(block, *where)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student_model(*args, **kwargs)

    def secondary_forward(self, io_dict: dict[str, Any]) -> None:
        """Puts the blocks where the criterion's terms find them."""
        for name, block in self.blocks.items():
            io_dict[name] = {"block": block}

    def post_epoch_process(self, *args: Any, **kwargs: Any) -> None:
        """Saves the blocks that have a file."""
        for name, file in self.files.items():
            save_module_ckpt(self.blocks[name], file)


@register_mid_level_loss
class MaskedDistillationLoss(nn.Module):
    """A block of ``Student4MaskedDistillation`` applied to layers of student and teacher.

    Args:
        block: the block's name.
        student_module_path: a layer, or a list of them (one pyramid); ``student_model.`` is before the student's own.
        teacher_module_path: likewise, as the teacher's paths are.
        student_module_io: ``output`` or ``input``.
        teacher_module_io: likewise.
        layer: options of ``maskd_kernels.Layer`` for both sides: ``levels``, ``channel_dim``, ``prefix_tokens``,
            ``grid``.

    Raises:
        ValueError: options that ``Layer`` does not take, another number of levels.
        KeyError: in a call: no such block.

    .. code-block:: YAML

        mgd:
          criterion:
            key: 'MaskedDistillationLoss'
            kwargs:
              block: 'mgd'
              student_module_path: ['student_model.features.8', 'student_model.features.12']
              teacher_module_path: ['layer3', 'layer4']
          weight: 1.0
    """

    def __init__(
        self,
        block: str,
        student_module_path: str | list[str],
        teacher_module_path: str | list[str],
        student_module_io: str = "output",
        teacher_module_io: str = "output",
        **layer: Any,
    ) -> None:
        super().__init__()
        self.block = block
        self.student, self.teacher = Layer(student_module_path, **layer), Layer(teacher_module_path, **layer)
        self.student_io, self.teacher_io = student_module_io, teacher_module_io

    def forward(
        self, student_io_dict: Mapping[str, Any], teacher_io_dict: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The block's loss; the teacher's features receive no gradient."""
        if "block" not in student_io_dict.get(self.block, {}):
            known = [name for name, entry in student_io_dict.items() if "block" in entry]
            raise KeyError(
                f"block: no {self.block!r} in the student's auxiliary_model_wrapper; it must be a "
                f"Student4MaskedDistillation and has {', '.join(known) or 'none'}"
            )
        student = _features(self.student, student_io_dict, self.student_io, "student")
        teacher = _features(self.teacher, teacher_io_dict, self.teacher_io, "teacher")
        if len(student.levels) != len(teacher.levels):
            raise ValueError(
                f"{self.block}: expected as many levels of the student as of the teacher, got {len(student.levels)} "
                f"and {len(teacher.levels)}; levels=... chooses"
            )
        targets = [t.detach() for t in teacher.levels]
        block = student_io_dict[self.block]["block"]
        if student.single and teacher.single:
            return block(student.levels[0], targets[0])
        return block(student.levels, targets)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.block}: {self.student.name} and {self.teacher.name})"


def _features(layer: Layer, io_dict: Mapping[str, Any], io: str, role: str) -> Any:
    missing = [name for name in layer.names if io not in io_dict.get(name, {})]
    if missing:
        raise KeyError(f"{role}: no {io} of {', '.join(missing)} was recorded; name it in forward_hook: {io}: [...]")
    return layer.features({name: [io_dict[name][io]] for name in layer.names}, None, role)


@register_auxiliary_model_wrapper
class TeacherWithReceptiveTokens(AuxiliaryModelWrapper):
    """For a ``TrainingBox`` whose model is a trained teacher: learns its receptive tokens, and nothing of it.

    The criterion is the teacher's task loss plus ``TokenDiceLoss``.

    Args:
        student_model: the teacher; torchdistill calls a training box's model so.
        layer: a layer's name or a list of them, as ``named_modules`` spells it.
        channels: channels of each level; one number for a single level.
        file: where the tokens are saved after every epoch, for ``MasKDLoss(pretrained=...)``.
        device: as torchdistill passes it, like the arguments after it.
        device_ids: of ``DistributedDataParallel``.
        distributed: whether the tokens are wrapped.
        find_unused_parameters: of ``DistributedDataParallel``.
        options: of ``maskd_kernels.TokenTrainer``: ``num_tokens``, ``weight_mask``, ``levels``, ...
    """

    def __init__(
        self,
        student_model: nn.Module,
        layer: str | list[str],
        channels: int | list[int],
        file: str,
        device: torch.device,
        device_ids: list[int] | None,
        distributed: bool,
        find_unused_parameters: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.file = file
        trainer = TokenTrainer(student_model, layer, channels, **options)
        self.trainer = wrap_if_distributed(trainer, device, device_ids, distributed, find_unused_parameters)
        self.dice: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output, seen through the tokens."""
        output, self.dice = self.trainer(*args, **kwargs)
        return output

    def secondary_forward(self, io_dict: dict[str, Any]) -> None:
        """Puts the Dice coefficient where ``TokenDiceLoss`` finds it."""
        io_dict["tokens"] = {"dice": self.dice}

    def post_epoch_process(self, *args: Any, **kwargs: Any) -> None:
        """Saves the tokens, in the authors' format."""
        if is_main_process():
            getattr(self.trainer, "module", self.trainer).save(self.file)


@register_mid_level_loss
class TokenDiceLoss(nn.Module):
    """How much the tokens' masks overlap, summed over levels: beside the task loss, what keeps tokens apart.

    Raises:
        KeyError: in a call: the model is no ``TeacherWithReceptiveTokens``.
    """

    def forward(self, student_io_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Dice coefficient of this forward."""
        if "tokens" not in student_io_dict:
            raise KeyError("TokenDiceLoss: the model's auxiliary_model_wrapper must be TeacherWithReceptiveTokens")
        return student_io_dict["tokens"]["dice"]
