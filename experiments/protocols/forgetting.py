"""Makes a trained model forget, and compares it with a model retrained under the same mask without the examples.

The score is 1 minus the gap: the mean of the differences of four metrics, each from 0 to 1. `unlearn` is how the model
forgets: `finetune` on the retained examples, or `l1` with a fading l1 penalty.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models.perceptron import forward, start
from experiments.protocols.fitting import both_splits, chance, cross_entropy, optimised, optimizer, right
from sparsejax import recipes, unlearning
from sparsejax.types import Array, PyTree

SIZES = {'width': 100, 'forget': 0.1, 'rate': 0.01, 'penalty': 5e-4}
RUN = {'unlearn': 'finetune'}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns 1 minus the gap, the lower test accuracy of both models, and the metrics of the model that forgot."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  forget = np.random.default_rng(seed).permutation(len(train[1]))[:round(sizes['forget'] * len(train[1]))]
  parts = unlearning.parted(len(train[1]), [int(i) for i in forget])
  kept, gone = (tuple(x[rows] for x in train) for rows in parts)
  salted = lambda salt: jax.random.fold_in(key, salt)
  fit = lambda tx, params, data, salt: optimised(cross_entropy, tx, params, data, config, salted(salt))[0]
  dense = fit(optimizer(config, {'name': 'dense'}), start(seed, sizes['width']), train, 0)
  sparsity = recipe.get('sparsity', 0.0)
  ticket = lambda: recipes.iterative_magnitude(optimizer(config, {'name': 'dense'}), sparsity, ticket=dense)
  original = fit(ticket(), dense, train, 1)
  sgd = optax.sgd(sizes['rate'], 0.9)
  unlearner = (recipes.l1_sparse(sgd, sparsity, ticket=original, penalty=sizes['penalty'], total_steps=config.steps)
               if own['unlearn'] == 'l1' else recipes.iterative_magnitude(sgd, sparsity, ticket=original))
  changed = fit(unlearner, original, kept, 2)
  again = fit(ticket(), start(1000 + seed, sizes['width']), kept, 3)
  found, wanted = (measured(params, kept, gone, test) for params in (changed, again))
  return {'score': 1 - unlearning.gap(found, wanted), 'quality': min(found['test'], wanted['test']),
          'chance': chance(test[1]), **found}


def measured(params: PyTree, kept: Any, gone: Any, test: Any) -> dict[str, float]:
  """Returns accuracies on retained and test examples, the error on forgotten ones, and the share of them not told."""
  confidence = lambda data: jnp.max(jax.nn.softmax(forward(params, data[0])), -1)
  accuracy = lambda data: right(forward(params, data[0]), data[1])
  told: Array = unlearning.membership(confidence(kept), confidence(test), confidence(gone))
  return {'retained': accuracy(kept), 'test': accuracy(test), 'forgotten': 1 - accuracy(gone), 'outside': float(told)}
