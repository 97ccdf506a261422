"""The losses as modules: drop-in replacements by constructor, call and checkpoint."""

from maskd_kernels.losses.amd import AMDLoss
from maskd_kernels.losses.maskd import MasKDLoss, MasKDSegLoss, MaskModule
from maskd_kernels.losses.mgd import MGD_PRESETS, MGDLoss

__all__ = ["MGD_PRESETS", "AMDLoss", "MGDLoss", "MasKDLoss", "MasKDSegLoss", "MaskModule"]
