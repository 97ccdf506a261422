"""AMD: Adaptive Masked Distillation for Object Detection (Yang et al., 2023, arXiv 2301.13538)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from maskd_kernels import functional
from maskd_kernels.losses.generation import Channels, GenerativeLoss
from maskd_kernels.ops.registration import full_precision
from maskd_kernels.validation import Levels, as_features, check_number


class AMDLoss(GenerativeLoss):
    """Adaptive masked distillation: what the teacher attends to is masked, and its channels are reweighted.

    Per level, with ``P`` pixels, ``G`` a 3x3 convolution, ReLU, 3x3 convolution:

        A[n,p]  = P softmax_p(mean_c |T| / temperature)                 attention, mean 1
        keep    = A < threshold                                         (mask_salient=False: A >= threshold)
        s[n,c]  = sigmoid(W2 relu(W1 mean_p T))                         channel adaptation
        loss    = alpha / N sum_{n,c,p} (s G(keep align(S)) - T)^2

    Read from the paper's abstract: the mask follows spatial attention instead of chance, so that important regions are
    reconstructed, and a simple module adapts the channels. Inferred, as neither formulas nor code are public: the
    attention (that of FGD, arXiv 2111.11837), the threshold, the squeeze-and-excitation form of the module and what it
    reads, and the generation block (that of MGD). Each of these is an argument. No parity with the authors' code is
    claimed.

    Args:
        student_channels: channels of the student's feature, or one number per level.
        teacher_channels: likewise of the teacher's. Given as numbers, one block serves every level it is called with.
        name: kept for configurations in the style of MGD's; not used.
        alpha_amd: weight of the loss; MGD's by default.
        temperature: of the attention's softmax; above 0. FGD's by default.
        threshold: attention from which on a pixel is salient; 1 is the average pixel's.
        mask_salient: mask the salient pixels; False masks the others.
        reduction: the channel module's hidden units are the teacher's channels divided by it.
        channel_adaptive: reweight the generated channels at all.
        channel_source: whose channel means the module reads, ``"teacher"`` or ``"student"`` (aligned).
        shared_generation: with one number of channels per level: one generation block for all of them.

    Raises:
        ValueError: channels below 1, temperature not above 0, a reduction below 1 or above the teacher's channels, an
            unknown channel source, level counts that do not match.
        TypeError: something that is no number, or no whole one.

    Example:
        >>> import torch
        >>> from maskd_kernels import AMDLoss
        >>> AMDLoss(16, 32)(torch.randn(2, 16, 8, 8), torch.randn(2, 32, 8, 8)).backward()
    """

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels,
        name: str | None = None,
        alpha_amd: float = 2e-5,
        temperature: float = 0.5,
        threshold: float = 1.0,
        mask_salient: bool = True,
        reduction: int = 16,
        channel_adaptive: bool = True,
        channel_source: str = "teacher",
        *,
        shared_generation: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels, name, shared_generation)
        self.alpha_amd = check_number(alpha_amd, "alpha_amd")
        self.temperature = check_number(temperature, "temperature", "a number above 0", lambda x: x > 0)
        self.threshold = check_number(threshold, "threshold")
        least = min(self.teacher_channels)
        if isinstance(reduction, bool) or not isinstance(reduction, int) or not 1 <= reduction <= least:
            raise ValueError(f"reduction: expected a whole number from 1 to the {least} channels, got {reduction!r}")
        if channel_source not in ("teacher", "student"):
            raise ValueError(f"channel_source: expected 'teacher' or 'student', got {channel_source!r}")
        self.mask_salient = mask_salient
        self.channel_source = channel_source
        self.channel_modules = (
            nn.ModuleList(
                nn.Sequential(nn.Linear(c, c // reduction), nn.ReLU(), nn.Linear(c // reduction, c), nn.Sigmoid())
                for c in self.teacher_channels
            )
            if channel_adaptive
            else None
        )

    def _attention(self, strength: Tensor) -> Tensor:  # [N, H, W]
        pixels = math.prod(strength.shape[1:])
        weights = (strength.flatten(1) / self.temperature).softmax(1) * pixels
        return weights.reshape(strength.shape)

    def attention(self, preds_T: Tensor) -> Tensor:
        """The teacher's spatial attention ``[N, H, W]``, with mean 1, of features ``[N, C, H, W]``."""
        (teacher,) = as_features(preds_T, "preds_T", 1)
        return self._attention(functional.attention_stats(teacher)[0])

    def keep(self, attention: Tensor) -> Tensor:
        """Which pixels of an attention map are kept, bool of its shape; the others are to be reconstructed."""
        return attention < self.threshold if self.mask_salient else attention >= self.threshold

    def forward(self, preds_S: Levels, preds_T: Levels) -> Tensor:
        """The loss of student features against teacher features.

        Args:
            preds_S: ``[N, C_student, H, W]`` or a list of levels.
            preds_T: ``[N, C_teacher, H, W]`` or a list of levels, of the same batch and sizes.

        Returns:
            A scalar; float32 for features of up to 32 bits.

        Raises:
            ValueError: shapes, channels, devices or level counts that do not match.
            TypeError: integer features or something that is no tensor.
        """
        student, teacher = self._validated(preds_S, preds_T)
        strength, mean = functional.attention_stats(teacher)
        aligned = self._aligned(student)
        with full_precision(teacher[0]):
            keep = [self.keep(self._attention(x.detach())) for x in strength]
        masked = functional.scale_pixels(aligned, keep)
        scale = None
        if self.channel_modules is not None:
            if self.channel_source == "student":
                _, mean = functional.attention_stats(aligned)
            scale = self._channel_scale(mean)
        return self._compared(self._generated(masked), teacher, self.alpha_amd, scale)

    def _channel_scale(self, mean: list[Tensor]) -> list[Tensor]:
        assert self.channel_modules is not None
        modules: list[Any] = list(self.channel_modules)
        modules = modules if self.per_level else modules * len(mean)
        return [module(m.to(module[0].weight.dtype)) for module, m in zip(modules, mean, strict=True)]

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"alpha_amd={self.alpha_amd}, temperature={self.temperature}, threshold={self.threshold}, "
            f"mask_salient={self.mask_salient}, channel_source={self.channel_source!r}"
        )
