"""Skips what a token does not need: small inputs of products, and neurons that are switched off.

    small = sj.activation.sparsify(model.apply, variables, batches, sj.activation.wina(0.5))
    y = kernels_pallas.packed(small.apply)(small.params, x)
"""

from sparsejax.activation.allocating import Greedy, greedy
from sparsejax.activation.measuring import SkipReport
from sparsejax.activation.rules import (PerplexityRule, Rest, Rule, TopNeurons, cats, chess, error_bound, ppl, r_sparse,
                                        teal, top_k, wina)
from sparsejax.activation.ruling import ruled
from sparsejax.activation.sparsifying import Rewritten, sparsify

__all__ = [
  'Greedy', 'PerplexityRule', 'Rest', 'Rewritten', 'Rule', 'SkipReport', 'TopNeurons', 'cats', 'chess', 'error_bound',
  'greedy', 'ppl', 'r_sparse', 'ruled', 'sparsify', 'teal', 'top_k', 'wina',
]
