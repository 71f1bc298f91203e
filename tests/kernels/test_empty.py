"""Tests that products of nothing are empty or zero: no token, no input, no output, no query and no key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
import sparsejax as sj
from kernels_pallas import block_sparse_attention, packed
from sparsejax import formats

CASES = {
    '2:4': (kernels_pallas.nm_matmul, formats.NMArray, sj.NM(2, 4)),
    '1:1': (kernels_pallas.nm_matmul, formats.NMArray, sj.NM(1, 1)),
    '2:4x8': (kernels_pallas.nm_matmul, formats.NMArray, sj.NM(2, 4, width=8)),
    'blocks': (kernels_pallas.block_sparse_matmul, formats.BlockSparseArray, sj.Block((4, 4))),
    'csc': (kernels_pallas.unstructured_matmul, formats.CSCArray, sj.Unstructured()),
    'ell': (kernels_pallas.ell_matmul, formats.ELLArray, sj.Unstructured()),
    'sparse24': (kernels_pallas.sparse24_matmul, formats.Sparse24Array, sj.NM(2, 4))}


@pytest.mark.sampled
@pytest.mark.parametrize('shape, lead', [
  ((8, 8), (4,)), ((8, 8), (2, 0)), ((0, 8), ()), ((0, 8), (0,)), ((8, 0), (4,))])
@pytest.mark.parametrize('name', CASES)
def test_products_of_nothing_and_their_gradients(name, shape, lead):
  op, format_, pattern = CASES[name]
  kept = (np.arange(8) % 4 < 2)[:shape[0], None] | (name == '1:1')
  w = jnp.asarray(np.ones(shape) * kept, jnp.float32)
  small = format_.from_pattern(w, pattern, sj.types.Axes((0,), (1,)))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((*lead, shape[0])), jnp.float32)
  np.testing.assert_array_equal(formats.unpack(small), w)
  for y in (op(x, small), packed(jnp.matmul)(x, small)):
    np.testing.assert_allclose(y, x @ w, atol=1e-6)
  values = formats.values(small)
  dx, dw = jax.grad(lambda x, v: op(x, formats.with_values(small, v)).sum(), (0, 1))(x, values)
  np.testing.assert_allclose(dx, jax.grad(lambda x: (x @ w).sum())(x), atol=1e-6)
  assert jax.tree.map(jnp.shape, dw) == jax.tree.map(jnp.shape, values)


@pytest.mark.parametrize('queries, keys, heads', [(0, 8, 2), (8, 0, 2), (0, 0, 2), (8, 8, 2)])
def test_attention_over_nothing(queries, keys, heads):
  q, k = (jnp.ones((1, n, heads, 4)) for n in (queries, keys))
  index = jnp.zeros((heads, -(-queries // 4), min(keys // 4, 1)), jnp.int32)
  attend = lambda q, k: block_sparse_attention(q, k, k, index, block_q=4, block_k=4)
  y = attend(q, k)
  assert y.shape == q.shape and bool(jnp.all(y == float(keys > 0)))
  dq, dk = jax.grad(lambda q, k: attend(q, k).sum(), (0, 1))(q, k)
  assert (dq.shape, dk.shape) == (q.shape, k.shape) and bool(jnp.isfinite(dk).all())
