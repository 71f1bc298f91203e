"""Skips what a token does not need: small inputs of products, and neurons that are switched off.

    small = sj.activation.sparsify(model.apply, variables, batches, sj.activation.wina(0.5))
    y = kernels_pallas.packed(small.apply)(small.params, x)
"""

from sparsejax.activation.allocating import Greedy, greedy
from sparsejax.activation.correcting import CorrectedTokens, corrected
from sparsejax.activation.losses import (
                                         AdaptiveWeight,
                                         RouterScores,
                                         adapted,
                                         chunk_loss,
                                         chunk_sparsity,
                                         locality_loss,
                                         relu_router,
                                         used,
)
from sparsejax.activation.measuring import SkipReport
from sparsejax.activation.rules import (
                                         PerplexityRule,
                                         Rest,
                                         Rule,
                                         TopNeurons,
                                         cats,
                                         chess,
                                         error_bound,
                                         ppl,
                                         r_sparse,
                                         teal,
                                         top_k,
                                         wina,
)
from sparsejax.activation.ruling import ruled
from sparsejax.activation.sparsifying import Rewritten, sparsify, sparsity
from sparsejax.activation.temporal import Sent, delta, temporal_l1

__all__ = [
  'AdaptiveWeight', 'CorrectedTokens', 'Greedy', 'PerplexityRule', 'Rest', 'Rewritten', 'RouterScores', 'Rule', 'Sent',
  'SkipReport', 'TopNeurons', 'adapted', 'cats', 'chess', 'chunk_loss', 'chunk_sparsity', 'corrected', 'delta',
  'error_bound', 'greedy', 'locality_loss', 'ppl', 'r_sparse', 'relu_router', 'ruled', 'sparsify', 'sparsity',
  'teal', 'temporal_l1', 'top_k', 'used', 'wina',
]
