"""Trains, prunes, checks, packs and stores sparse models in JAX, by pure functions over parameter pytrees.

    tx = sparsejax.recipes.sr_ste(optax.adamw(1e-3), sparsejax.NM(2, 4))     # instead of optax.adamw(1e-3)
    print(sparsejax.report(params, opt_state))                               # asked and achieved sparsity
    pruned = sparsejax.prune(model.apply, params, batches, recipe)           # a trained model, in one call
    sparsejax.io.save('model.safetensors', sparsejax.formats.pack(params, sparsejax.NM(2, 4)))

Modules import only from the lines above their own:

- The ground: `types` holds the shared types and signatures, `errors` the texts of refusals, `tables` the printing of
  tables. `conventions` says what names and containers tell about axes, and `trees` names the leaves of a pytree.
  `ranking` selects an exact number of the largest scores, and `counts` turns a sparsity into an exact number.
- `programs` reads JAX programs: the axes that each product contracts, and the collectives of a compiled step.
- The words, one module each: `patterns`, `scores`, `allocation`, `schedules`, `flows`, `updates`, `starts`, `metrics`.
- `formats` packs pruned parameters into smaller arrays.
- `states` holds masks and master weights in the optimizer state. `selections` chooses the masks of all leaves.
- `collectives` sends rows and packed weights between devices, and `pipelines` splits a backward pass.
- `moe` routes tokens to experts, so that what is not routed is not computed.
- `graphs` ranks edges, `unlearning` and `transfer` use trained sparse models further, `inits` has initializers.
- `post_training` prunes trained models: `prune` with a few batches of data, `prune_weights` without.
- `structured` finds units that can be removed, and removes them from parameters and programs.
- `activation` skips what a token does not need: small inputs of products, and neurons that are switched off.
- `attention` finds attention in programs, and says which blocks of keys are computed.
- `transforms` makes optax transforms of words, and `recipes` has the methods of papers as sentences of words.
- The tools: `report` and `check` verify parameters, `advise` predicts speed, `io` reads and writes files, `plot`
  draws pictures, and `progress` tells how far a long call is. The command line (`sparsejax --help`) offers the tools
  on checkpoints.

`docs/words.md` explains every noun of the library in one line.
"""

from sparsejax import (
  activation,
  advice,
  allocation,
  attention,
  bayes,
  calibration,
  collectives,
  conditional,
  continual,
  flows,
  formats,
  gates,
  graphs,
  inits,
  io,
  losses,
  metrics,
  moe,
  packing,
  patterns,
  penalties,
  pipelines,
  plot,
  post_training,
  programs,
  progress,
  ranking,
  recipes,
  saliences,
  schedules,
  scores,
  selections,
  sensitivities,
  starts,
  states,
  structured,
  tokens,
  transfer,
  transforms,
  trees,
  types,
  units,
  unlearning,
  updates,
)
from sparsejax.advice import Advice, advise
from sparsejax.patterns import NM, Block, Channel, Unstructured
from sparsejax.post_training import prune, prune_weights
from sparsejax.programs import contractions
from sparsejax.reports import Report, check, report
from sparsejax.states import SparseState, apply_masks, masks, project
from sparsejax.version import __version__ as __version__

__all__ = [
  'Advice', 'Block', 'Channel', 'NM', 'Report', 'SparseState', 'Unstructured', 'activation', 'advice', 'advise',
  'allocation', 'apply_masks', 'attention', 'bayes', 'calibration', 'check', 'collectives', 'conditional',
  'continual', 'contractions', 'flows', 'formats', 'gates', 'graphs', 'inits', 'io', 'losses', 'masks', 'metrics',
  'moe', 'packing', 'patterns', 'penalties', 'pipelines', 'plot', 'post_training', 'programs', 'progress', 'project',
  'prune', 'prune_weights', 'ranking', 'recipes', 'report', 'saliences', 'schedules', 'scores', 'selections',
  'sensitivities', 'starts', 'states', 'structured', 'tokens', 'transfer', 'transforms', 'trees', 'types', 'units',
  'unlearning', 'updates',
]
