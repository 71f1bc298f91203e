"""Checks that fine-tuning keeps given masks, whoever made them, and lowers the loss that pruning raised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import losses, recipes


def drawn(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def states(params, x):
  hidden = jnp.tanh(x @ params['up']['kernel'] + params['up']['bias'][None])
  return [hidden, hidden @ params['down']['kernel']]


def test_fine_tuning_with_squarehead_keeps_the_masks_of_pruning_and_recovers_outputs():
  dense = {'up': {'kernel': drawn(0, 12, 16), 'bias': np.zeros(16, np.float32)}, 'down': {'kernel': drawn(1, 16, 4)}}
  masks = {'up': {'kernel': drawn(2, 12, 16) > 0, 'bias': True}, 'down': {'kernel': drawn(3, 16, 4) > 0}}
  params = jax.tree.map(lambda w, mask: jnp.where(mask, w, 0), dense, masks)
  tx, x = recipes.fixed(optax.sgd(1.0), masks), drawn(4, 64, 12)
  loss = lambda p: losses.squarehead(states(p, x), states(dense, x))

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    moves, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, moves), state), value

  (after, state), values = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 40))((params, tx.init(params)))
  assert values[-1] < 0.7 * values[0]
  for name in ('up', 'down'):
    zeros = ~masks[name]['kernel']
    assert not np.any(np.asarray(after[name]['kernel'])[zeros]) and np.all(np.asarray(after[name]['kernel'])[~zeros])
    assert np.array_equal(sj.masks(after, state)[name]['kernel'], masks[name]['kernel'])
  assert np.any(np.asarray(after['up']['bias']))


def test_masks_are_bools():
  with pytest.raises(ValueError, match=r"recipes.fixed: parameter 'w' of shape \(2, 2\): dtype float32 is no mask"):
    recipes.fixed(optax.sgd(0.1), {'w': jnp.ones((2, 2))})
