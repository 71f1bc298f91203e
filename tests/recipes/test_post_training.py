"""Checks that every recipe of pruning runs on a program, with exact counts, kept arguments and a full report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
import sparsejax as sj
from sparsejax import formats, recipes, sensitivities


def apply(params, x):
  return jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


def drawn(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {'up': {'kernel': drawn(0, 8, 12)}, 'down': {'kernel': drawn(1, 12, 4)}}
BATCHES = [drawn(2, 32, 8), drawn(3, 32, 8)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize('name', recipes.POST_TRAINING)
def test_every_recipe_prunes_a_program(name):
  options = {'ecoflap': {'sensitivity': {'up/kernel': 1.0, 'down/kernel': 1.0}},
             'gqsa': {'pattern': sj.Block((2, 1), 0.5, balanced=True)},
             'armor': {'block': 4, 'iterations': 5, 'learning_rate': 1e-2}}.get(name, {})
  out = sj.prune(apply, PARAMS, BATCHES, recipes.POST_TRAINING[name](sparsity=0.5, **options), where=sj.trees.matrices)
  if name == 'armor':
    return check_wrapped(out)
  for layer, mask in out.masks.items():
    kept, w = np.asarray(mask['kernel']), np.asarray(out.params[layer]['kernel'])
    assert kept.sum() == w.size // 2 and not np.any(w[~kept]) and np.isfinite(w).all()


def check_wrapped(out):
  """A wrapped parameter runs through `packed` like its dense product, is stored, and is closer than the core alone."""
  assert out.masks == {'up': {'kernel': True}, 'down': {'kernel': True}} and out.report.achieved == 0.5
  expected = apply(formats.unpack(out.params), BATCHES[0])
  np.testing.assert_allclose(kernels_pallas.packed(apply)(out.params, BATCHES[0]), expected, rtol=1e-4, atol=1e-5)
  uses = kernels_pallas.packed(apply, explain=True)(out.params, BATCHES[0])
  assert {use.op for use in uses} == {'wrapped_matmul'}
  assert all(row.after < row.before for row in out.report.rows)


def test_zeroth_order_shares_keep_more_of_the_layer_that_matters():
  loss = lambda params, x: jnp.sum(params['up']['kernel']) + 0.001 * jnp.sum(params['down']['kernel']) + 0 * jnp.sum(x)
  scores = sensitivities.zeroth_order(loss, PARAMS, BATCHES, jax.random.key(0))
  recipe = recipes.ecoflap(scores, 0.5, most=0.75, pattern=sj.Unstructured())
  out = sj.prune(apply, PARAMS, BATCHES, recipe, where=sj.trees.matrices)
  up, down = (int(np.sum(out.masks[name]['kernel'])) for name in ('up', 'down'))
  assert up + down == 72 and down == 12
