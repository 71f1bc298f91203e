"""Trains a hidden layer of blocks behind stochastic gates, which skip most of the blocks for each image of the digits.

A gater, a hidden layer of its own, gives the logits of the blocks. `gate` is an estimator of `sparsejax.gates`:
`straight_through`, `smooth`, `noisy_rectifier` or `reinforce`; without one all blocks are computed. A penalty pulls the
fraction of images that open a block to `rate`. With a `part` below 1 the layer has fewer blocks.

Training computes every block for every image, because the straight-through gradient of a closed gate needs the block.
The test computes `slots` of the images in each block by `conditional.apply`, and draws its gates as training does. The
score is the accuracy, and `sure` that without chance in the gates. Beside them stand `open`, the fraction of opened
pairs of image and block, and `dropped`, the pairs without a slot. `work` is the FLOPs of the compiled test over those
of all blocks for all images.

Bengio et al. 2013 (1308.3432) train on MNIST; the network and the sizes are ours. A smooth unit is open with the
probability sqrt(p), so that its penalty asks p for the square of `rate`. The baseline of REINFORCE is that of a second
draw of the same batch, where the paper averages over batches.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.protocols.fitting import both_splits, chance, optimised, optimizer, right, work
from sparsejax import conditional, errors, gates
from sparsejax.types import Array, PyTree

SIZES = {'blocks': 32, 'width': 16, 'gater': 32, 'rate': 0.1, 'slots': 0.15, 'penalty': 100.0}
RUN = {'gate': 'straight_through', 'part': 1.0}


def _gate(name: str, rate: float) -> Any:
  """Returns the gate of a run; REINFORCE draws as the others do, and its slope comes from its loss."""
  found = {'straight_through': gates.bernoulli('straight_through', rate=rate),
           'reinforce': gates.bernoulli('straight_through', rate=rate),
           'smooth': gates.bernoulli('smooth', rate=rate**2),
           'noisy_rectifier': gates.noisy_rectifier('logistic', rate=rate)}
  if name not in found:
    raise errors.unknown('protocols.gaters', 'gate', name, found)
  return found[name]


def scores(config: Any, sizes: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], seed: int
           ) -> dict[str, float]:
  """Returns the accuracy on the test images, and of gated networks what was opened, dropped and computed."""
  (train, (x, labels)), key = both_splits(config), jax.random.key(seed)
  gate = own['gate'] and _gate(own['gate'], sizes['rate'])
  loss = functools.partial(_loss, gate, own['gate'] == 'reinforce', sizes['penalty'])
  params, _ = optimised(loss, optimizer(config, recipe, {'key': key}), _start(key, own, sizes), train, config, key)
  if gate is None:
    return {'score': right(_forward(params, x), labels), 'chance': chance(labels)}
  slots = math.ceil(sizes['slots'] * len(x))
  tested = lambda params, x, key: skipping(params, x, gate, key, slots)
  arguments = params, x, jax.random.fold_in(key, config.steps)
  logits, opened, dropped = tested(*arguments)
  return {'score': right(logits, labels), 'chance': chance(labels), 'open': opened, 'dropped': dropped,
          'sure': right(tested(params, x, None)[0], labels),
          'work': work(tested, *arguments) / work(lambda params, x: _forward(params, x), params, x)}


def _forward(params: PyTree, x: Array, weights: Array | None = None) -> Array:
  """Returns the logits of images `[N, 64]`; every block is computed, times its weight in `weights`, `[N, blocks]`."""
  y = jax.vmap(_block, (0, None))(params['blocks'], x)
  return (jnp.sum(y, 0) if weights is None else jnp.einsum('nb,bno->no', weights, y)) + params['bias']


def skipping(params: PyTree, x: Array, gate: Any, key: Array | None, slots: int) -> tuple[Array, Array, Array]:
  """Returns the logits, the fraction of opened pairs, and the number of dropped pairs; closed pairs are skipped."""
  weights = gate(_gated(params, x), key, 0).weights
  y, dropped = conditional.apply(_block, params['blocks'], x, weights, slots)
  return y + params['bias'], jnp.mean(weights != 0), dropped


def _loss(gate: Any, unbiased: bool, asked: float, params: PyTree, batch: Any, key: Array, step: Array) -> Array:
  """Returns the mean loss of a batch, with what the gates add to it."""
  x, labels = batch
  each = lambda weights: optax.softmax_cross_entropy_with_integer_labels(_forward(params, x, weights), labels)
  if gate is None:
    return each(None).mean()
  logits = _gated(params, x)
  weights, penalty = gate(logits, key, step)
  if not unbiased:
    return each(weights).mean() + asked * penalty
  weights = jax.lax.stop_gradient(weights)
  losses = each(weights)
  other = gate(logits, jax.random.fold_in(key, 1), step).weights
  none = jnp.zeros(logits.shape[-1])
  baseline = gates.observed(gates.Baseline(none, none), other, logits, each(other), average=0.0)
  return losses.mean() + gates.reinforce(weights, logits, losses, baseline.value) + asked * penalty


def _block(own: PyTree, rows: Array) -> Array:
  return jax.nn.relu(rows @ own['up']['kernel'] + own['up']['bias']) @ own['down']['kernel']


def _gated(params: PyTree, x: Array) -> Array:
  """Returns the logits of the blocks, `[N, blocks]`."""
  into, out = params['gater']['into'], params['gater']['out']
  return jnp.tanh(x @ into['kernel'] + into['bias']) @ out['kernel'] + out['bias']


def _start(key: Array, own: Mapping[str, Any], sizes: Mapping[str, Any]) -> PyTree:
  """Returns the initial parameters, whose gates open about the asked fraction of the blocks."""
  blocks, width, hidden = max(round(own['part'] * sizes['blocks']), 1), sizes['width'], sizes['gater']
  he, lecun = jax.nn.initializers.he_normal(), jax.nn.initializers.lecun_normal()
  a, b, c, d = jax.random.split(key, 4)
  layer = lambda init, key, *shape: {'kernel': init(key, shape), 'bias': jnp.zeros(shape[1:])}
  up, down = layer(he, a, 64, blocks * width), layer(he, b, blocks * width, 10)
  gater = {'into': layer(lecun, c, 64, hidden), 'out': layer(lecun, d, hidden, blocks)} if own['gate'] else {}
  if gater:
    gater['out']['bias'] += jax.scipy.special.logit(sizes['rate'] ** (2 if own['gate'] == 'smooth' else 1))
  return {'blocks': {'up': {'kernel': jnp.moveaxis(up['kernel'].reshape(64, blocks, width), 1, 0),
                            'bias': up['bias'].reshape(blocks, width)},
                     'down': {'kernel': down['kernel'].reshape(blocks, width, 10)}},
          'bias': down['bias'], 'gater': gater}
