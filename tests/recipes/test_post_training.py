"""Checks that every recipe of pruning runs on a program, with exact counts, kept arguments and a full report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import recipes, sensitivities


def apply(params, x):
  return jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


def drawn(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {'up': {'kernel': drawn(0, 8, 12)}, 'down': {'kernel': drawn(1, 12, 4)}}
BATCHES = [drawn(2, 32, 8), drawn(3, 32, 8)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize('name', recipes.POST_TRAINING)
def test_every_recipe_prunes_a_program(name):
  options = {'sensitivity': {'up/kernel': 1.0, 'down/kernel': 1.0}} if name == 'ecoflap' else {}
  out = sj.prune(apply, PARAMS, BATCHES, recipes.POST_TRAINING[name](sparsity=0.5, **options), where=sj.trees.matrices)
  for layer, mask in out.masks.items():
    kept, w = np.asarray(mask['kernel']), np.asarray(out.params[layer]['kernel'])
    assert kept.sum() == w.size // 2 and not np.any(w[~kept]) and np.isfinite(w).all()


def test_zeroth_order_shares_keep_more_of_the_layer_that_matters():
  loss = lambda params, x: jnp.sum(params['up']['kernel']) + 0.001 * jnp.sum(params['down']['kernel']) + 0 * jnp.sum(x)
  scores = sensitivities.zeroth_order(loss, PARAMS, BATCHES, jax.random.key(0))
  recipe = recipes.ecoflap(scores, 0.5, most=0.75, pattern=sj.Unstructured())
  out = sj.prune(apply, PARAMS, BATCHES, recipe, where=sj.trees.matrices)
  up, down = (int(np.sum(out.masks[name]['kernel'])) for name in ('up', 'down'))
  assert up + down == 72 and down == 12
