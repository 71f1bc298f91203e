"""TEDDY is iterative hard thresholding, and unlearning with l1 fades by the authors' numbers: both against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import recipes

pytestmark = pytest.mark.usefixtures('standard_promotion')
PARAMS = {'kernel': jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32), 'bias': jnp.ones(4)}


def loss(params, i):
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), jnp.float32) * (1 + i)
  return jnp.mean(jnp.square(x @ params['kernel'] + params['bias'][None] - 1))


def thresholded(params, zeros):
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  order = jnp.argsort(jnp.abs(flat), stable=True)
  return unravel(flat.at[order[:zeros]].set(0))


def test_teddy_thresholds_all_parameters_together_and_lets_zeros_return():
  adam = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(0.1))
  tx = recipes.teddy(adam, 0.6)
  params, state, own, slots = PARAMS, tx.init(PARAMS), PARAMS, adam.init(PARAMS)
  update, plain, grad = jax.jit(tx.update), jax.jit(adam.update), jax.jit(jax.grad(loss))
  alive = []
  for i in range(12):
    moves, state = update(grad(params, 0.1 * i), state, params)
    params = optax.apply_updates(params, moves)
    moves, slots = plain(grad(own, 0.1 * i), slots, own)
    own = thresholded(optax.apply_updates(own, moves), round(0.6 * 28))
    np.testing.assert_allclose(params['kernel'], own['kernel'], atol=1e-5)
    alive.append(np.asarray(params['kernel'] != 0))
    assert sum(int(jnp.sum(w == 0)) for w in params.values()) == 17
  assert any((later & ~sooner).any() for sooner, later in zip(alive, alive[1:]))


def test_l1_unlearning_fades_linearly_and_keeps_the_zeros_of_the_ticket():
  """[run]: alpha 5e-4 over 3 epochs is 5e-4, 3.333e-4, 1.667e-4."""
  tx = recipes.l1_sparse(optax.sgd(1.0), 0.5, ticket=PARAMS, total_steps=3)
  state = tx.init(PARAMS)
  params = sj.project(PARAMS, state)
  for wanted in (5e-4, 3.3333e-4, 1.6667e-4):
    moves, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(moves['kernel'], -wanted * np.sign(params['kernel']), rtol=1e-3)
    assert not moves['bias'].any()
    params = optax.apply_updates(params, moves)
  assert int(jnp.sum(params['kernel'] == 0)) == 12


def test_a_sparsity_that_leaves_nothing_is_refused():
  for asked in (dict(sparsity=1.0), dict(pattern=sj.Unstructured(1.0))):
    with pytest.raises(ValueError, match='recipes.teddy: a sparsity of 1 leaves no parameter of the model'):
      recipes.teddy(optax.sgd(1.0), **asked)


def test_a_negative_penalty_is_refused():
  with pytest.raises(ValueError, match='recipes.l1_sparse: `penalty` must be a finite number, at least 0, not -1'):
    recipes.l1_sparse(optax.sgd(1.0), 0.5, penalty=-1)
