"""Sparsity for JAX as pure functions over parameter pytrees.

Train: `recipes` wrap an optimizer. Look: `report`, `check`, `masks`, `metrics`; ahead: `advise`. Store: `formats`,
`io`. The words of which recipes are sentences: `trees` (where), `patterns`, `scores`, `allocation`, `schedules`,
`flows`, `updates`, and, of all leaves at once, `selections` and `starts`.
"""

from sparsejax import (
  advice,
  allocation,
  flows,
  formats,
  io,
  metrics,
  patterns,
  programs,
  ranking,
  recipes,
  schedules,
  scores,
  selections,
  starts,
  states,
  transforms,
  trees,
  types,
  updates,
)
from sparsejax.advice import Advice, advise
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.programs import contractions
from sparsejax.reports import Report, check, report
from sparsejax.states import SparseState, apply_masks, masks, project

__all__ = [
  'NM', 'Advice', 'Block', 'Channel', 'Report', 'SparseState', 'Unstructured', 'advice', 'advise', 'allocation',
  'apply_masks', 'check', 'contractions',
  'flows', 'formats', 'io', 'masks', 'metrics', 'patterns', 'programs', 'project', 'ranking', 'recipes', 'report',
  'schedules', 'scores', 'selections', 'starts', 'states', 'transforms', 'trees', 'types', 'updates',
]
