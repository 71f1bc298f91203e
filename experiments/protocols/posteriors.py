"""Trains sparse Gaussian posteriors on the digits, and sparse models with clustered zeros.

With `posterior` the recipe's sparsity is that of `recipes.ssvi`, and the prediction averages `samples` draws. `score`
is `accuracy`, `calibration` (1 minus the expected calibration error) or `runs`: 1 minus the number of runs of zeros
over the number of weights.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import optimizers
from experiments.models.perceptron import forward, start
from experiments.protocols.fitting import both_splits, chance, cross_entropy, optimised, optimizer, right
from sparsejax import bayes, metrics, recipes, trees
from sparsejax.types import Array, PyTree

SIZES = {'width': 100, 'samples': 10, 'divergence': 0.01}
RUN = {'posterior': False, 'measure': 'accuracy'}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the score, and beside it accuracy, calibration error and runs of zeros."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  params = start(seed, sizes['width'])
  if own['posterior']:
    probabilities, params = _posterior(config, sizes, recipe, params, train, test, key)
  else:
    params, _ = optimised(cross_entropy, optimizer(config, recipe, {'key': key}), params, train, config, key)
    probabilities = jax.nn.softmax(forward(params, test[0]))
  found = {'accuracy': right(probabilities, test[1]), 'ece': float(metrics.calibration(probabilities, test[1]).ece),
           'runs': runs_of_zeros(params)}
  score = {'accuracy': found['accuracy'], 'calibration': 1 - found['ece'], 'runs': 1 - found['runs']}
  return {'score': score[own['measure']], 'quality': found['accuracy'], 'chance': chance(test[1]), **found}


def _posterior(config: Any, sizes: Mapping[str, Any], recipe: Mapping[str, Any], params: PyTree, train: Any, test: Any,
               key: Array) -> tuple[Array, PyTree]:
  """Returns the mean probabilities of several draws, and the means of the posterior."""
  weights = bayes.gaussian(params, key)
  inner = optimizers.make(total_steps=config.steps, **config.optimizer)[1]
  options = {name: value for name, value in recipe.items() if name in ('every', 'fraction')}
  tx = recipes.ssvi(inner, recipe['sparsity'], total_steps=config.steps, key=key, **options) if (
      recipe.get('sparsity')) else recipes.dense(inner)

  def loss(weights: PyTree, batch: Any, key: Array, step: Array) -> Array:
    warm = jnp.minimum(2 * step / config.steps, 1)
    beta = sizes['divergence'] / len(train[1]) * warm
    return cross_entropy(bayes.sample(weights, key), batch, key, step) + beta * bayes.kl(weights)

  weights, _ = optimised(loss, tx, weights, train, config, key)
  draw = lambda key: jax.nn.softmax(forward(bayes.sample(weights, key), test[0]))
  return jnp.mean(jax.vmap(draw)(jax.random.split(key, sizes['samples'])), 0), bayes.means(weights)


def runs_of_zeros(params: PyTree) -> float:
  """Returns the number of maximal runs of zeros along the contraction, over the number of weights."""
  paths, leaves, _ = trees.flatten(params)
  zeros = [np.asarray(w) == 0 for path, w in zip(paths, leaves) if path.endswith('kernel')]
  begins = sum(int(z[0].sum() + (z[1:] & ~z[:-1]).sum()) for z in zeros)
  return begins / sum(z.size for z in zeros)
