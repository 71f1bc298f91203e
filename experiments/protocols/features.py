"""Selects features by the strengths of a sparse denoising autoencoder, and classifies with the selected ones alone.

The score is the accuracy of 50 extremely randomised trees, the judge of QuickSelection (Atashgahi et al. 2022,
2012.00560), on held-out examples. `chosen` says how features are selected: by the `strength` of the first layer of the
trained autoencoder, by `variance`, at `random`, or `all` of them. The labels are read by the trees alone. The last
three train nothing.

The data are those of the config. `useful` says how many of the first features carry the classes, where that is known.
`informative` beside the score is then their share among the selected features.

Deviations: the trees are judged on the test images, without dropout and tanh in the autoencoder. The noise is drawn
once for each example, as in the authors' code.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.protocols.fitting import chance, optimised, optimizer, splits
from sparsejax import errors, metrics
from sparsejax.types import Array, PyTree

SIZES = {'width': 200, 'features': 12, 'noise': 0.2, 'trees': 50, 'useful': 0}
RUN = {'chosen': 'strength'}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy of trees on the selected features, and the share of these that is useful, where known."""
  if own['chosen'] not in RANKS:
    raise errors.unknown('protocols.features', 'chosen', own['chosen'], RANKS)
  train, test = splits(config)
  count = train[0].shape[1]
  if not 1 <= sizes['features'] <= count:
    raise ValueError(f'protocols.features: features={sizes["features"]} of data that have {count}; select from 1 to '
                     f'{count}.')
  rank = RANKS[own['chosen']](config, sizes, recipe, train[0], seed)
  best = np.arange(count) if rank is None else np.argsort(-rank, kind='stable')[:sizes['features']]
  found = {'score': _judged(train, test, best, sizes['trees'], seed), 'chance': chance(test[1])}
  return found | ({'informative': float(np.mean(best < sizes['useful']))} if sizes['useful'] else {})


def strengths(config: Any, sizes: Mapping[str, Any], recipe: Mapping[str, Any], x: np.ndarray, seed: int) -> np.ndarray:
  """Returns the strength of each feature in the first layer of an autoencoder of the features `[examples, features]`.
  """
  key = jax.random.key(seed)
  deviation = x.std(0)
  clean = jnp.asarray((x - x.mean(0)) / np.where(deviation > 0, deviation, 1), jnp.float32)
  noisy = clean + sizes['noise'] * jax.random.normal(jax.random.fold_in(key, 1), clean.shape)

  def loss(params: PyTree, batch: Any, key: Array, step: Array) -> Array:
    return jnp.mean(jnp.sum(jnp.square(_decoded(params, batch[0]) - batch[1]), -1)) / 2

  first = _start(key, clean.shape[1], sizes['width'])
  params, _ = optimised(loss, optimizer(config, recipe, {'key': key}), first, (noisy, clean), config, key)
  return np.asarray(metrics.strength(params)['encoder/kernel'])


RANKS = {  # each gives a number for each feature, of which the largest are selected, or None for all features
    'strength': strengths, 'variance': lambda config, sizes, recipe, x, seed: x.var(0),
    'random': lambda config, sizes, recipe, x, seed: np.random.default_rng(seed).random(x.shape[1]),
    'all': lambda config, sizes, recipe, x, seed: None}


def _start(key: Array, features: int, width: int) -> PyTree:
  init, (a, b) = jax.nn.initializers.lecun_normal(), jax.random.split(key)
  return {'encoder': {'kernel': init(a, (features, width)), 'bias': jnp.zeros(width)},
          'decoder': {'kernel': init(b, (width, features)), 'bias': jnp.zeros(features)}}


def _decoded(params: PyTree, x: Array) -> Array:
  hidden = jax.nn.sigmoid(x @ params['encoder']['kernel'] + params['encoder']['bias'])
  return hidden @ params['decoder']['kernel'] + params['decoder']['bias']


def _judged(train: Any, test: Any, features: np.ndarray, trees: int, seed: int) -> float:
  """Returns the accuracy of the trees on the test examples, from some features alone."""
  from sklearn import ensemble

  judge = ensemble.ExtraTreesClassifier(trees, random_state=seed).fit(train[0][:, features], train[1])
  return float(judge.score(test[0][:, features], test[1]))
