"""Gates of experts: the numbers of the authors' code, exact zeros, weights that sum to one, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import moe

SPLITS = [[.6, -.7, .2], [-.1, .9, -.8]]
LEAVES = [[.1, .2, .3, .4], [0, -.2, .5, .1]]


def trees(splits=SPLITS):
  return jnp.concatenate([jnp.asarray(splits).reshape(-1), jnp.asarray(LEAVES).reshape(-1)])[None]


def test_smooth_step():
  """[run]: the authors' function."""
  found = moe.smooth_step(jnp.asarray([-.6, .6, -.25, .25, .1]))
  np.testing.assert_allclose(found, [0, 1, .15625, .84375, .648], atol=1e-6)


def test_comet_gives_the_numbers_of_the_authors_code():
  """[run]: two trees over four experts, and the second tree with another root."""
  weights, penalty = moe.comet(2, 4)(trees(), None, 0)
  np.testing.assert_allclose(weights, [[.153742, .533468, 0, .312791]], atol=1e-5)
  assert float(penalty) == pytest.approx(.648673, abs=1e-5) and weights[0, 2] == 0
  sure = moe.comet(2, 4)(trees([SPLITS[0], [-.5, .9, -.8]]), None, 0).weights
  np.testing.assert_allclose(sure, [[0, .524979, 0, .475021]], atol=1e-5)


def test_comet_sums_to_one_and_its_gradient_is_finite_where_leaves_are_not_reached():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2 * 15)), jnp.float32)

  @jax.jit
  def found(logits):
    gated = moe.comet(2, 8)(logits, None, 0)
    return gated.penalty + jnp.sum(gated.weights[:, 0]), jnp.sum(gated.weights, -1)

  (_, sums), grad = jax.value_and_grad(found, has_aux=True)(logits)
  np.testing.assert_allclose(sums, 1, rtol=1e-5)
  assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0)


def test_top_k_keeps_k_with_ties_to_the_lower_and_a_logit_of_zero():
  logits = jnp.asarray([[-1., 0, -1, -2], [1, 1, 1, 0], [jnp.nan, -5, 2, -6]])
  weights = moe.top_k(2)(logits, None, 0).weights
  assert (np.asarray(weights) != 0).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
  np.testing.assert_allclose(jnp.sum(weights, -1), 1, rtol=1e-6)
  even = moe.top_k(1)(10 * jnp.eye(4), None, 0)
  assert float(even.penalty) == pytest.approx(1, abs=1e-3)


def test_the_task_trains_the_gate_of_one_expert_where_its_weight_is_the_softmax_of_all():
  logits = jnp.asarray([[1., 3, 2], [jnp.nan, 0, -1]])
  weights = moe.top_k(1, normalised=False)(logits, None, 0).weights
  np.testing.assert_allclose(weights, [[0, .665241, 0], [0, .731059, 0]], rtol=1e-5)
  slope = lambda **more: jax.grad(lambda x: jnp.sum(moe.top_k(1, **more)(x, None, 0).weights))(logits[:1])
  assert slope(normalised=False).all() and not slope().any()


def test_dense_to_sparse_gives_the_numbers_of_the_authors_code():
  """[run]: EvoMoE's gate with this noise already added, at three temperatures."""
  logits = jnp.asarray([[1, .5, -1, 0], [0, 3, 0, 0]]) + jnp.asarray([[0, .3, .2, -.1], [.1, 0, 0, .4]])
  for tau, chosen, wanted in ((2., [4, 4], 4.), (.3, [4, 1], 3.332511), (.05, [2, 1], 3.017986)):
    weights, penalty = moe.dense_to_sparse(tau, noisy=True)(logits, None, 0)
    assert (np.asarray(weights) != 0).sum(-1).tolist() == chosen
    assert float(penalty) == pytest.approx(wanted, abs=1e-5)
  tau = optax.exponential_decay(2.0, 1000, 0.15, end_value=0.3)
  np.testing.assert_allclose([tau(t) for t in (0, 250, 500, 1000, 2000)], [2, 1.244666, .774597, .3, .3], atol=1e-5)


