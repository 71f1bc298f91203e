"""Keeps `kernels_pallas.nn`, the former name of `kernels_pallas.models`, for one release; importing it warns."""

import warnings

from kernels_pallas.models import packed

__all__ = ['packed']

warnings.warn('kernels_pallas.nn is now kernels_pallas.models; the old name is removed in the next release.',
              DeprecationWarning, 2)
