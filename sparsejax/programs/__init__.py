"""Reads JAX programs."""

from sparsejax.programs.contractions import Contractions, contractions

__all__ = ['Contractions', 'contractions']
