"""Tests the models whose activations are sparse by construction against numbers of the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import crate
from sparsejax.programs import FactRules, follow, trace


def test_a_step_of_sparse_coding_is_that_of_the_authors():
  dictionary = jnp.asarray([[1, 0.5, 0], [0, 1, -0.5], [0.2, 0, 1]])
  found = crate.ista(jnp.asarray([[1, -0.5, 0.3], [0.05, 2, -1]]), dictionary)
  np.testing.assert_allclose(found, [[1.011, 0, 0.2625], [0, 1.89, 0]], atol=1e-6)


def test_subspace_attention_is_that_of_the_authors():
  z = jnp.asarray([[1, 0, 0.5, -0.5], [0, 1, 1, 0], [1, 1, 0, 2]])
  u = jnp.eye(4).reshape(4, 2, 2)
  np.testing.assert_allclose(crate.mssa(z, u, u.transpose(1, 2, 0)), [
      [0.80222, 0.59889, 0.63932, 0.08203], [0.59889, 0.80222, 0.61546, 0.28928], [0.75174, 0.75174, 0.0677, 1.82442]],
      atol=1e-5)


def test_the_coding_rate_is_half_the_log_determinant_of_each_subspace():
  z, u = jnp.asarray([[1.0, 0, 2, 0], [0, 3, 0, 0]]), jnp.eye(4).reshape(4, 2, 2)
  expected = [0.5 * np.log((1 + 4 * 1) * (1 + 4 * 9)), 0.5 * np.log(1 + 4 * 4)]  # d / (T eps^2) = 4
  np.testing.assert_allclose(crate.coding_rate(z, u, 0.5), expected, rtol=1e-5)


def test_groups_of_latents_are_penalised_by_their_norms():
  assert float(crate.latent_groups(jnp.asarray([[3.0, 4, 0, 0]]), 2)) == pytest.approx(5 * 2**0.5, rel=1e-5)
  with pytest.raises(ValueError, match='groups of 3 do not divide 4'):
    crate.latent_groups(jnp.ones((1, 4)), 3)


def test_crate_classifies_and_its_codes_are_nonnegative():
  model = crate.Crate(num_classes=3, width=8, depth=1, heads=2)
  images = jnp.ones((2, 4, 4, 1))
  params = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  params = jax.tree.map(lambda p: jnp.full(p.shape, 0.1), params)
  logits, seen = model.apply({'params': params}, images, mutable=['intermediates'])
  assert logits.shape == (2, 3)
  assert np.all(jax.tree.leaves(seen)[0] >= 0)


@pytest.mark.parametrize('early', [True, False])
def test_the_early_router_reads_nothing_that_attention_computes(early):
  block = crate.EarlyRoutedBlock(early=early)
  x = jnp.ones((1, 3, 4))
  variables = jax.eval_shape(block.init, jax.random.key(0), x)['params']
  routed = lambda p, x: block.apply({'params': p}, x, mutable=['intermediates'])[1]['intermediates']['raw']
  program = trace(routed, (variables, x))
  union = lambda facts: frozenset().union(*facts)
  rules = FactRules(lambda eqn, facts, here: [union(facts)] * len(eqn.outvars), union, constant=frozenset())
  raw, = follow(program, [frozenset({path.split('/')[0]}) for path in program.paths], rules)
  assert ('attention' in raw) == (not early) and 'router' in raw
