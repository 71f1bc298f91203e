"""Tests models that work by differences of frames, and sparse models whose tokens the full model checks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from sparsejax import activation, formats
from sparsejax.activation.correcting import accepted, probabilities

W = jnp.asarray([[1.0, -1.0], [0.5, 2.0]])
FRAMES = jnp.asarray([[1, 2], [1.04, 2.5], [1.08, 2.5], [1.21, 2.38]])
# The products of [1, 2], [1, 2.5], [1, 2.5] and [1.21, 2.38], which a threshold of 0.1 sends.
OUTPUTS = [[2, 3], [2.25, 4], [2.25, 4], [2.4, 3.55]]


def product(params, x):
  return x @ params['w']


def test_small_changes_are_not_sent_until_they_add_up():
  start, step = activation.delta(product, 0.1)
  params = {'w': formats.ActiveArray.of(W)}
  y, state = kernels_pallas.packed(start)(params, FRAMES[:1])
  found = [y]
  for frame in FRAMES[1:]:
    y, state = jax.jit(kernels_pallas.packed(step))(params, state, frame[None])
    found.append(y)
    sent, = state.values()
    assert np.all(np.abs(sent.x - frame[None]) < 0.1)
  np.testing.assert_allclose(jnp.concatenate(found), OUTPUTS, atol=1e-5)


def network(params, x):
  h = jax.nn.relu(x @ params['a'] + params['bias'][None])
  return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params['stack'])[0]


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS = {'a': drawn(0, 3, 4), 'bias': drawn(1, 4), 'stack': drawn(2, 2, 4, 4)}


def test_without_a_threshold_a_network_on_a_stream_is_the_network_and_biases_count_once():
  start, step = activation.delta(network, 0.0)
  frames = drawn(3, 3, 2, 3)
  _, state = start(PARAMS, frames[0])
  assert sorted(state) == ['a/0', 'stack/0/0', 'stack/0/1']
  for frame in frames[1:]:
    y, state = step(PARAMS, state, frame)
    np.testing.assert_allclose(y, network(PARAMS, frame), atol=1e-5)
  with pytest.raises(ValueError, match='the state has no entry of a/0 with an input of shape'):
    step(PARAMS, state, frames[0, :1])


def test_the_penalty_is_the_mean_change_of_inputs_and_training_lowers_it():
  loss = lambda params: activation.temporal_l1(network, params, (FRAMES[:2] @ jnp.ones((2, 3)),),
                                               (FRAMES[1:3] @ jnp.ones((2, 3)),))
  value, slope = jax.value_and_grad(loss)(PARAMS)
  lower = loss(jax.tree.map(lambda w, g: w - 0.01 * g, PARAMS, slope))
  assert float(lower) < float(value)
  same = activation.temporal_l1(network, PARAMS, (jnp.ones((2, 3)),), (jnp.ones((2, 3)),))
  assert float(same) == 0.0


class Cache(NamedTuple):
  """A `Cache` holds the tokens that were read, and how many count."""

  tokens: jax.Array
  length: jax.Array


def model(vocabulary, wrong=()):
  """Returns a step of a model that counts up, and after the tokens `wrong` goes wrong with a weak second choice."""
  def step(params, tokens, cache):
    held = jax.lax.dynamic_update_slice(cache.tokens, tokens, (cache.length,))
    following = jax.nn.one_hot((tokens + 1) % vocabulary, vocabulary) * 9
    mistaken = jax.nn.one_hot((tokens + 2) % vocabulary, vocabulary) * 9
    odd = jnp.isin(tokens, jnp.asarray(wrong, jnp.int32))[:, None]
    return jnp.where(odd, mistaken, following), Cache(held, cache.length + len(tokens))

  return step


@pytest.mark.parametrize('threshold, tokens', [(0.1, range(3, 15)), (0.0, [3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 15, 0])])
def test_the_full_model_takes_back_what_it_finds_unlikely(threshold, tokens):
  """The sparse model skips a token after 5 and after 9. With a threshold of 0 every draft is accepted."""
  generate = jax.jit(activation.corrected(model(16, wrong=(5, 9)), model(16), period=4, threshold=threshold),
                     static_argnums=3)
  found = generate(None, jnp.int32(3), Cache(jnp.zeros(24, jnp.int32), jnp.int32(0)), 12)
  assert found.tokens.tolist() == list(tokens) and int(found.cache.length) == 12
  assert found.cache.tokens[:12].tolist() == list(tokens)
  assert (int(found.rounds) > 3) == (threshold > 0) and int(found.accepted) >= 12


def test_tokens_are_accepted_up_to_the_first_unlikely_one():
  assert int(accepted(jnp.asarray([0.9, 0.6, 0.3, 0.8]), 0.5)) == 2
  np.testing.assert_allclose(probabilities(jnp.log(jnp.asarray([[0.25, 0.75]])) * 0.6, jnp.asarray([1]), 0.6), [0.75],
                             rtol=1e-6)
  with pytest.raises(ValueError, match='`steps` must be a whole number'):
    activation.corrected(model(4), model(4))(None, jnp.int32(0), None, 0)
