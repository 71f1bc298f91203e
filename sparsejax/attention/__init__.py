"""Finds attention in programs, and says which blocks of keys each block of queries sees.

    run = attended(model.apply, answer)               # calls `answer(site)` at each attention of the program
    index = of_mask(sliding(256, block=64)(site).mask)        # the blocks that a builder keeps, as lists

`kernels_pallas.sparse_attention(apply, builder)` runs a program with the blocks of a builder.
"""

from sparsejax.attention.edits import EDITS, ScoreEdit
from sparsejax.attention.features import kernel_features, orthogonal, scatter
from sparsejax.attention.learned import distillation, gated_blocks, init_gates, kept_of_ratio
from sparsejax.attention.masks import (
  BlockIndex,
  BlockMask,
  Builder,
  band,
  columns,
  empty,
  full,
  of_mask,
  sharded,
  sliding,
  strided,
  union,
)
from sparsejax.attention.mixing import kronecker, kronecker_by_powers, shift, two_pass_softmax
from sparsejax.attention.routing import (
  lsh,
  page_scores,
  pool,
  predicted,
  predicted_scores,
  quest,
  routed,
  windows,
)
from sparsejax.attention.searching import found, given, measured, of_choice, search
from sparsejax.attention.sites import AttentionSite, UnreadAttention, attended

__all__ = [
  'EDITS', 'AttentionSite', 'BlockIndex', 'BlockMask', 'Builder', 'ScoreEdit', 'UnreadAttention', 'attended', 'band',
  'columns', 'distillation', 'empty', 'found', 'full', 'gated_blocks', 'given', 'init_gates', 'kept_of_ratio',
  'kernel_features', 'kronecker', 'kronecker_by_powers', 'lsh', 'measured', 'of_choice', 'of_mask', 'orthogonal',
  'page_scores', 'pool', 'predicted', 'predicted_scores', 'quest', 'routed', 'scatter', 'search', 'sharded', 'shift',
  'sliding', 'strided', 'two_pass_softmax', 'union', 'windows',
]
