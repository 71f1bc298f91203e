"""Uses tickets of the digits 0 to 4 for the digits 5 to 9, of which few examples have labels.

`use` is `probe`, a new head on frozen features, or `prompt`, a trained border around the image and a map of labels. The
score is the accuracy on the target, or with `measure` `calibration` 1 minus the expected calibration error.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models.perceptron import forward, start
from experiments.protocols.fitting import both_splits, chance, optimised, optimizer, right
from sparsejax import metrics, recipes, transfer
from sparsejax.types import Array, PyTree

SIZES = {'width': 100, 'shots': 10, 'side': 12, 'rate': 0.01}
RUN = {'use': 'probe', 'measure': 'accuracy'}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the score on the target, and the accuracy on the source."""
  (train, test), key, side = both_splits(config), jax.random.key(seed), sizes['side']
  larger = lambda x: jax.image.resize(x.reshape(-1, 8, 8, 1), (len(x), side, side, 1), 'linear').reshape(len(x), -1)
  source = lambda data: (larger(data[0][data[1] < 5]), data[1][data[1] < 5])
  target = lambda data: (data[0][data[1] >= 5], data[1][data[1] >= 5] - 5)
  loss = lambda params, batch, key, step: _loss(forward(params, batch[0]), batch[1])
  salted = lambda salt: jax.random.fold_in(key, salt)
  fit = lambda tx, params, data, salt, loss=loss: optimised(loss, tx, params, data, config, salted(salt))[0]
  dense = fit(optimizer(config, {'name': 'dense'}), start(seed, sizes['width'], side * side, 5), source(train), 0)
  ticket = recipes.iterative_magnitude(optimizer(config, {'name': 'dense'}), recipe.get('sparsity', 0.0), ticket=dense)
  frozen = fit(ticket, dense, source(train), 1)
  few = _few(target(train), sizes['shots'], seed)
  logits = {'probe': _probed, 'prompt': _prompted}[own['use']](frozen, few, larger, fit, sizes)(target(test)[0])
  labels = target(test)[1]
  error = metrics.calibration(jax.nn.softmax(logits), labels).ece
  accuracy = right(logits, labels)
  score = accuracy if own['measure'] == 'accuracy' else 1 - error
  return {'score': score, 'quality': accuracy, 'chance': chance(labels), 'ece': error,
          'source': right(forward(frozen, source(test)[0]), source(test)[1])}


def _loss(logits: Array, labels: Array) -> Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _few(data: Any, shots: int, seed: int) -> Any:
  rng = np.random.default_rng(seed)
  rows = np.concatenate([rng.permutation(np.flatnonzero(np.asarray(data[1]) == c))[:shots] for c in range(5)])
  return tuple(x[rows] for x in data)


def _probed(frozen: PyTree, few: Any, larger: Any, fit: Any, sizes: Mapping[str, Any]) -> Any:
  """Returns the function from images to logits with a new last layer, the only one that is trained."""
  body = {name: layer for name, layer in frozen.items() if name != 'layer_2'}
  whole = lambda head, x: forward({**body, 'layer_2': head}, larger(x))
  zero = jax.tree.map(jnp.zeros_like, frozen['layer_2'])
  head = fit(recipes.dense(optax.adam(sizes['rate'])), zero, few, 2, lambda head, batch, key, step: _loss(
      whole(head, batch[0]), batch[1]))
  return lambda x: whole(head, x)


def _prompted(frozen: PyTree, few: Any, larger: Any, fit: Any, sizes: Mapping[str, Any]) -> Any:
  """Returns the function from images to logits with a trained border, and labels mapped by frequency at the start."""
  side = sizes['side']

  def whole(prompt: Array, x: Array) -> Array:
    return forward(frozen, transfer.prompted(x.reshape(-1, 8, 8, 1), prompt).reshape(len(x), -1))

  first = jnp.zeros((side, side, 1))
  chosen = transfer.frequency_map(whole(first, few[0]), few[1], 5)
  prompt = fit(recipes.dense(optax.adam(sizes['rate'])), first, few, 2, lambda prompt, batch, key, step: _loss(
      whole(prompt, batch[0])[:, chosen], batch[1]))
  return lambda x: whole(prompt, x)[:, chosen]
