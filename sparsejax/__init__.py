"""Sparsity for JAX as pure functions over parameter pytrees.

Train: `recipes` wrap an optimizer. Look: `report`, `check`, `masks`, `metrics`. Store: `formats`, `io`. The words of
which recipes are sentences: `trees` (where), `patterns`, `scores`, `allocation`, `schedules`, `flows`, `updates`,
and, of all leaves at once, `selections` and `starts`.
"""

from sparsejax import (
  allocation,
  flows,
  formats,
  io,
  metrics,
  patterns,
  ranking,
  recipes,
  schedules,
  scores,
  selections,
  starts,
  states,
  tracing,
  transforms,
  trees,
  types,
  updates,
)
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.reports import Report, check, report
from sparsejax.states import SparseState, apply_masks, masks, project
from sparsejax.tracing import contractions

__all__ = [
  'NM', 'Block', 'Channel', 'Report', 'SparseState', 'Unstructured', 'allocation', 'apply_masks', 'check',
  'contractions',
  'flows', 'formats', 'io', 'masks', 'metrics', 'patterns', 'project', 'ranking', 'recipes', 'report', 'schedules',
  'scores', 'selections', 'starts', 'states', 'tracing', 'transforms', 'trees', 'types', 'updates',
]
