"""Trains a layer by the coordinates of compressed columns, as docs/packed.md says, without any array of its size."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import formats


def test_coordinates_give_the_gradient_of_the_dense_layer_and_no_dense_array():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(9, 7)) * (rng.random((9, 7)) < 0.3), jnp.float32)
  packed, x = formats.CSCArray.from_dense(w, axes=0), jnp.asarray(rng.normal(size=(5, 9)), jnp.float32)

  def layer(values, x):
    return jax.ops.segment_sum(values * x[packed.rows], packed.cols, 7, indices_are_sorted=True)

  def gradient(values, xs):
    one = jax.grad(lambda values, x: jnp.sum(jnp.square(layer(values, x))))
    return jax.lax.scan(lambda total, x: (total + one(values, x), None), jnp.zeros_like(values), xs)[0]

  dense = jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(w)
  np.testing.assert_allclose(gradient(packed.values, x), dense[packed.rows, packed.cols], rtol=1e-5, atol=1e-5)
  text = str(jax.make_jaxpr(gradient)(packed.values, x))
  assert 'f32[9,7]' not in text and 'f32[7,9]' not in text and 'f32[63]' not in text
