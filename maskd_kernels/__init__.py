"""Fused kernels for masked feature distillation in PyTorch."""

from maskd_kernels._version import __version__
from maskd_kernels.backends import BackendUnavailableError, current_backend, use_backend
from maskd_kernels.distill import Distiller, Tap, TokenTrainer, plot_masks
from maskd_kernels.functional import (
    MaskWeighting,
    dice_diversity,
    mask_weights,
    maskd_loss,
    masked_features,
    masked_mse,
    receptive_masks,
)
from maskd_kernels.losses import MasKDLoss, MasKDSegLoss, MaskModule

__all__ = [
    "BackendUnavailableError",
    "Distiller",
    "MasKDLoss",
    "MasKDSegLoss",
    "MaskModule",
    "MaskWeighting",
    "Tap",
    "TokenTrainer",
    "__version__",
    "current_backend",
    "dice_diversity",
    "mask_weights",
    "maskd_loss",
    "masked_features",
    "masked_mse",
    "plot_masks",
    "receptive_masks",
    "use_backend",
]
