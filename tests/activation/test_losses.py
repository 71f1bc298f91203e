"""Tests the router and the losses of BlockFFN against numbers that the authors' functions print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import activation

RAW = jnp.asarray([[1, -1, 0.5, 0], [0.5, 0.2, -0.3, -0.1], [-1, 2, 0.1, -0.2], [0.3, 0.3, 0.3, 0.3]])


def test_gates_are_normed_scores_of_the_experts_that_relu_leaves():
  found = activation.relu_router(RAW, jnp.eye(4), 2 * jnp.ones(4))
  np.testing.assert_allclose(found.gates[0], [2 * 1.78885, 0, 2 * 0.89443, 0], rtol=1e-5)
  np.testing.assert_allclose(activation.used(RAW)[0], [0.66666, 0, 0.33333, 0], atol=1e-5)
  np.testing.assert_array_equal(found.raw, RAW)


@pytest.mark.parametrize('length, loss, unused', [(2, 0.40921, 0.125), (4, 0.66920, 0.0), (1, None, 0.375)])
def test_chunks_use_as_many_experts_as_the_authors_count(length, loss, unused):
  assert float(activation.chunk_sparsity(RAW > 0, length)) == unused
  if loss is not None:
    assert float(activation.chunk_loss(activation.used(RAW), length)) == pytest.approx(loss, abs=1e-5)


def test_padding_uses_no_expert_and_a_gradient_pushes_shares_down():
  p, valid = activation.used(RAW), jnp.arange(4) < 2
  assert float(activation.chunk_loss(p, 4, valid)) == pytest.approx(float(activation.chunk_loss(p[:2], 2)), abs=5e-5)
  assert np.all(jax.grad(lambda p: activation.chunk_loss(p, 2))(p) >= 0)


@pytest.mark.parametrize('sharpness, loss', [(100.0, 29.19267), (5.0, 1.59103)])
def test_neighbours_that_use_other_experts_are_penalised(sharpness, loss):
  raw = RAW.at[0, 3].set(-0.01)
  assert float(activation.locality_loss(raw, sharpness)) == pytest.approx(loss, rel=1e-5)
  two = jnp.concatenate([raw, -raw])
  ids = jnp.arange(8) // 4
  apart = (activation.locality_loss(raw, sharpness) + activation.locality_loss(-raw, sharpness)) / 2
  np.testing.assert_allclose(activation.locality_loss(two, sharpness, ids), apart, rtol=1e-5)


def test_the_weight_waits_then_follows_the_loss_on_ramps_up_to_four_times_the_first():
  losses = [1.0] * 6 + [1.001] * 2 + [2.0] * 2 + [0.5] * 2 + [0.5] * 2 + [50.0] * 2 + [50.0] * 3
  step = jax.jit(lambda state, loss: activation.adapted(state, loss, begin=4, window=2))
  state, seen = activation.AdaptiveWeight.of(0.1), []
  for loss in losses:
    state = step(state, jnp.float32(loss))
    seen.append(float(state.weight))
  aims = [0.1, 0.1025, 0.1025 * 2 / 1.001, 0.1025 * 0.5 / 1.001, 0.1025 * 0.5 / 1.001, 0.4]
  np.testing.assert_allclose(seen[:6], 0.1, rtol=1e-6)
  np.testing.assert_allclose(seen[7::2][:6], aims, rtol=1e-4)  # each window ends where the ramp before has led
  np.testing.assert_allclose(seen[8], (aims[0] + aims[1]) / 2, rtol=1e-5)


@pytest.mark.parametrize('call', [lambda: activation.chunk_loss(RAW, 3), lambda: activation.chunk_sparsity(RAW > 0, 3)])
def test_chunks_that_do_not_divide_the_tokens_are_refused(call):
  with pytest.raises(ValueError, match=r'locality_loss: raw of shape \(1, 4\) .* two tokens or more'):
    activation.locality_loss(jnp.ones((1, 4)))
  with pytest.raises(ValueError, match='chunks of 3 tokens do not divide 4 tokens'):
    call()
