"""Training receptive tokens on a frozen teacher (MasKD, arXiv 2205.14589, section 3.2)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels.distill.features import map_tensors, tensors_in, unwrap
from maskd_kernels.distill.taps import Key, Layer, LayerName, Size, image_size
from maskd_kernels.distill.teacher import FrozenTeacher, cast_to
from maskd_kernels.losses.checkpoints import Source, load_tokens
from maskd_kernels.losses.maskd import MaskModule
from maskd_kernels.validation import check_channels

_KEPT_IN_EVAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class TokenTrainer(FrozenTeacher):
    """Learns receptive tokens: the teacher's layer is replaced by what the tokens let through.

    The teacher's own task loss, plus the Dice coefficient between the masks that keeps tokens apart, is all the
    supervision. The teacher is frozen: eval mode, no parameter gradients, no part of ``state_dict()`` and parameters.

    What good values look like, level by level: the Dice coefficient falls below 0.1; the mean mask stays between 0.1
    and 0.5; single masks have other means where the objects are than elsewhere; the task loss comes down to what it
    is without masks. Masks close to 0 or to 1 everywhere show nothing: a tenth of the learning rate keeps them apart.
    Where the task loss was never higher, the teacher does not feel its masks (heads that normalise their input undo a
    mask that is the same everywhere). Leave masks unweighted where the weights (``MaskModule.forward_prob``) go to a
    mask that covers everything: the loss is then the plain squared error. docs/study.md has both measured.

    Args:
        teacher: a trained model.
        layer: the layer whose output is masked, as ``named_modules`` spells it (``"neck"``, ``"backbone.fpn"``, or
            ``"classifier"`` for tokens on a segmentation model's logits), the layer itself, a list of them (one
            pyramid), or a ``Layer`` with options of its own. Each run of a layer that runs several times is masked
            by the same tokens.
        channels: channels of each level; one number for a tensor.
        num_tokens: receptive tokens per level.
        weight_mask: whether the masks are weighted per image (detection; the authors do not for segmentation).
        teacher_training: whether the teacher runs in training mode, which some detectors need to return their losses;
            its batch norm and dropout layers stay in eval mode all the same.
        levels: see ``Layer``, like the options after it: which of the output's features are masked.
        select: the same by a function, which must return tensors of the output, as they are.
        channel_dim: 1, or -1 for ``[N, *spatial, C]`` (token sequences).
        prefix_tokens: tokens at a sequence's start that are not masked.
        grid: (H, W) of token sequences, which ``weight_mask`` needs, or ``"input"``.

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
        layer: LayerName | Sequence[LayerName] | Layer,
        channels: int | Sequence[int],
        *,
        num_tokens: int = 6,
        weight_mask: bool = True,
        teacher_training: bool = False,
        levels: Key | Sequence[Key] | None = None,
        select: Callable[[Any], Any] | None = None,
        channel_dim: int = 1,
        prefix_tokens: int = 0,
        grid: Size | Sequence[Size] | str | None = None,
    ) -> None:
        super().__init__(teacher)
        widths = check_channels(channels, "channels")
        if not isinstance(layer, Layer):
            layer = Layer(layer, levels, select, channel_dim, prefix_tokens, grid)
        self.layer = layer.resolved(teacher, "layer")
        self.teacher_training = teacher_training
        self.mask_modules = nn.ModuleList(MaskModule(c, num_tokens, weight_mask) for c in widths)
        self._removed = False
        self._required = [p for p in teacher.parameters() if p.requires_grad]
        for parameter in self._required:
            parameter.requires_grad_(False)
        self._set_teacher_mode()

    def _set_teacher_mode(self) -> None:
        self.teacher.train(self.teacher_training)
        for module in self.teacher.modules():
            if isinstance(module, _KEPT_IN_EVAL):
                module.eval()

    def _mask(self, number: int, output: Any, dice: list[Tensor], size: Size | None) -> Any:
        """What stands for the output of one of the layers: its features masked."""
        name, names, count = self.layer.names[number], self.layer.names, len(self.mask_modules)
        layer, where = dataclasses.replace(self.layer, name=name), f"layer {name!r}"
        picked = layer.pick({name: [output]}, "layer")
        levels = [picked] if isinstance(picked, Tensor) else list(picked.values())
        if len(levels) * len(names) != count:
            raise ValueError(
                f"channels: expected one per level that {', '.join(names)!r} puts out, {len(levels) * len(names)}, "
                f"got {count}"
            )
        masked: dict[int, Tensor] = {}
        for i, x in enumerate(levels, number * len(levels)):
            result, overlap = self.mask_modules[i](layer.to_map(x, i, count, size, where))
            masked[id(x)] = layer.from_map(result, x)
            dice.append(overlap)
        if not masked.keys() <= {id(x) for x in tensors_in(output)}:
            raise ValueError(f"{where}: select: expected tensors of the output, as they are, got others made from them")
        return map_tensors(output, lambda x: masked.get(id(x), x))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The teacher's output under the masks, and the sum of the levels' Dice coefficients.

        Minimise the task loss of that output plus the Dice coefficient.

        Raises:
            RuntimeError: the layer did not run, or the trainer has let go of its teacher.
            ValueError: another number of levels or channels than announced.
            TypeError: a layer that puts out no tensors.
        """
        if self._removed:
            raise RuntimeError("the trainer's hook has been removed; make a new TokenTrainer")
        self._set_teacher_mode()
        args, kwargs = cast_to(self.teacher, (args, kwargs))
        size, ran = image_size((args, kwargs)), set()
        dice: list[Tensor] = []

        def hook(number: int) -> Callable[..., Any]:
            def mask(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                ran.add(number)
                return self._mask(number, output, dice, size)

            return mask

        # In the teacher only while it runs: at any other time it can be copied, pickled and called by others.
        with contextlib.ExitStack() as hooks:
            for number, name in enumerate(self.layer.names):
                hooks.enter_context(unwrap(self.teacher).get_submodule(name).register_forward_hook(hook(number)))
            output = self.teacher(*args, **kwargs)
        for number, name in enumerate(self.layer.names):
            if number not in ran:
                raise RuntimeError(f"layer: {name!r} did not run in this forward")
        return output, torch.stack(dice).sum()

    def train(self, mode: bool = True) -> TokenTrainer:
        """Sets the mask modules' mode; the teacher keeps its own."""
        super().train(mode)
        self._set_teacher_mode()
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens as the authors' detection code does: ``mask_modules.*`` nested under ``state_dict``. The
        folder is made where it is missing.

        ``MasKDLoss(pretrained=path)`` and, with one unweighted level, ``MasKDSegLoss(pretrained=path)`` read it.
        """
        state = {f"mask_modules.{k}": v.detach().cpu() for k, v in self.mask_modules.state_dict().items()}
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        torch.save({"state_dict": state}, path)

    def load(self, source: Source) -> None:
        """Reads tokens: a checkpoint of ``save`` or of the authors, plain or nested, with any prefix.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a checkpoint without tokens or with other shapes.
        """
        load_tokens(self, source, attribute="mask_modules")

    def remove(self) -> None:
        """Lets go of the teacher and gives the teacher's parameters their gradients back."""
        if not self._removed:
            self._removed = True
            for parameter in self._required:
                parameter.requires_grad_(True)
