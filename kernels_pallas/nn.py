"""Keeps the former name of `kernels_pallas.models` for one release."""

import warnings

from kernels_pallas import models
from kernels_pallas.models import packed

__all__ = ['OPS', 'Explanation', 'Row', 'packed']

OPS = {kind: op.multiply for kind, op in models.OPS.items()}
Explanation, Row = models.ProgramExplanation, models.PackedUse

warnings.warn('kernels_pallas.nn is now kernels_pallas.models; the old name goes in the next release.',
              DeprecationWarning, 2)
