"""Tests that `block_sparse_attention` is attention with the dense mask that its lists of blocks describe."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import WAYS, close, largest, normal, value_and_gradients

from kernels_pallas.attention import block_sparse_attention

# A case is: batch, Tq, Tk, heads, kv_heads, d, block_q, block_k, number of listed blocks.

ATTENTION = {
    'plain': ((2,), 32, 32, 2, 2, 8, 8, 8, 2), 'no batch, shared heads': ((), 32, 48, 4, 2, 8, 16, 8, 3),
    'lengths that do not divide': ((2,), 21, 27, 2, 1, 8, 8, 8, 4), 'two batches': ((2, 3), 8, 16, 1, 1, 4, 4, 8, 1),
    'longer queries': ((1,), 40, 16, 2, 2, 8, 8, 8, 2), 'everything': ((1,), 16, 24, 2, 2, 8, 8, 8, 3),
}


def attended(name, dtype='float32'):
  """Returns inputs, index, counts, options, and the dense mask that index and counts describe."""
  batch, tq, tk, heads, shared, d, bq, bk, listed = ATTENTION[name]
  rng = np.random.default_rng(6)
  q, k, v = (normal((*batch, *shape, d), dtype, i) for i, shape in enumerate([(tq, heads), (tk, shared), (tk, shared)]))
  rows, blocks = -(-tq // bq), -(-tk // bk)
  index = np.asarray([[np.sort(rng.choice(blocks, listed, replace=False)) for _ in range(rows)] for _ in range(heads)])
  counts = rng.integers(0, listed + 1, (heads, rows))
  counts[0, -1] = listed
  mask = np.zeros((heads, rows * bq, blocks * bk), bool)
  for h, i in np.ndindex(heads, rows):
    for b in index[h, i, :counts[h, i]]:
      mask[h, i * bq:(i + 1) * bq, b * bk:(b + 1) * bk] = True
  index, counts = (jnp.asarray(a, jnp.int32) for a in (index, counts))
  return (q, k, v), (index, counts), dict(block_q=bq, block_k=bk), mask[:, :tq, :tk]


def exact(q, k, v, mask):
  """Returns attention with the dense mask in float32, and zeros for a query that sees no key."""
  y = jax.nn.dot_product_attention(*(a.reshape(-1, *a.shape[-3:]).astype('f4') for a in (q, k, v)), mask=mask[None])
  return jnp.where(mask.any(-1).T[..., None], y, 0).reshape(q.shape)


@pytest.mark.sampled
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', ATTENTION)
def test_attention_is_that_of_the_block_mask(name, way, causal):
  inputs, lists, options, mask = attended(name)
  mask = mask & np.tril(np.ones(mask.shape[1:], bool)) if causal else mask
  run = lambda *qkv: block_sparse_attention(*qkv, *lists, causal=causal, implementation=way, **options)
  dy = normal(inputs[0].shape, seed=9)
  y, gradients = value_and_gradients(run, dy, *inputs)
  expected, expected_gradients = value_and_gradients(lambda *qkv: exact(*qkv, mask), dy, *inputs)
  assert y.shape == inputs[0].shape and y.dtype == inputs[0].dtype
  close(y, expected, 8)
  for found, wanted in zip(gradients, expected_gradients):
    close(found, wanted, 40)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_attention_in_narrow_dtypes_without_counts_and_under_vmap(dtype):
  (q, k, v), (index, _), options, _ = attended('plain', dtype)
  mask = np.zeros((2, 4, 4), bool)
  np.put_along_axis(mask, np.asarray(index), True, 2)
  mask = mask.repeat(8, 1).repeat(8, 2)
  run = lambda q, k, v: block_sparse_attention(q, k, v, index, scale=0.5, **options)
  expected = exact(q * 0.5 * math.sqrt(8), k, v, mask)
  for y in (run(q, k, v), jax.jit(jax.vmap(run))(q, k, v)):
    assert y.dtype == q.dtype
    close(y, expected, 8, dtype)
  gradients = jax.jit(jax.grad(lambda *qkv: run(*qkv).astype('f4').sum(), (0, 1, 2)))(q, k, v)
  assert all(g.dtype == q.dtype for g in gradients)
  assert run(q[:0], k[:0], v[:0]).shape == (0, 32, 2, 8)


def test_attention_makes_nothing_of_queries_times_keys():
  q, k = normal((1, 64, 2, 4)), normal((1, 128, 2, 4))
  index = jnp.zeros((2, 8, 1), jnp.int32)
  made = lambda way: largest(jax.make_jaxpr(jax.grad(lambda q, k, v: block_sparse_attention(
      q, k, v, index, block_q=8, block_k=8, implementation=way).sum(), (0, 1, 2)))(q, k, k).jaxpr)
  assert made('xla') == made(None) < 2 * 64 * 128 <= made('dense')
  explained = block_sparse_attention(q, k, k, index, block_q=8, block_k=8, explain=True)
  assert explained['cpu'] == ('xla', 'at most 1 of 16 blocks of keys for each block of queries')


def test_attention_may_be_spread_over_devices():
  (q, k, v), lists, options, _ = attended('plain')
  q, k, v = (jnp.concatenate([a] * 4) for a in (q, k, v))
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  run = lambda *qkv: block_sparse_attention(*qkv, *lists, implementation='xla', **options)
  spread = jax.shard_map(run, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  loss = lambda f: jax.jit(jax.grad(lambda *qkv: jnp.sin(f(*qkv)).sum(), (0, 1, 2)))
  for a, b in zip(loss(spread)(q, k, v), loss(run)(q, k, v)):
    close(a, b, 32)


QUERIES, LISTED = jnp.ones((16, 2, 8)), jnp.zeros((2, 2, 1), jnp.int32)
REFUSED = {
    'attention: index': (lambda: block_sparse_attention(QUERIES, QUERIES, QUERIES, LISTED, block_q=4), (
        r'index int32\[2, 2, 1\].* must be int32\[2, 4, R\] and int32\[2, 4\].*blocks? of 4 of the 16 queries')),
    'attention: dtypes': (lambda: block_sparse_attention(QUERIES, QUERIES, QUERIES.astype('f2'), LISTED, block_q=8),
                          'dtypes float32, float32 and float16; all must be one'),
    'attention: heads': (lambda: block_sparse_attention(QUERIES, jnp.ones((16, 3, 8)), jnp.ones((16, 3, 8)), LISTED,
                                                        block_q=8), 'heads of k and v must divide that of q'),
    'attention: shapes': (lambda: block_sparse_attention(QUERIES, QUERIES[:, :, :4], QUERIES, LISTED), 'kv_heads'),
    'attention: blocks': (lambda: block_sparse_attention(QUERIES, QUERIES, QUERIES, LISTED, block_q=0), 'block_q 0'),
    'attention: name': (lambda: block_sparse_attention(QUERIES, QUERIES, QUERIES, LISTED, block_q=8, block_k=8,
                                                       implementation='flash'), 'Valid: None, dense, mosaic_gpu'),
    'attention: elsewhere': (lambda: block_sparse_attention(
        QUERIES, QUERIES, QUERIES, LISTED, block_q=8, block_k=8, implementation='mosaic_gpu'),
        "'mosaic_gpu' cannot run this: it is for cuda, and the default device is cpu. 'xla', 'dense' can"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_why_and_what_can(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()
