"""Reads JAX programs: which parameter feeds which contraction, and what a compiled program sends between devices."""

from sparsejax.programs.contractions import Contractions, contractions

__all__ = ['Contractions', 'contractions']
