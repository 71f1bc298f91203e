"""Tests that products with quantized and wrapped weights equal those of the dense weight, by few tokens and by many."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
import sparsejax as sj
from kernels_pallas import around
from sparsejax import formats
from sparsejax.types import Axes

AXES = Axes((0,), (1, 2))  # a query kernel `[in, heads, dim]`


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rounding(matrix):
  scale = jnp.max(jnp.abs(matrix), 0, keepdims=True) / 7 + 1e-9
  return SimpleNamespace(qvalue=jnp.round(matrix / scale).astype(jnp.int32), scale=scale)


def scaled(pattern):
  w = sj.prune_weights({'kernel': drawn(0, 16, 2, 4)}, pattern, axes={'kernel': AXES}).params
  return formats.Scaled.of(formats.pack(w, pattern, axes={'kernel': AXES})['kernel'], rounding)


def wrapped():
  w = sj.prune_weights({'kernel': drawn(0, 16, 2, 4)}, sj.NM(2, 4), axes={'kernel': AXES}).params
  return formats.Wrapped.of(formats.pack(w, '2:4', axes={'kernel': AXES})['kernel'], drawn(1, 2, 4, 4),
                            drawn(2, 4, 4, 4))


CASES = {'nm': lambda: scaled(sj.NM(2, 4)), 'groups': lambda: scaled(sj.Block((4, 1), 0.5)),
         'uneven groups': lambda: scaled(sj.Block((4, 1), 0.6)), 'wrapped': wrapped}


@pytest.mark.parametrize('tokens', [1, 8])
@pytest.mark.parametrize('name', CASES)
def test_products_and_gradients_are_those_of_the_dense_weight(name, tokens):
  w, x = CASES[name](), drawn(3, tokens, 16)
  apply = lambda p, x: jnp.tanh(jnp.einsum('ti,ihd->thd', x, p['kernel']))
  run = kernels_pallas.packed(apply)
  np.testing.assert_allclose(run({'kernel': w}, x), apply({'kernel': w.to_dense()}, x), rtol=2e-5, atol=1e-5)
  use, = kernels_pallas.packed(apply, explain=True)({'kernel': w}, x)
  assert use.op == ('wrapped_matmul' if name == 'wrapped' else 'scaled_matmul')
  if name.endswith('groups'):
    assert ('once a group' in use.why['cpu'].reason) == (tokens <= 4)
  loss = lambda call: lambda values: jnp.sum(call(formats.with_values({'kernel': w}, values)))
  values = formats.values({'kernel': w})
  ours = jax.grad(loss(lambda p: run(p, x)))(values)['kernel']
  dense = jax.grad(loss(lambda p: apply(formats.unpack(p), x)))(values)['kernel']
  np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-5)


def test_what_no_product_takes_is_refused_with_the_remedy():
  dense = formats.Scaled.of(drawn(0, 16, 8), rounding)
  for op, w, why in [(kernels_pallas.scaled_matmul, dense, 'by a dense array'),
                     (kernels_pallas.scaled_matmul, drawn(0, 4, 4), 'Scaled.of quantizes'),
                     (kernels_pallas.wrapped_matmul, dense, 'recipes.armor makes')]:
    with pytest.raises(ValueError, match=why):
      op(jnp.ones((2, 16)), w)
  with pytest.raises(ValueError, match='must end in 16'):
    kernels_pallas.wrapped_matmul(jnp.ones((2, 8)), wrapped())
  with pytest.raises(ValueError, match='no square blocks that make a length of 8'):
    w = wrapped()
    formats.Wrapped.of(w.core, w.left[:1], w.right)
  assert {'scaled', 'wrapped'} <= set(around.OPS)
