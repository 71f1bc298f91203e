"""Reads JAX programs."""

from sparsejax.programs.contractions import Contractions, contractions
from sparsejax.programs.evaluate import Walk, evaluate
from sparsejax.programs.follow import follow
from sparsejax.programs.jaxprs import Program, trace
from sparsejax.programs.operands import Site, operands, walk
from sparsejax.programs.replace import replace

__all__ = ['Contractions', 'Program', 'Site', 'Walk', 'contractions', 'evaluate', 'follow', 'operands', 'replace', 'trace', 'walk']
