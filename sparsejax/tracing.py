"""The former name of `sparsejax.programs`, for one release."""

import warnings

from sparsejax.programs import Contractions, contractions

__all__ = ['Contractions', 'contractions']

warnings.warn('sparsejax.tracing is now sparsejax.programs; the old name goes in the next release.',
              DeprecationWarning, 2)
