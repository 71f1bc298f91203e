"""Trains a mixture of experts over embeddings to say whether a user likes a film: the ratings of MovieLens-100K.

`gate` is `comet`, `top_k` or `hashed`, by the number of the film. With `searched` the first part of the updates learns
a permutation of the experts as well (COMET+, Ibrahim et al. 2023, 2306.02824), which is fixed afterwards.

The score is the area under the ROC curve over a fifth of the ratings, the same for all seeds. Beside it stand `active`,
the mean number of experts with a weight, and `work`: the FLOPs of the compiled prediction over those of all experts for
all rows. The prediction has as many slots an expert as its fullest expert needs, so that nothing is dropped.

Deviations: the authors choose among many settings, of which their `gamma` is 10. The optimizer starts anew after the
search, and the number of sweeps is fixed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn import metrics as judges

from experiments import configs
from experiments.data import movielens
from experiments.protocols.fitting import optimised, optimizer, splits, work
from experiments.protocols.recommended import tables
from sparsejax import moe
from sparsejax.types import Array, PyTree

SIZES = {'experts': 16, 'k': 2, 'width': 32, 'hidden': 32, 'gamma': 1.0, 'entropy': 1.0, 'balance': 0.01,
         'search': 0.05, 'disorder': 1e-4, 'deviation': 0.1}
RUN = {'gate': 'comet', 'searched': False}
COLD, HOT = 1e-7, 1e-3  # the temperatures of the search, from hot to cold


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the area under the curve, the mean number of active experts, and the share of work."""
  read, key = splits(config), jax.random.key(seed)
  train, test = ((*jnp.asarray(pairs).T, jnp.asarray(stars >= movielens.LIKED, jnp.float32)) for pairs, stars in read)
  model = Mixture(own['gate'], sizes)
  params = model.start(key, movielens.counts(*(pairs for pairs, _ in read)))
  permutation, updates = jnp.eye(sizes['experts']), config.steps
  if own['searched']:
    searching = configs.merged(config, {'steps': max(round(sizes['search'] * config.steps), 1)})
    params, logits = _searched(model, searching, recipe, params, train, jax.random.fold_in(key, 1))
    permutation, updates = moe.assigned(logits), config.steps - searching.steps
  rest = configs.merged(config, {'steps': updates})
  loss = lambda params, batch, key, step: model.loss(params, batch, permutation, key, step)
  params, _ = optimised(loss, optimizer(rest, recipe, {'key': key}), params, train, rest, key)
  return _tested(model, params, permutation, test)


def _searched(model: 'Mixture', config: Any, recipe: Mapping[str, Any], params: PyTree, train: Any, key: Array
              ) -> tuple[PyTree, Array]:
  """Returns parameters after the search, and the logits of the permutation."""
  falling = lambda step: HOT * (COLD / HOT) ** (step / config.steps)

  def loss(both: PyTree, batch: Any, key: Array, step: Array) -> Array:
    soft = moe.sinkhorn(both['logits'] / falling(step), 1.0)
    return model.loss(both['params'], batch, soft, key, step) + model.sizes['disorder'] * moe.disorder(soft)

  experts = model.sizes['experts']
  both = {'params': params, 'logits': HOT * jax.random.normal(key, (experts, experts))}
  both, _ = optimised(loss, optimizer(config, recipe, {'key': key}), both, train, config, key)
  return both['params'], both['logits']


def _tested(model: 'Mixture', params: PyTree, permutation: Array, test: Any) -> dict[str, float]:
  """Returns the numbers of a trained model on all ratings of the test."""
  weights = moe.permuted(model.gated(params, test, None, 0)[0], permutation)
  slots = int(jnp.max(jnp.sum(weights != 0, 0)))
  predicted = lambda slots: lambda params, batch: model.logits(params, batch, permutation, slots=slots)
  logits = jax.jit(predicted(slots))(params, test)
  whole = work(predicted(len(test[0])), params, test)
  return {'score': float(judges.roc_auc_score(test[2], logits)), 'chance': 0.5,
          'active': float(jnp.mean(jnp.sum(weights != 0, -1))), 'work': work(predicted(slots), params, test) / whole}


class Mixture:
  """A `Mixture` is a model of two-layer experts over the embeddings of a user and a film, with a gate by its name."""

  def __init__(self, gate: str, sizes: Mapping[str, Any]):
    self.sizes, self.hashed = sizes, gate == 'hashed'
    k, experts = sizes['k'], sizes['experts']
    self.gate, self.outputs, self.penalty = {
        'comet': (moe.comet(k, experts, sizes['gamma']), k * (2 * experts - 1), sizes['entropy']),
        'top_k': (moe.top_k(k), experts, sizes['balance']), 'hashed': (moe.hashed(experts), experts, 0.0)}[gate]

  def start(self, key: Array, counts: tuple[int, int]) -> PyTree:
    """Returns the initial parameters; those of the gate are uniform and small, as the authors draw them."""
    experts, width, hidden = (self.sizes[name] for name in ('experts', 'width', 'hidden'))
    keys = jax.random.split(key)
    init, (a, b, c) = jax.nn.initializers.he_normal(batch_axis=0), jax.random.split(keys[1], 3)
    most = self.sizes['gamma'] / 100
    return {**tables(keys[0], counts, width, self.sizes['deviation']),
            'gate': {'kernel': jax.random.uniform(a, (2 * width, self.outputs), minval=-most, maxval=most)},
            'up': {'kernel': init(b, (experts, 2 * width, hidden))},
            'down': {'kernel': init(c, (experts, hidden, 1))}}

  def gated(self, params: PyTree, batch: Any, key: Any, step: Any) -> tuple[Array, Array]:
    """Returns weights `[batch, experts]` and the penalty of the gate."""
    return self.gate(batch[1] if self.hashed else self._inputs(params, batch) @ params['gate']['kernel'], key, step)

  def logits(self, params: PyTree, batch: Any, permutation: Array, key: Any = None, step: Any = 0,
             slots: int | None = None) -> Array:
    """Returns a logit for each row, with `slots` rows an expert; the default computes all experts for all rows."""
    return self._forward(params, batch, permutation, key, step, slots)[0]

  def loss(self, params: PyTree, batch: Any, permutation: Array, key: Array, step: Array) -> Array:
    """Returns the mean cross-entropy plus the penalty of the gate."""
    logits, penalty = self._forward(params, batch, permutation, key, step, None)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch[2])) + self.penalty * penalty

  def _inputs(self, params: PyTree, batch: Any) -> Array:
    return jnp.concatenate([params['users']['embedding'][batch[0]], params['items']['embedding'][batch[1]]], -1)

  def _forward(self, params: PyTree, batch: Any, permutation: Array, key: Any, step: Any, slots: int | None
               ) -> tuple[Array, Array]:
    weights, penalty = self.gated(params, batch, key, step)
    weights, x = moe.permuted(weights, permutation), self._inputs(params, batch)
    experts = {name: params[name]['kernel'] for name in ('up', 'down')}
    run = lambda own, rows: jax.nn.relu(rows @ own['up']) @ own['down']
    if slots is None:  # while a permutation is soft, no weight is zero
      return jnp.einsum('te,eto->t', weights, jax.vmap(run, (0, None))(experts, x)), penalty
    return moe.mixture(run, experts, x, moe.plan(weights, slots))[:, 0], penalty
