"""The former name of `kernels_pallas.models`, for one release."""

import warnings

from kernels_pallas.models import OPS, Explanation, Row, packed

__all__ = ['OPS', 'Explanation', 'Row', 'packed']

warnings.warn('kernels_pallas.nn is now kernels_pallas.models; the old name goes in the next release.',
              DeprecationWarning, 2)
