"""Selects features by the strengths of a sparse denoising autoencoder, and classifies with the selected ones alone.

The score is the accuracy of 50 extremely randomised trees, the judge of QuickSelection (Atashgahi et al. 2022,
2012.00560), on held-out examples. `chosen` says how features are selected: by the `strength` of the first layer of the
trained autoencoder, by `variance`, at `random`, or `all` of them. The labels are read by the trees alone. The last
three train nothing.

`data` is `digits`, or `madelon`, which scikit-learn draws by the rule of that set: 500 features, of which 20 carry the
two classes. `informative` beside the score is the share of these 20 among the selected features.

Deviations: the trees are judged on the test images, without dropout and tanh in the autoencoder. The noise is drawn
once for each example, as in the authors' code.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.protocols.fitting import both_splits, chance, optimised, optimizer
from sparsejax import errors, metrics
from sparsejax.types import Array, PyTree

SIZES = {'data': 'digits', 'width': 200, 'features': 12, 'noise': 0.2, 'trees': 50}
RUN = {'chosen': 'strength'}
USEFUL, REDUNDANT, FEATURES, EXAMPLES = 5, 15, 500, 2600  # madelon has these for training and validation
CLUSTERS = 15  # of each class; with all 16, scikit-learn would hand out classes by one feature alone

Splits = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def madelon(config: Any) -> Splits:
  """Returns features and labels for training and for test, every fifth example; the 20 useful features come first."""
  from sklearn import datasets  # An import at the top would cost every start of another protocol half a second.

  x, y = datasets.make_classification(
      EXAMPLES, FEATURES, n_informative=USEFUL, n_redundant=REDUNDANT, n_clusters_per_class=CLUSTERS, flip_y=0.01,
      scale=None, shift=None, shuffle=False, random_state=0)
  order = np.random.default_rng(0).permutation(EXAMPLES)
  test, train = order[::5], np.delete(order, slice(None, None, 5))
  return (x[train], y[train]), (x[test], y[test])


def images(config: Any) -> Splits:
  """Returns the digits, or the config's own images of their size."""
  return tuple((np.asarray(x), np.asarray(y)) for x, y in both_splits(config))


DATA = {'digits': images, 'madelon': madelon}


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy of trees on the selected features; with `madelon`, also the share of these that is useful."""
  if sizes['data'] not in DATA:
    raise errors.unknown('protocols.features', 'data', sizes['data'], DATA)
  if own['chosen'] not in RANKS:
    raise errors.unknown('protocols.features', 'chosen', own['chosen'], RANKS)
  train, test = DATA[sizes['data']](config)
  count = train[0].shape[1]
  if not 1 <= sizes['features'] <= count:
    raise ValueError(f'protocols.features: features={sizes["features"]} of {sizes["data"]!r}, which has {count}; '
                     f'select from 1 to {count}.')
  rank = RANKS[own['chosen']](config, sizes, recipe, train[0], seed)
  best = np.arange(count) if rank is None else np.argsort(-rank, kind='stable')[:sizes['features']]
  found = {'score': _judged(train, test, best, sizes['trees'], seed), 'chance': chance(test[1])}
  return found | ({'informative': float(np.mean(best < USEFUL + REDUNDANT))} if sizes['data'] == 'madelon' else {})


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
