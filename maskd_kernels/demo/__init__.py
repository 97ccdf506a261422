"""The demo: a segmenter distilled by every method of the package, start to end, on real handwritten digits.

Scenes of scikit-learn's 8x8 digits, enlarged, scattered and cluttered, are segmented into ten digits and
background. A teacher is trained; receptive tokens are learned on its pyramid features; students are trained alone and
distilled, three seeds each. Loss weights are chosen on validation scenes; the test scenes, made of digits that
occur nowhere else, are looked at once, at the end. Every finished stage is kept, so that an interrupted demo resumes.
"""

from maskd_kernels.demo.report import run
from maskd_kernels.demo.stages import QUICK, Settings

__all__ = ["QUICK", "Settings", "run"]
