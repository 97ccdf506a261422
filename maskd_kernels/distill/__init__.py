"""Distilling any two models, and training receptive tokens on any teacher."""

from maskd_kernels.distill.distiller import Distiller
from maskd_kernels.distill.plot import plot_masks
from maskd_kernels.distill.prepare import Preparation, prepare_teacher
from maskd_kernels.distill.taps import Layer, Tap
from maskd_kernels.distill.tokens import TokenTrainer

__all__ = ["Distiller", "Layer", "Preparation", "Tap", "TokenTrainer", "plot_masks", "prepare_teacher"]
