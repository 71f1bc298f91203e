"""Averages two sparse solutions: two retrainings of one ticket, or two that were trained and pruned independently.

The score is the accuracy of the model in the middle. Beside it stand the barrier of the test loss, the largest barrier
of a single layer, and the mean sharpness of the layers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models.perceptron import forward, start
from experiments.protocols.fitting import both_splits, chance, cross_entropy, optimised, optimizer, right
from sparsejax import metrics, recipes
from sparsejax.types import PyTree

SIZES = {'width': 100, 'rho': 0.1}
RUN = {'members': 'soup'}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracies of the midpoint and of the worse end of the line, the barriers and the sharpness."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  fit = lambda tx, params, salt: optimised(cross_entropy, tx, params, train, config, jax.random.fold_in(key, salt))[0]
  dense = lambda seed, salt: fit(optimizer(config, {'name': 'dense'}), start(seed, sizes['width']), salt)

  def member(ticket: PyTree, salt: int) -> PyTree:
    inner = optimizer(config, {'name': 'dense'})
    return fit(recipes.iterative_magnitude(inner, recipe.get('sparsity', 0.0), ticket=ticket), ticket, salt)

  first = dense(seed, 0)
  other = first if own['members'] == 'soup' else dense(1000 + seed, 1)
  a, b = member(first, 2), member(other, 3)
  loss = lambda params: cross_entropy(params, test, key, jnp.zeros(()))
  middle = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
  sharp = metrics.sharpness(loss, a, sizes['rho'], key)
  layers = metrics.layer_barriers(loss, a, b)
  tested = lambda params: right(forward(params, test[0]), test[1])
  return {'score': tested(middle), 'quality': min(map(tested, (a, b))), 'chance': chance(test[1]),
          'barrier': metrics.barrier(loss, a, b).height, 'layer': max(float(each.height) for each in layers.values()),
          'sharpness': sum(map(float, sharp.values())) / len(sharp)}
