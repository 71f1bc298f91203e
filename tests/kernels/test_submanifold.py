"""Tests the convolution at active places against the dense convolution of the same grid, masked to these places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import submanifold


@pytest.mark.parametrize('grid, kernel', [((9, 7), (3, 3)), ((9, 7), (5, 1)), ((4, 5, 6), (3, 3, 3))])
def test_it_equals_the_dense_convolution_masked_to_the_active_places(grid, kernel):
  rng = np.random.default_rng(0)
  active = rng.random(grid) < 0.3
  places = rng.permutation(np.argwhere(active)) - 2  # any origin, any order
  x, w = rng.normal(size=(len(places), 4)).astype('f'), rng.normal(size=(int(np.prod(kernel)), 4)).astype('f')
  point = rng.normal(size=(4, 6)).astype('f')
  table = submanifold.places_of(places, kernel)
  dense = np.zeros((1, *grid, 4), 'f')
  dense[0][tuple((places + 2).T)] = x
  letters = 'HWD'[:len(grid)]
  full = jax.lax.conv_general_dilated(dense, w.reshape(*kernel, 1, 4), (1,) * len(grid), 'SAME', feature_group_count=4,
                                      dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'))
  expected = np.asarray(full)[0][tuple((places + 2).T)]
  np.testing.assert_allclose(submanifold.depthwise_at(x, w, table), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(submanifold.separable(x, w, point, table), expected @ point, rtol=1e-4, atol=1e-4)


def test_it_has_a_nineteenth_of_the_parameters_and_a_gradient():
  assert 27 * 32 + 32 * 64 == 2912 and 27 * 32 * 64 == 55296
  table = submanifold.places_of(np.array([[0, 0], [0, 1]]), (3, 3))
  slope = jax.grad(lambda w: jnp.sum(submanifold.depthwise_at(jnp.ones((2, 1)), w, table)))(jnp.zeros((9, 1)))
  assert slope[:, 0].tolist() == [0, 0, 0, 1, 2, 1, 0, 0, 0]
  assert submanifold.places_of(np.zeros((0, 2), int), (3, 3)).shape == (0, 9)


@pytest.mark.parametrize('call, said', [
  (lambda: submanifold.places_of(np.zeros((2, 2), int), (3, 3)), 'occurs twice'),
  (lambda: submanifold.places_of(np.zeros((2, 3), int), (3, 3)), 'whole numbers'),
  (lambda: submanifold.places_of(np.zeros((1, 2), int), (2, 3)), 'are odd'),
  (lambda: submanifold.depthwise_at(jnp.ones((1, 2)), jnp.ones((9, 3)), jnp.zeros((1, 9), int)), r'kernel \[9, 2\]'),
])
def test_bad_input_is_refused_in_words(call, said):
  with pytest.raises(ValueError, match=said):
    call()
