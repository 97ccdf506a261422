"""MGD: Masked Generative Distillation (Yang et al., ECCV 2022, arXiv 2205.01529)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels import functional
from maskd_kernels.losses.generation import Channels, GenerativeLoss
from maskd_kernels.ops.masked_conv import masked_conv
from maskd_kernels.validation import Levels, as_levels, check_number, check_scale, level_name, match_count

# From here on the first convolution is computed from the kept pixels alone (bench: masked_conv).
LEAST_MASKED, LEAST_CHANNELS, LEAST_PIXELS = 0.4, 128, 1024

MGD_PRESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        # RetinaNet, RepPoints, SOLO
        "detection_one_stage": {"alpha_mgd": 2e-5, "lambda_mgd": 0.65, "mask_on_channel": False},
        # Faster R-CNN, Mask R-CNN
        "detection_two_stage": {"alpha_mgd": 5e-7, "lambda_mgd": 0.45, "mask_on_channel": False},
        # PSPNet, DeepLabV3
        "segmentation": {"alpha_mgd": 2e-5, "lambda_mgd": 0.75, "mask_on_channel": False},
        # ImageNet
        "classification": {"alpha_mgd": 7e-5, "lambda_mgd": 0.15, "mask_on_channel": True},
    }
)
"""The authors' released configurations (yzd-v/MGD at 2c9da0b), as keyword arguments of ``MGDLoss``."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_as_built(block: nn.Module) -> bool:
    """Whether calling the block's first convolution does nothing but convolve: no hooks, nothing put in its place."""
    first = block[0] if type(block) is nn.Sequential else None
    return (
        type(first) is nn.Conv2d
        and "forward" not in vars(first)
        and (first.kernel_size, first.stride, first.padding, first.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (first.groups, first.padding_mode) == (1, "zeros")
        and first.bias is not None
        and not any(getattr(m, hooks) for m in (block, first) for hooks in _HOOKS)
        and not nn.modules.module._has_any_global_hook()
    )


class MGDLoss(GenerativeLoss):
    """Masked generative distillation: the student's randomly masked feature must generate the teacher's whole one.

    ``alpha / N * sum_levels sum_{n,c,p} (G(keep * align(S)) - T)^2`` (arXiv 2205.01529, equations 2 to 5), with ``G`` a
    3x3 convolution, ReLU, 3x3 convolution, and ``keep`` random per pixel (detection, segmentation) or per channel
    (classification). The squared error accumulates in float32 whatever the features are. Parameters and ``state_dict``
    are the authors': ``align.*`` where channels differ, ``generation.0.*``, ``generation.2.*``.

    Args:
        student_channels: channels of the student's feature, or one number per level.
        teacher_channels: likewise of the teacher's. Given as numbers, one block serves every level it is called with.
        name: kept for the authors' configurations; not used.
        alpha_mgd: weight of the loss.
        lambda_mgd: share of pixels (or channels) that are masked, in [0, 1).
        mask_on_channel: mask whole channels instead of pixels, as the authors do in classification. Their inequalities
            differ and are followed: a pixel is masked where ``u > 1 - lambda``, a channel where ``u < lambda``.
        shared_generation: with one number of channels per level: one generation block for all of them.

    The authors' hyper-parameters are in ``MGD_PRESETS``: ``detection_one_stage``, ``detection_two_stage``,
    ``segmentation``, ``classification``.

    Raises:
        ValueError: channels below 1, ``lambda_mgd`` outside [0, 1), level counts that do not match.
        TypeError: something that is no number, or no whole one.

    Example:
        >>> import torch
        >>> from maskd_kernels import MGD_PRESETS, MGDLoss
        >>> loss_fn = MGDLoss(16, 32, **MGD_PRESETS["segmentation"])
        >>> loss_fn(torch.randn(2, 16, 8, 8), torch.randn(2, 32, 8, 8)).backward()
    """

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        name: str | None = None,
        alpha_mgd: float = 2e-5,
        lambda_mgd: float = 0.65,
        mask_on_channel: bool = False,
        *,
        shared_generation: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels, name, shared_generation)
        self.alpha_mgd = check_number(alpha_mgd, "alpha_mgd")
        self.lambda_mgd = check_number(lambda_mgd, "lambda_mgd", "a share in [0, 1)", lambda x: 0 <= x < 1)
        self.mask_on_channel = mask_on_channel

    def forward(
        self,
        preds_S: Levels,
        preds_T: Levels,
        *,
        keep: Levels | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of student features against teacher features.

        Args:
            preds_S: ``[N, C_student, H, W]`` or a list of levels.
            preds_T: ``[N, C_teacher, H, W]`` or a list of levels, of the same batch and sizes.
            keep: the mask instead of a random one: ``[N, 1, H, W]``, or ``[N, C_teacher, 1, 1]`` with
                ``mask_on_channel``; floating or bool, 1 where the student is kept; or one per level.
            generator: of the random mask, on the features' device; None: PyTorch's own.

        Returns:
            A scalar; float32 for features of up to 32 bits. A mask that keeps nothing or everything is legal.

        Raises:
            ValueError: shapes, channels, devices or level counts that do not match.
            TypeError: integer features or masks, or something that is no tensor.
        """
        student, teacher = self._validated(preds_S, preds_T)
        masks = self._draw(teacher, generator) if keep is None else self._checked(keep, teacher)
        return self._compared(self._generated_under(masks, self._aligned(student)), teacher, self.alpha_mgd)

    def _generated_under(self, masks: list[Tensor], aligned: list[Tensor]) -> list[Tensor]:
        """What the blocks make of masked features."""
        if self._gathers(aligned, masks):
            return self._generated_from_kept(aligned, masks)
        if self.mask_on_channel:
            masked = functional.scale_channels(aligned, [m.flatten(1) for m in masks])
        else:
            masked = functional.scale_pixels(aligned, [m.squeeze(1) for m in masks])
        return self._generated(list(masked))

    def _gathers(self, aligned: list[Tensor], masks: list[Tensor]) -> bool:
        """Whether computing the first convolution from the kept pixels alone is worth it: see docs/benchmarks.md."""
        return (
            not self.mask_on_channel
            and aligned[0].device.type == "cpu"
            and self.lambda_mgd >= LEAST_MASKED
            and all(m.dtype == torch.bool for m in masks)
            and all(x.dtype == torch.float32 and x.shape[1] >= LEAST_CHANNELS for x in aligned)
            and max(math.prod(x.shape[2:]) for x in aligned) >= LEAST_PIXELS
            and not torch.is_autocast_enabled(aligned[0].device.type)
            and all(_is_as_built(block) for block in self._blocks(len(aligned)))
        )

    def _generated_from_kept(self, aligned: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        result = []
        for block, x, mask in zip(self._blocks(len(aligned)), aligned, masks, strict=True):
            first, *rest = block
            hidden = masked_conv(x, mask.squeeze(1), first.weight, first.bias)
            for module in rest:
                hidden = module(hidden)
            result.append(hidden)
        return result

    def _mask_shape(self, teacher: Tensor) -> list[int]:
        n, c, height, width = teacher.shape
        return [n, c, 1, 1] if self.mask_on_channel else [n, 1, height, width]

    def _draw(self, teacher: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
        """Random masks, all levels drawn at once where the features are."""
        shapes = [self._mask_shape(t) for t in teacher]
        sizes = [math.prod(shape[1:]) for shape in shapes]
        size, device = (shapes[0][0], sum(sizes)), teacher[0].device
        # torch.compile takes no generator, nor None for it, with sizes that vary.
        if generator is None:
            uniform = torch.rand(*size, device=device)
        else:
            uniform = torch.rand(*size, device=device, generator=generator)
        keep = uniform >= self.lambda_mgd if self.mask_on_channel else uniform <= 1 - self.lambda_mgd
        return [k.reshape(shape) for k, shape in zip(keep.split(sizes, 1), shapes, strict=True)]

    def _checked(self, keep: Levels, teacher: list[Tensor]) -> list[Tensor]:
        masks = as_levels(keep, "keep")
        match_count(masks, "keep", teacher, "preds_T")
        for i, (mask, t) in enumerate(zip(masks, teacher, strict=True)):
            check_scale(mask, level_name("keep", i, len(teacher)), self._mask_shape(t), t)
        return masks

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"alpha_mgd={self.alpha_mgd}, lambda_mgd={self.lambda_mgd}, mask_on_channel={self.mask_on_channel}"
