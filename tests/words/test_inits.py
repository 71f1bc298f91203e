"""ZerO's start: the authors' numbers, full rank where a layer widens, and the centre of a convolution."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import inits

H = 0.353553
# [run]: printed by the authors' function for matrices `[out, in]`, here transposed.
GOLDEN = {
    (3, 2): [[1, 0], [0, 1], [0, 0]], (2, 3): [[.5, .5, .5], [.5, -.5, .5]],
    (2, 4): [[.5, .5, .5, .5], [.5, -.5, .5, -.5]], (2, 5): [[H] * 5, [H, -H, H, -H, H]],
}


@pytest.mark.parametrize('shape', GOLDEN)
def test_numbers_of_the_authors(shape):
  np.testing.assert_allclose(inits.zero()(None, shape), GOLDEN[shape], atol=1e-6)


def test_a_widening_layer_has_full_rank_and_a_square_one_is_the_identity():
  wide = np.asarray(inits.zero()(None, (6, 11)))
  assert np.linalg.matrix_rank(wide) == 6 and len(np.unique(np.abs(wide))) == 1
  np.testing.assert_array_equal(inits.zero()(None, (5, 5), jnp.bfloat16), np.eye(5))
  np.testing.assert_array_equal(inits.zero()(None, (1, 1)), [[1]])


def test_a_convolution_has_the_matrix_at_its_centre_alone():
  kernel = np.array(inits.zero()(None, (3, 3, 2, 3)))
  np.testing.assert_allclose(kernel[1, 1], GOLDEN[2, 3])
  kernel[1, 1] = 0
  assert not kernel.any()


@pytest.mark.parametrize('shape, dtype', [((), 'float32'), ((3,), 'float32'), ((2, 2), 'int32')])
def test_other_shapes_and_dtypes_are_refused(shape, dtype):
  with pytest.raises(ValueError, match='inits.zero: shape .* a bias starts at zero'):
    inits.zero()(None, shape, dtype)