def test_dense_to_sparse_ends_with_one_expert_at_its_plain_softmax():
  logits = jnp.asarray([[1., .5, -1, 0]])
  gate = moe.dense_to_sparse(lambda step: 2.0, hard_from=5)
  soft, hard = (gate(logits, jax.random.key(0), step).weights for step in (4, 5))
  np.testing.assert_allclose(soft, jax.nn.softmax(logits), rtol=1e-6)
  assert int(jnp.sum(hard != 0)) == 1
  np.testing.assert_allclose(jnp.sum(hard), jnp.sum(jnp.where(hard != 0, jax.nn.softmax(logits), 0)), rtol=1e-6)


def test_hashes_spread_tokens_and_repeat():
  ids = jnp.arange(400).reshape(2, 200)
  weights = moe.hashed(4)(ids, None, 0).weights
  assert weights.shape == (2, 200, 4) and 60 < float(jnp.sum(weights, (0, 1)).min()) <= 100
  np.testing.assert_array_equal(weights, moe.hashed(4)(ids, None, 9).weights)
  assert jnp.any(weights != moe.hashed(4, seed=1)(ids, None, 0).weights)


def test_softmax_takes_a_temperature_and_an_activation():
  logits = jnp.asarray([[1., -2.]])
  found = moe.softmax(lambda step: 0.5 * step, jnp.tanh)(logits, None, 4).weights
  np.testing.assert_allclose(found, jax.nn.softmax(jnp.tanh(logits) / 2), rtol=1e-6)


def test_sinkhorn_and_the_assignment():
  """[run]: one sweep of the authors' code, and scipy's assignment."""
  logits = jnp.asarray([[.3, .1, .2], [.5, .4, .1], [.2, .6, .3]])
  np.testing.assert_allclose(moe.sinkhorn(logits, 1.0, 1), [
      [.355264, .281807, .369231], [.375738, .329394, .289297], [.268998, .3888, .341472]], atol=1e-5)
  hard = moe.assigned(logits)
  assert jnp.argmax(hard, 1).tolist() == [2, 0, 1]
  cold = moe.sinkhorn(logits, 1e-3, 20)  # exp(0.6 / 1e-3) overflows
  assert jnp.all(jnp.isfinite(cold)) and float(moe.disorder(hard)) == 0 < float(moe.disorder(moe.sinkhorn(logits, 1.0)))
  weights = jnp.asarray([[1., 0, 0]])
  assert moe.permuted(weights, hard).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize('call, why', [
    (lambda: moe.comet(2, 6), '6 experts; a full binary tree'), (lambda: moe.comet(2, 1), '1 experts; a full binary'),
    (lambda: moe.comet(2, 4)(jnp.ones((3, 13)), None, 0), 'need 14 logits'),
    (lambda: moe.top_k(5)(jnp.ones((2, 4)), None, 0), 'k=5 of 4 experts'),
    (lambda: moe.dense_to_sparse(1.0, 0.3)(jnp.ones((2, 4)), None, 0), 'without any of 4 experts'),
    (lambda: moe.hashed(4)(jnp.ones(3), None, 0), 'integer ids'),
    *((lambda gate=gate: gate(jnp.ones((3, 14), int), None, 0), 'logits of dtype int32; give floating') for gate in (
        moe.softmax(0.5), moe.top_k(1), moe.dense_to_sparse(0.5), moe.comet(2, 4))),
    (lambda: moe.sinkhorn(jnp.ones((2, 3)), 1.0), 'one row and one column'),
    (lambda: moe.permuted(jnp.ones((5, 3)), jnp.eye(4)), 'of the 3 experts')])
def test_what_does_not_fit_is_refused(call, why):
  with pytest.raises(ValueError, match=f'^moe.*{why}'):
    call()
