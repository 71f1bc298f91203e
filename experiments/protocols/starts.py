"""Trains the perceptron of the digits from a random start, or from that of ZerO, which draws nothing.

With a `pruned` above 0 the score is the accuracy after the smallest magnitudes were pruned once, without training on.
"""

from collections.abc import Mapping
from typing import Any

import jax

from experiments.models.perceptron import forward, start
from experiments.protocols.fitting import both_splits, chance, cross_entropy, optimised, optimizer, right
from sparsejax import Unstructured, inits, prune_weights, trees

SIZES = {'width': 64}
RUN = {'start': 'random', 'pruned': 0.0}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy on the test images, and that before any pruning."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  params = start(seed, sizes['width'])
  if own['start'] == 'zero':
    params = jax.tree.map(lambda w: inits.zero()(None, w.shape) if w.ndim == 2 else w, params)
  params, _ = optimised(cross_entropy, optimizer(config, recipe, {'key': key}), params, train, config, key)
  tested = lambda params: right(forward(params, test[0]), test[1])
  quality = tested(params)
  if own['pruned']:
    params = prune_weights(params, Unstructured(own['pruned']), where=trees.matrices).params
  return {'score': tested(params), 'quality': quality, 'chance': chance(test[1])}
