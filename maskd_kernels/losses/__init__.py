"""The losses as modules: drop-in replacements by constructor, call and checkpoint."""

from maskd_kernels.losses.maskd import MasKDLoss, MasKDSegLoss, MaskModule

__all__ = ["MasKDLoss", "MasKDSegLoss", "MaskModule"]
