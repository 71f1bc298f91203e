"""Sparse attention: finds attention in programs, and says which blocks of keys each block of queries sees.

    run = attended(model.apply, answer)               # calls `answer(site)` at each attention of the program
    index = of_mask(sliding(256, block=64)(site).mask)        # the blocks that a builder keeps, as lists

`kernels_pallas.sparse_attention(apply, builder)` runs a program with the blocks of a builder.
"""

from sparsejax.attention.edits import EDITS, ScoreEdit
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
  together,
)
from sparsejax.attention.sites import AttentionSite, UnreadAttention, attended

__all__ = [
  'EDITS', 'AttentionSite', 'BlockIndex', 'BlockMask', 'Builder', 'ScoreEdit', 'UnreadAttention', 'attended', 'band',
  'columns', 'empty', 'full', 'of_mask', 'sharded', 'sliding', 'strided', 'together',
]
