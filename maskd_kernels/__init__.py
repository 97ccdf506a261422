"""Fused kernels for masked feature distillation in PyTorch."""

from maskd_kernels._version import __version__
from maskd_kernels.backends import current_backend, use_backend

__all__ = ["__version__", "current_backend", "use_backend"]
