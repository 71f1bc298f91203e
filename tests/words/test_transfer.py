"""Tickets for another task: the map of the authors' code, and a border that alone is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import transfer

PREDICTED, LABELS = [3, 3, 1, 1, 1, 0, 3, 2], jnp.asarray([0, 0, 0, 1, 1, 1, 2, 2])


def test_the_map_of_the_authors_code():
  """[run]: printed by the function of Reprogram_LT."""
  logits = jax.nn.one_hot(jnp.asarray(PREDICTED), 4)
  assert transfer.frequency_map(logits, LABELS, 3).tolist() == [3, 1, 2]


def test_no_class_is_taken_twice_also_without_votes():
  for seed in range(4):
    logits = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 6)))
    assert len(set(transfer.frequency_map(logits, jnp.zeros(5, jnp.int32), 6).tolist())) == 6


def test_a_border_is_around_the_image_and_alone_gets_gradient():
  x, prompt = jnp.full((2, 3, 2, 1), 7.0), jnp.zeros((6, 4, 1))
  image = transfer.prompted(x, prompt)
  np.testing.assert_array_equal(image[:, 2:5, 1:3], x)
  assert float(jnp.sum(image)) == 2 * (6 * 7 + 18 * 0.5)
  grad = jax.grad(lambda p: jnp.sum(transfer.prompted(x, p, squashed=False)))(prompt)
  assert not grad[2:5, 1:3].any() and float(jnp.sum(grad)) == 2 * 18


@pytest.mark.parametrize('call, why', [
    (lambda: transfer.frequency_map(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), 4), 'at least as many source classes'),
    (lambda: transfer.frequency_map(jnp.ones((2, 3)), jnp.zeros(3, jnp.int32), 2), r'labels of shape \(3,\)'),
    (lambda: transfer.frequency_map(jnp.ones((2, 3)), jnp.array([0, 2]), 2), 'from 0 to 2; give integers from 0 to 1'),
    (lambda: transfer.frequency_map(jnp.ones((2, 3)), jnp.ones(2), 2), 'labels of float32'),
    (lambda: transfer.prompted(jnp.ones((1, 4, 4, 1)), jnp.ones((4, 4, 1))), 'a larger'),
    (lambda: transfer.prompted(jnp.ones((4, 4)), jnp.ones((6, 6, 1))), 'a larger'),
    (lambda: transfer.prompted(jnp.ones((1, 4, 4, 3)), jnp.ones((6, 6, 1))), 'a larger')])
def test_shapes_that_do_not_fit_are_refused(call, why):
  with pytest.raises(ValueError, match=f'^transfer.*{why}'):
    call()
