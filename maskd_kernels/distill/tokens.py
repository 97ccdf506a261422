"""Training receptive tokens on a frozen teacher (MasKD, arXiv 2205.14589, section 3.2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import FrozenTeacher, as_levels, find_layer, map_levels
from maskd_kernels.losses.checkpoints import Source, load_tokens
from maskd_kernels.losses.maskd import MaskModule

_KEPT_IN_EVAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class TokenTrainer(FrozenTeacher):
    """Learns receptive tokens: the teacher's layer is replaced by what the tokens let through.

    The teacher's own task loss, plus the Dice coefficient between the masks that keeps tokens apart, is all the
    supervision. The teacher is frozen: eval mode, no parameter gradients, no part of ``state_dict()`` and parameters.

    Args:
        teacher: a trained model.
        layer: the layer whose output is masked, as ``named_modules`` spells it (``"neck"``, ``"backbone.fpn"``, or
            ``"classifier"`` for tokens on a segmentation model's logits). Tensor, list, tuple or dict.
        channels: channels of each level; one number for a tensor.
        num_tokens: receptive tokens per level.
        weight_mask: whether the masks are weighted per image (detection; the authors do not for segmentation).
        teacher_training: whether the teacher runs in training mode, which some detectors need to return their losses;
            its batch norm and dropout layers stay in eval mode all the same.

    Raises:
        ValueError: no layer of that name (the message lists near ones), numbers out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_kernels import TokenTrainer
        >>> teacher = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 1))
        >>> trainer = TokenTrainer(teacher, "0", channels=16)
        >>> optimizer = torch.optim.Adam(trainer.parameters(), lr=0.01)
        >>> logits, dice = trainer(torch.randn(2, 3, 32, 32))
        >>> (logits.square().mean() + dice).backward()
    """

    def __init__(
        self,
        teacher: nn.Module,
        layer: str,
        channels: int | Sequence[int],
        *,
        num_tokens: int = 6,
        weight_mask: bool = True,
        teacher_training: bool = False,
    ) -> None:
        super().__init__(teacher)
        levels = [channels] if isinstance(channels, int) else list(channels)
        if not levels:
            raise ValueError("channels: expected at least one level, got an empty list")
        self.layer = layer
        self.teacher_training = teacher_training
        self.mask_modules = nn.ModuleList(MaskModule(c, num_tokens, weight_mask) for c in levels)
        self._dice: list[Tensor] | None = None
        self._required = [p for p in teacher.parameters() if p.requires_grad]
        for parameter in self._required:
            parameter.requires_grad_(False)
        self._handle: Any = find_layer(teacher, layer, "layer").register_forward_hook(self._mask)
        self._set_teacher_mode()

    def _set_teacher_mode(self) -> None:
        self.teacher.train(self.teacher_training)
        for module in self.teacher.modules():
            if isinstance(module, _KEPT_IN_EVAL):
                module.eval()

    def _mask(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._dice is None:  # the teacher was called by somebody else
            return None
        levels, _ = as_levels(output, f"layer {self.layer!r}")
        if len(levels) != len(self.mask_modules):
            raise ValueError(
                f"channels: expected one per level that {self.layer!r} puts out, {len(levels)}, "
                f"got {len(self.mask_modules)}"
            )
        dice = self._dice

        def mask(level: int, x: Tensor) -> Tensor:
            masked, overlap = self.mask_modules[level](x)
            dice.append(overlap)
            return masked

        return map_levels(output, mask, f"layer {self.layer!r}")

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The teacher's output under the masks, and the sum of the levels' Dice coefficients.

        Minimise the task loss of that output plus the Dice coefficient.

        Raises:
            RuntimeError: the layer did not run, or the hook has been removed.
            ValueError: another number of levels or channels than announced.
            TypeError: a layer that puts out no tensors.
        """
        if self._handle is None:
            raise RuntimeError("the trainer's hook has been removed; make a new TokenTrainer")
        self._set_teacher_mode()
        dice: list[Tensor] = []
        self._dice = dice
        try:
            output = self.teacher(*args, **kwargs)
        finally:
            self._dice = None
        if not dice:
            raise RuntimeError(f"layer: {self.layer!r} did not run in this forward")
        return output, torch.stack(dice).sum()

    def train(self, mode: bool = True) -> TokenTrainer:
        """Sets the mask modules' mode; the teacher keeps its own."""
        super().train(mode)
        self._set_teacher_mode()
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens as the authors' detection code does: ``mask_modules.*`` nested under ``state_dict``.

        ``MasKDLoss(pretrained=path)`` and, with one unweighted level, ``MasKDSegLoss(pretrained=path)`` read it.
        """
        state = {f"mask_modules.{k}": v.detach().cpu() for k, v in self.mask_modules.state_dict().items()}
        torch.save({"state_dict": state}, path)

    def load(self, source: Source) -> None:
        """Reads tokens: a checkpoint of ``save`` or of the authors, plain or nested, with any prefix.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a checkpoint without tokens or with other shapes.
        """
        load_tokens(self, source, attribute="mask_modules")

    def remove(self) -> None:
        """Removes the hook and gives the teacher's parameters their gradients back."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            for parameter in self._required:
                parameter.requires_grad_(True)
