"""Tests where NaN and infinity go in products with packed weights, in every implementation that runs on a CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas.block_sparse import tpu as block_sparse_tpu
from kernels_pallas.n_m import tpu as n_m_tpu
from sparsejax import formats, patterns
from sparsejax.types import Axes

BAD = (np.nan, np.inf, -np.inf)
AXES = Axes((0,), (1,))


def weight(pattern, shape):
  """Returns a weight of the pattern; half of its entries, and of the blocks, are zero."""
  rows, columns = np.indices(shape)
  w = np.random.default_rng(0).standard_normal(shape).astype('f4')
  unit = pattern.shape[0] if isinstance(pattern, patterns.Block) else 2
  return jnp.asarray(np.where((rows // unit + columns // (unit if unit > 2 else 8)) % 2 == 0, w, np.float32(0)))


def named(op, way):
  return lambda x, w: op(x, w, implementation=way)


# Name: function of x and the packed weight, format, pattern, shape, and whether an input spreads to outputs that no
# stored value connects with the input.
CASES = {
    'N:M xla': (named(kernels_pallas.nm_matmul, 'xla'), formats.NMArray, patterns.NM(2, 4, 8), (16, 16), False),
    'N:M xla, own positions': (named(kernels_pallas.nm_matmul, 'xla'), formats.NMArray, patterns.NM(2, 4), (16, 16),
                               False),
    'ell xla': (named(kernels_pallas.ell_matmul, 'xla'), formats.ELLArray, patterns.Unstructured(), (16, 16), False),
    'ell dense': (named(kernels_pallas.ell_matmul, 'dense'), formats.ELLArray, patterns.Unstructured(), (16, 16), True),
    'N:M dense': (named(kernels_pallas.nm_matmul, 'dense'), formats.NMArray, patterns.NM(2, 4), (16, 16), True),
    'N:M tpu': (lambda x, w: n_m_tpu.matmul(x, w, interpret=True), formats.NMArray, patterns.NM(2, 4), (256, 128),
                True),
    'blocks xla': (named(kernels_pallas.block_sparse_matmul, 'xla'), formats.BlockSparseArray, patterns.Block((8, 8)),
                   (32, 32), False),
    'blocks dense': (named(kernels_pallas.block_sparse_matmul, 'dense'), formats.BlockSparseArray,
                     patterns.Block((8, 8)), (32, 32), True),
    'blocks tpu': (lambda x, w: block_sparse_tpu.matmul(x, w, interpret=True), formats.BlockSparseArray,
                   patterns.Block((8, 8)), (32, 32), False),
    'csc xla': (named(kernels_pallas.unstructured_matmul, 'xla'), formats.CSCArray, patterns.Unstructured(), (16, 16),
                False),
    'csc dense': (named(kernels_pallas.unstructured_matmul, 'dense'), formats.CSCArray, patterns.Unstructured(),
                  (16, 16), True),
    'sparse24 xla': (named(kernels_pallas.sparse24_matmul, 'xla'), formats.Sparse24Array, patterns.NM(2, 4), (16, 16),
                     True)}


@pytest.mark.parametrize('name', CASES)
def test_nan_and_infinity_go_where_stored_values_lead(name):
  """Bad values reach exactly what they reach in a dense product.

  A bad input also reaches what only zeros connect with the input, in the implementations that unpack the weight.
  """
  product, format_, pattern, shape, spreads = CASES[name]
  w = weight(pattern, shape)
  packed = format_.from_pattern(w, pattern, AXES)
  stored = np.asarray(formats.with_values(packed, jnp.ones_like(packed.values)).to_dense() != 0)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((4, shape[0])), 'f4')
  plain = np.asarray(x @ w)
  for row, bad in enumerate(BAD):
    x = x.at[row, 5 + row].set(bad)
  y, dense = np.asarray(product(x, packed)), np.asarray(x @ w)
  free = np.asarray([~stored[5], ~stored[6], ~stored[7], np.zeros(shape[1], bool)]) & (not spreads)
  np.testing.assert_allclose(y, np.where(free, plain, dense), rtol=1e-4, atol=1e-4)
  assert free[:3].any() != spreads and np.isnan(dense).any() and np.isinf(dense).any()

  for bad in BAD:
    values = packed.values.reshape(-1).at[0].set(bad).reshape(packed.values.shape)
    w_bad = formats.with_values(packed, values).to_dense()
    np.testing.assert_allclose(product(x[3:], formats.with_values(packed, values)), x[3:] @ w_bad, rtol=1e-4, atol=1e-4)
