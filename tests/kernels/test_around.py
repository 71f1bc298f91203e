"""Tests products with weights that are quantized, wrapped or have thresholds, by few tokens and by many."""

import dataclasses
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


def active(pattern=None, threshold=0.0):
  w = {'kernel': drawn(0, 16, 2, 4)}
  if pattern is None:
    return formats.ActiveArray.of(w['kernel'], threshold, axes=AXES)
  w = sj.prune_weights(w, pattern, axes={'kernel': AXES}).params
  return formats.ActiveArray.of(formats.pack(w, pattern, axes={'kernel': AXES})['kernel'], threshold)


CASES = {'active': active, 'active nm': lambda: active(sj.NM(2, 4)), 'nm': lambda: scaled(sj.NM(2, 4)),
         'groups': lambda: scaled(sj.Block((4, 1), 0.5)),
         'uneven groups': lambda: scaled(sj.Block((4, 1), 0.6)), 'wrapped': wrapped}


@pytest.mark.sampled(8)
@pytest.mark.parametrize('tokens', [1, 8])
@pytest.mark.parametrize('name', CASES)
def test_products_and_gradients_are_those_of_the_dense_weight(name, tokens):
  w, x = CASES[name](), drawn(3, tokens, 16)
  apply = lambda p, x: jnp.tanh(jnp.einsum('ti,ihd->thd', x, p['kernel']))
  run = kernels_pallas.packed(apply)
  np.testing.assert_allclose(run({'kernel': w}, x), apply({'kernel': w.to_dense()}, x), rtol=2e-5, atol=1e-5)
  if name.startswith('active'):
    # A dense form would lose the thresholds.
    assert kernels_pallas.prepared({'kernel': w}, tokens=tokens)['kernel'] is w
  use, = kernels_pallas.packed(apply, explain=True)({'kernel': w}, x)
  assert use.op == {'wrapped': 'wrapped_matmul', 'active': 'threshold_matmul'}.get(name.split()[0], 'scaled_matmul')
  if name.endswith('groups'):
    assert ('once a group' in use.why['cpu'].reason) == (tokens <= 4)
  loss = lambda call: lambda values: jnp.sum(call(formats.with_values({'kernel': w}, values)))
  values = formats.values({'kernel': w})
  ours = jax.grad(loss(lambda p: run(p, x)))(values)['kernel']
  dense = jax.grad(loss(lambda p: apply(formats.unpack(p), x)))(values)['kernel']
  np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('tokens', [1, 3])
@pytest.mark.parametrize('pattern', [None, sj.NM(2, 4)], ids=str)
def test_inputs_below_their_threshold_are_skipped_or_multiplied_by_the_rest(pattern, tokens):
  w, x = active(pattern, np.linspace(0, 2, 16)), drawn(3, tokens, 16)
  kept = np.where(np.abs(x) >= np.linspace(0, 2, 16, dtype=np.float32), x, 0)
  matrix = np.asarray(w.to_dense()).reshape(16, 8)
  np.testing.assert_allclose(kernels_pallas.threshold_matmul(x, w).reshape(tokens, 8), kept @ matrix, atol=1e-5)
  rest = dataclasses.replace(w, left=drawn(4, 16, 2), right=drawn(5, 2, 8))
  apply = lambda p, x: jnp.einsum('ti,ihd->thd', x, p['kernel'])
  y = kernels_pallas.packed(apply)({'kernel': rest}, x)
  np.testing.assert_allclose(y.reshape(tokens, 8), kept @ matrix + (x - kept) @ np.asarray(rest.left @ rest.right),
                             atol=1e-4)


def test_a_stack_with_thresholds_runs_in_scan_vmap_and_grad_and_reads_no_skipped_block():
  w, x = drawn(0, 3, 32, 32), drawn(1, 2, 32)
  axes = Axes((1,), (2,), layer=(0,))
  threshold = np.where(np.arange(32) < 16, np.inf, 0.2)
  apply = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p['w'])[0]
  poisoned = {'w': formats.ActiveArray.of(w.at[:, :16].set(jnp.nan), threshold, axes=axes)}
  run = kernels_pallas.packed(apply, implementation='xla')
  expected = x
  for layer in np.asarray(w):
    expected = np.tanh(np.where(np.abs(expected) >= threshold, expected, 0) @ layer)
  np.testing.assert_allclose(jax.jit(run)(poisoned, x), expected, atol=1e-5)
  np.testing.assert_allclose(jax.vmap(run, (None, 0))({'w': formats.ActiveArray.of(w, threshold, axes=axes)}, x),
                             expected, atol=1e-5)
  slope = jax.grad(lambda v: jnp.sum(run(formats.with_values(poisoned, v), x)))(formats.values(poisoned))['w']
  assert not np.any(slope[:, :16]) and np.all(np.isfinite(slope)) and np.any(slope[:, 16:])


def test_what_no_product_takes_is_refused_with_the_remedy():
  dense = formats.Scaled.of(drawn(0, 16, 8), rounding)
  for op, w, why in [(kernels_pallas.scaled_matmul, dense, 'by a dense array'),
                     (kernels_pallas.scaled_matmul, drawn(0, 4, 4), 'Scaled.of quantizes'),
                     (kernels_pallas.threshold_matmul, dense, 'ActiveArray.of gives it thresholds'),
                     (kernels_pallas.threshold_matmul, formats.ActiveArray.of(drawn(0, 8, 8)), 'must be '),
                     (kernels_pallas.wrapped_matmul, dense, 'recipes.armor makes')]:
    with pytest.raises(ValueError, match=why):
      op(jnp.ones((2, 16)), w)
  with pytest.raises(ValueError, match='must end in 16'):
    kernels_pallas.wrapped_matmul(jnp.ones((2, 8)), wrapped())
  with pytest.raises(ValueError, match='no square blocks that make a length of 8'):
    w = wrapped()
    formats.Wrapped.of(w.core, w.left[:1], w.right)
  assert {'active', 'scaled', 'wrapped'} <= set(around.OPS)
