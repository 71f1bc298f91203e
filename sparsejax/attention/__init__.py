"""Sparse attention: finds attention in programs, and says which blocks of keys each block of queries sees.

    run = attended(model.apply, answer)               # calls `answer(site)` at each attention of the program
"""

from sparsejax.attention.edits import EDITS, ScoreEdit
from sparsejax.attention.sites import AttentionSite, UnreadAttention, attended

__all__ = ['EDITS', 'AttentionSite', 'ScoreEdit', 'UnreadAttention', 'attended']
