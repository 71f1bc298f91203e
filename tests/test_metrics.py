"""Metrics against numpy, and operations counted from a traced program against the formulas by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax as sj
from sparsejax import metrics


def test_density_counts_what_is_not_zero():
  w = jnp.asarray([[0.0, -0.0, 1.0, jnp.nan]])
  params = {'a': {'w': w}, 'b': jnp.zeros((3, 5), jnp.bfloat16), 'c': jnp.ones(())}
  found = jax.jit(metrics.density)(params)
  assert {path: float(x) for path, x in found.items()} == {'a/w': 0.5, 'b': 0.0, 'c': 1.0}
  assert all(x.dtype == jnp.float32 and x.shape == () for x in found.values())


def test_density_of_many_weights_is_not_rounded_away():
  """2^25 + 1 ones are not countable one by one in float32; the fraction has to be right to its own precision."""
  w = jnp.ones((2**25 + 8,), jnp.bfloat16).at[: 2**24].set(0)
  np.testing.assert_allclose(metrics.density({'w': w})['w'], (2**24 + 8) / (2**25 + 8), rtol=1e-6)


def test_sad_counts_differing_bits_and_their_share():
  rng = np.random.default_rng(0)
  before, after = rng.random((2, 2, 12, 5)) < 0.5
  masks = lambda m: {'x': jnp.asarray(m[0]), 'y': [jnp.asarray(m[1, :3])], 'dense': jnp.ones((), bool)}
  found = jax.jit(metrics.sad)(masks(before), masks(after))
  assert set(found) == {'x', 'y/0'}  # what is dense has no mask
  np.testing.assert_array_equal(found['x'].count, np.sum(before[0] != after[0]))
  np.testing.assert_allclose(found['x'].fraction, np.mean(before[0] != after[0]), rtol=1e-6)
  np.testing.assert_array_equal(found['y/0'].count, np.abs(before[1, :3].astype(int) - after[1, :3].astype(int)).sum())
  assert metrics.sad(masks(before), masks(before))['x'] == (0.0, 0.0)


def test_sad_takes_the_masks_of_a_state():
  params = {'w': jnp.arange(1.0, 17.0).reshape(4, 4), 'b': jnp.ones(4)}
  tx = sj.recipes.ste(optax.sgd(1.0), sj.NM(2, 4))
  state = tx.init(params)
  before = sj.masks(params, state)
  grads = {'w': jnp.zeros((4, 4)).at[3, 0].set(100.0).at[0, 1].set(100.0), 'b': jnp.zeros(4)}
  updates, state = tx.update(grads, state, params)
  after = sj.masks(optax.apply_updates(params, updates), state)
  # Column 0 kept 9 and 13; 13 - 100 is the largest still. Column 1 kept 10 and 14; 2 - 100 comes in for 10.
  assert metrics.sad(before, after) == {'w': (2.0, 2 / 16)}


def test_gradient_variance_is_numpys_over_kept_and_pruned():
  rng = np.random.default_rng(0)
  g, m = rng.normal(size=(8, 6)).astype(np.float32) * 1e-3 + 1, rng.random((8, 6)) < 0.3
  grads = {'w': jnp.asarray(g), 'b': jnp.ones(3)}
  found = jax.jit(metrics.gradient_variance)(grads, {'w': jnp.asarray(m), 'b': jnp.ones((), bool)})
  assert set(found) == {'w'}
  # Two passes: one pass in float32 would lose a variance of 1e-6 beside a mean of 1.
  expected = [np.abs(part).var(dtype=np.float64) for part in (g[m], g[~m])]
  np.testing.assert_allclose(found['w'], expected, rtol=1e-4)
  everything = metrics.gradient_variance(grads, {'w': jnp.ones((8, 6), bool), 'b': jnp.ones((), bool)})['w']
  np.testing.assert_allclose(everything.kept, g.var(dtype=np.float64), rtol=1e-4)
  assert np.isnan(everything.pruned)
  narrow = metrics.gradient_variance({'w': grads['w'].astype(jnp.bfloat16)}, {'w': jnp.asarray(m)})['w']
  assert narrow.kept.dtype == jnp.float32


def mlp(params, x):
  """`[4, 8] -> [4, 16] -> [4, 2]`, and a product of activations with themselves."""
  hidden = jnp.maximum(x @ params['up']['kernel'], 0)
  attended = (hidden @ hidden.T) @ hidden
  return attended @ params['down']['kernel']


PARAMS = {'up': {'kernel': jnp.zeros((8, 16))}, 'down': {'kernel': jnp.zeros((16, 2))}}
UP, DOWN, OTHER = 4 * 8 * 16, 4 * 16 * 2, 2 * 4 * 16 * 4  # multiply-adds


@pytest.fixture(scope='module')
def traced():
  return sj.contractions(mlp, PARAMS, jnp.zeros((4, 8)))


def test_flops_of_a_dense_program_are_twice_its_multiply_adds(traced):
  found = metrics.flops(traced)
  assert found.inference == found.dense_inference == 2 * (UP + DOWN + OTHER)
  assert found.training == found.dense_training == 6 * (UP + DOWN + OTHER)


@pytest.mark.parametrize('densities', [
    {'up/kernel': 0.25, 'down/kernel': 0.5}, {'params/up/kernel': 0.25, 'params/down/kernel': 0.5},
    {'up/kernel': np.float32(0.25), 'down/kernel': jnp.float32(0.5)}])
@pytest.mark.parametrize('input_gradient', ['sparse', 'dense'])
def test_flops_follow_the_densities(traced, densities, input_gradient):
  back = (0.25, 0.5) if input_gradient == 'sparse' else (1.0, 1.0)
  found = metrics.flops(traced, densities, input_gradient=input_gradient)
  assert found.inference == 2 * (0.25 * UP + 0.5 * DOWN + OTHER)
  assert found.training == 2 * ((0.25 + back[0] + 1) * UP + (0.5 + back[1] + 1) * DOWN + 3 * OTHER)
  assert found.dense_training == 6 * (UP + DOWN + OTHER) and found.dense_inference == 2 * (UP + DOWN + OTHER)


def test_flops_leave_alone_what_has_no_density(traced):
  assert metrics.flops(traced, {'up/kernel': 0.0}).inference == 2 * (DOWN + OTHER)
  assert metrics.flops(traced, {'kernel': 0.0, 'elsewhere': 0.0}).inference == 2 * OTHER
  with pytest.raises(ValueError, match="metrics.flops: input_gradient is 'sparse' or 'dense', not 'both'"):
    metrics.flops(traced, input_gradient='both')


def test_flops_take_the_density_of_a_trained_model(traced):
  tx = sj.recipes.ste(optax.sgd(1.0), sj.NM(1, 4))
  params = jax.tree.map(lambda w: jax.random.normal(jax.random.key(0), w.shape), PARAMS)
  sparse = sj.project(params, jax.jit(tx.init)(params))
  found = metrics.flops(traced, metrics.density(sparse))
  assert found.inference == 2 * (0.25 * (UP + DOWN) + OTHER)
