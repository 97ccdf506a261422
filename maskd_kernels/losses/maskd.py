"""MasKD: Masked Distillation with Receptive Tokens (Huang et al., ICLR 2023, arXiv 2205.14589)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskd_kernels import functional
from maskd_kernels.losses.checkpoints import Source, load_tokens
from maskd_kernels.mask_weighting import MaskWeighting
from maskd_kernels.validation import Levels, check_channels, check_count, check_number


class MaskModule(nn.Module):
    """Receptive tokens of one feature map, and the weighting of their masks.

    Parameters and ``state_dict`` are the authors': ``mask_token`` ``[K, C]``, initialised N(0, 0.01^2), and with
    ``weight_mask`` ``prob.0`` (3x3 convolution) and ``prob.2`` (1x1 convolution to K logits).

    Args:
        channels: channels ``C`` of the feature map.
        num_tokens: receptive tokens ``K``.
        weight_mask: whether the masks of an image are weighted, by softmax over the tokens.

    Raises:
        ValueError: channels or num_tokens below 1.
        TypeError: numbers that are not whole.

    Example:
        >>> import torch
        >>> from maskd_kernels import MaskModule
        >>> masked, dice = MaskModule(channels=16)(torch.randn(2, 16, 8, 8))
    """

    def __init__(self, channels: int, num_tokens: int = 6, weight_mask: bool = True) -> None:
        super().__init__()
        channels, num_tokens = check_count(channels, "channels"), check_count(num_tokens, "num_tokens")
        self.weight_mask = weight_mask
        self.learned = False  # whether the tokens were loaded, or have been used as in training
        self.mask_token = nn.Parameter(torch.randn(num_tokens, channels) * 0.01)
        if weight_mask:
            self.prob = nn.Sequential(
                nn.Conv2d(channels, channels, kernel_size=3, padding=1),
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(channels, num_tokens, kernel_size=1),
            )
            for parameter in self.prob.parameters():
                if parameter.dim() == 4:
                    fan_out = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
                    nn.init.normal_(parameter, 0.0, math.sqrt(2.0 / fan_out))
                else:
                    nn.init.zeros_(parameter)

    @property
    def weighting(self) -> MaskWeighting | None:
        """The weighting's parameters; None without ``weight_mask``."""
        if not self.weight_mask:
            return None
        conv: Any
        projection: Any
        conv, _, projection = self.prob
        return MaskWeighting(conv.weight, conv.bias, projection.weight, projection.bias)

    def forward_mask(self, x: Tensor) -> Tensor:
        """Masks ``[N, K, *spatial]`` of features ``[N, C, *spatial]``: ``sigmoid(tokens . x)``."""
        return functional.receptive_masks(x, self.mask_token)

    def forward_prob(self, x: Tensor) -> Tensor:
        """Weights of the masks ``[N, K, 1, 1, 1]`` of images ``[N, C, H, W]``; they sum to 1 over K.

        Raises:
            RuntimeError: built with ``weight_mask=False``.
        """
        if self.weighting is None:
            raise RuntimeError("forward_prob: the module was built with weight_mask=False and has no weights")
        return functional.mask_weights(x, self.weighting)[:, :, None, None, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Masked features, shaped as ``x``, and the Dice coefficient between the masks, a scalar."""
        self.learned = True
        return functional.masked_features(x, self.mask_token, weighting=self.weighting)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.learned = True
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Tokens, channels and weighting, for ``print``."""
        k, c = self.mask_token.shape
        return f"channels={c}, num_tokens={k}, weight_mask={self.weight_mask}"


def _warn_of_random_tokens(loss: nn.Module, modules: Sequence[MaskModule]) -> None:
    """Once per loss; not where its tokens are trained, or have been."""
    if torch.compiler.is_compiling() or all([m.learned or m.mask_token.requires_grad for m in modules]):
        return
    for module in modules:
        module.learned = True
    warnings.warn(
        f"{type(loss).__name__}: the receptive tokens are random, and so are the masks. Learn them on the teacher with "
        "TokenTrainer and pass pretrained=..., or load a state_dict; train_tokens=True trains them with the student",
        stacklevel=5,  # who called the module
    )


class MasKDLoss(nn.Module):
    """MasKD for detection: the student reconstructs the teacher's pixels under the receptive tokens' masks.

    ``loss_weight * sum_levels mean_n sum_k w * sum_p M^2 |S - T|^2 / (C * sum_p M)`` (arXiv 2205.14589, equations
    5 and 6), all levels of a pyramid in one pass. Drop-in for the authors' ``mmrazor`` loss: constructor, call and
    ``state_dict`` (``mask_modules.{level}.*``); the warm-up counter ``_iter`` is saved as well, and may be missing
    from what is loaded.

    Args:
        channels: channels of each level; one number for a single level.
        num_tokens: receptive tokens per level.
        weight_mask: whether masks are weighted per image; else their mean is taken.
        custom_mask: whether, after the warm-up, masks are multiplied by those of the student's own features.
        custom_mask_warmup: calls before that begins.
        pretrained: learned tokens to load: a checkpoint of the authors or of ``TokenTrainer``, plain or nested under
            ``state_dict``, with any prefix before ``mask_modules``. Without them, and without a ``state_dict`` loaded
            later or ``train_tokens``, the first call warns: random tokens mask at random.
        loss_weight: factor on the loss.
        train_tokens: whether tokens and weighting receive gradients. Off: learned tokens are fixed while distilling.

    Raises:
        ValueError: numbers out of range; a checkpoint without tokens or with other shapes.
        TypeError: something that is no number, or no whole one.
        FileNotFoundError: ``pretrained`` names no file.

    Example:
        >>> import torch
        >>> from maskd_kernels import MasKDLoss
        >>> loss_fn = MasKDLoss(channels=[16, 16], loss_weight=7.0)
        >>> student = [torch.randn(2, 16, s, s, requires_grad=True) for s in (16, 8)]
        >>> teacher = [torch.randn(2, 16, s, s) for s in (16, 8)]
        >>> loss_fn(student, teacher).backward()
    """

    _iter: Tensor

    def __init__(
        self,
        channels: int | Sequence[int],
        num_tokens: int = 6,
        weight_mask: bool = True,
        custom_mask: bool = True,
        custom_mask_warmup: int = 1000,
        pretrained: Source | None = None,
        loss_weight: float = 1.0,
        *,
        train_tokens: bool = False,
    ) -> None:
        super().__init__()
        levels = check_channels(channels, "channels")
        self.loss_weight = check_number(loss_weight, "loss_weight")
        self.weight_mask = weight_mask
        self.custom_mask = custom_mask
        self.custom_mask_warmup = check_count(custom_mask_warmup, "custom_mask_warmup", 0)
        self.mask_modules = nn.ModuleList(MaskModule(c, num_tokens, weight_mask) for c in levels)
        # On the device, so that neither reading nor counting it makes the host wait, also inside a CUDA graph.
        self.register_buffer("_iter", torch.zeros((), dtype=torch.int64))
        if pretrained is not None:
            load_tokens(self, pretrained, attribute="mask_modules")
        self.mask_modules.requires_grad_(train_tokens)

    def forward(self, y_s: Levels, y_t: Levels) -> Tensor:
        """The loss of student features against teacher features.

        Args:
            y_s: ``[N, C, *spatial]`` or a list of levels, aligned to the teacher's channels.
            y_t: the teacher's, of the same shapes.

        Returns:
            A scalar; float32 for features of up to 32 bits.

        Raises:
            ValueError: shapes, channels, devices or level counts that do not match.
            TypeError: integer features or something that is no tensor.
        """
        modules: list[Any] = list(self.mask_modules)
        _warn_of_random_tokens(self, modules)
        customize: bool | Tensor = False
        if self.custom_mask:
            customize = self._iter >= self.custom_mask_warmup
            if not torch._C._are_functorch_transforms_active():  # which let nothing be changed
                self._iter += 1
        loss = functional.maskd_loss(
            [y_s] if isinstance(y_s, Tensor) else y_s,
            [y_t] if isinstance(y_t, Tensor) else y_t,
            [m.mask_token for m in modules],
            weighting=[m.weighting for m in modules] if self.weight_mask else None,
            customize=customize,
        )
        return loss if self.loss_weight == 1 else self.loss_weight * loss

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The authors' checkpoints carry no counter.
        if prefix + "_iter" not in state_dict:
            state_dict = {**state_dict, prefix + "_iter": self._iter}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        warmup = f", custom_mask_warmup={self.custom_mask_warmup}" if self.custom_mask else ""
        return f"loss_weight={self.loss_weight}, custom_mask={self.custom_mask}{warmup}"


class MasKDSegLoss(nn.Module):
    """MasKD for segmentation, on logits: ``loss_weight * mean_{n,k} sum_p M^2 |S - T|^2 / (C * (sum_p M + 1e-5))``.

    As the authors' segmentation code: no weighting, never customised, and ``state_dict`` keys ``mask_module.*``.

    Args:
        channels: channels of the logits, that is, classes (Cityscapes: 19).
        num_tokens: receptive tokens.
        pretrained: learned tokens to load: the authors' checkpoint (``mask_token`` alone) or a ``state_dict`` of this
            module, plain or nested under ``state_dict``.
        loss_weight: factor on the loss; the authors use 1/2.
        train_tokens: whether the tokens receive gradients.

    Raises:
        ValueError: numbers out of range; a checkpoint without tokens or with other shapes.
        TypeError: something that is no number, or no whole one.
        FileNotFoundError: ``pretrained`` names no file.

    Example:
        >>> import torch
        >>> from maskd_kernels import MasKDSegLoss
        >>> loss = MasKDSegLoss(channels=19)(torch.randn(2, 19, 8, 16), torch.randn(2, 19, 8, 16))
    """

    def __init__(
        self,
        channels: int,
        num_tokens: int = 8,
        pretrained: Source | None = None,
        loss_weight: float = 0.5,
        *,
        train_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.loss_weight = check_number(loss_weight, "loss_weight")
        self.mask_module = MaskModule(channels, num_tokens, weight_mask=False)
        if pretrained is not None:
            load_tokens(self, pretrained, attribute="mask_module")
        self.mask_module.requires_grad_(train_tokens)

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """The loss of student logits ``[N, C, *spatial]`` against the teacher's of the same shape: a scalar.

        Raises:
            ValueError: shapes, channels or devices that do not match.
            TypeError: integer logits or something that is no tensor.
        """
        _warn_of_random_tokens(self, [self.mask_module])
        loss = functional.maskd_loss(y_s, y_t, self.mask_module.mask_token, eps=1e-5)
        return self.loss_weight * loss

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"loss_weight={self.loss_weight}"
