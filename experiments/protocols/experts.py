"""Trains a mixture of experts on the digits, with a routing of static capacity.

`gate` is `top_k`, `switch`, `comet`, `dense_to_sparse` or `softmax`. The balance alone trains the gate of `top_k` with
one expert, whose weight is 1. The gate `switch` weights by the softmax of all logits, so that the task trains it too.
`rectified` fills vacant slots and computes dropped examples in additional slots. The capacity of both gates is the even
load times `slack`. The dense phase of `dense_to_sparse`, and the gate `comet`, have a slot for every example.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.protocols.fitting import both_splits, chance, optimised, optimizer, right
from sparsejax import moe, schedules
from sparsejax.types import Array, PyTree

SIZES = {'experts': 8, 'k': 1, 'width': 16, 'slack': 1.0, 'balance': 0.01, 'entropy': 0.05}
RUN = {'gate': 'top_k', 'rectified': False}


def gate_of(name: str, sizes: Mapping[str, Any], steps: int) -> Any:
  """Returns the gate of a run; the soft phase of `dense_to_sparse` is the first half of the updates."""
  return {'switch': lambda: moe.top_k(sizes['k'], normalised=False), 'top_k': lambda: moe.top_k(sizes['k']),
          'softmax': moe.softmax,
          'comet': lambda: moe.comet(sizes['k'], sizes['experts'], penalty=sizes['entropy'] / sizes['balance']),
          'dense_to_sparse': lambda: moe.dense_to_sparse(
              schedules.linear(2.0, 0.3, end=steps // 2), hard_from=steps // 2)}[name]()


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy on the test images, and beside it active experts an image and dropped pairs."""
  (train, test), key = both_splits(config), jax.random.key(seed)
  gate = gate_of(own['gate'], sizes, config.steps)
  params = trained_mixture(config, sizes, own, recipe, train, key)
  logits, _, (active, dropped) = answers(params, test[0], gate, own, sizes, None, config.steps)
  return {'score': right(logits, test[1]), 'chance': chance(test[1]), 'active': active, 'dropped': dropped}


def trained_mixture(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any],
                    train: Any, key: Array) -> PyTree:
  """Returns the parameters of the gate and of the experts after training on images and labels."""
  gate = gate_of(own['gate'], sizes, config.steps)

  def loss(params: PyTree, batch: Any, key: Array, step: Array) -> Array:
    logits, penalty, _ = answers(params, batch[0], gate, own, sizes, key, step)
    task = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return task + sizes['balance'] * penalty

  return optimised(loss, optimizer(config, recipe), _start(key, own, sizes), train, config, key)[0]


def _start(key: Array, own: Mapping[str, Any], sizes: Mapping[str, Any]) -> PyTree:
  experts, width = sizes['experts'], sizes['width']
  outputs = sizes['k'] * (2 * experts - 1) if own['gate'] == 'comet' else experts
  init, (a, b, c) = jax.nn.initializers.he_normal(batch_axis=0), jax.random.split(key, 3)
  return {'gate': {'kernel': 0.1 * jax.random.normal(a, (64, outputs))},
          'up': {'kernel': init(b, (experts, 64, width))}, 'down': {'kernel': init(c, (experts, width, 10))}}


def answers(params: PyTree, x: Array, gate: Any, own: Mapping[str, Any], sizes: Mapping[str, Any], key: Any, step: Any
             ) -> Any:
  """Returns logits, the penalty of the gate, and the mean number of active experts with the number of dropped pairs."""
  weights, penalty = gate(x @ params['gate']['kernel'], key, step)
  even = moe.capacity_of(len(x), sizes['experts'], sizes['k'], sizes['slack'])
  routing = moe.plan(weights, even if own['gate'] in ('switch', 'top_k') else len(x))
  if own['rectified']:
    scores = jax.nn.softmax(x @ params['gate']['kernel'])
    here = jnp.zeros(len(x), jnp.int32)
    routing = moe.local(routing, weights, scores, jnp.zeros(sizes['experts'], jnp.int32), here, even)
    routing = moe.renormalised(moe.fill_in(routing, scores), len(x))
  experts = {'up': params['up']['kernel'], 'down': params['down']['kernel']}
  y = moe.mixture(lambda own, rows: jax.nn.relu(rows @ own['up']) @ own['down'], experts, x, routing)
  return y, penalty, (jnp.mean(jnp.sum(weights != 0, -1)), routing.dropped)
