"""Fused kernels for masked feature distillation in PyTorch."""

from maskd_kernels._version import __version__
from maskd_kernels.backends import BackendUnavailableError, current_backend, use_backend
from maskd_kernels.distill import Distiller, Layer, Preparation, Tap, TokenTrainer, plot_masks, prepare_teacher
from maskd_kernels.functional import (
    MaskWeighting,
    attention_stats,
    dice_diversity,
    mask_weights,
    maskd_loss,
    masked_features,
    masked_mse,
    receptive_masks,
    scale_channels,
    scale_pixels,
    squared_error,
)
from maskd_kernels.losses import MGD_PRESETS, AMDLoss, MasKDLoss, MasKDSegLoss, MaskModule, MGDLoss

__all__ = [
    "MGD_PRESETS",
    "AMDLoss",
    "BackendUnavailableError",
    "Distiller",
    "Layer",
    "MGDLoss",
    "MasKDLoss",
    "MasKDSegLoss",
    "MaskModule",
    "MaskWeighting",
    "Preparation",
    "Tap",
    "TokenTrainer",
    "__version__",
    "attention_stats",
    "current_backend",
    "dice_diversity",
    "mask_weights",
    "maskd_loss",
    "masked_features",
    "masked_mse",
    "plot_masks",
    "prepare_teacher",
    "receptive_masks",
    "scale_channels",
    "scale_pixels",
    "squared_error",
    "use_backend",
]
