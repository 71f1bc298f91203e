"""Keeps `sparsejax.tracing`, the former name of `sparsejax.programs`, for one release; importing it warns."""

import warnings

from sparsejax.programs import Contractions, contractions

__all__ = ['Contractions', 'contractions']

warnings.warn('sparsejax.tracing is now sparsejax.programs; the old name is removed in the next release.',
              DeprecationWarning, 2)
