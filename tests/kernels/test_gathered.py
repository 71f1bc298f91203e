"""Tests that `gathered_attention` is the softmax over the rows that its lists name, and that it reads no other row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import WAYS, close, largest, normal, value_and_gradients

from kernels_pallas import gathered_attention

# A case is: batch, T, heads, kv_heads, d, lists, R.
CASES = {
    'a list for each head': ((2,), 30, 4, 2, 8, 4, 9), 'a list for each head of k': ((1,), 30, 4, 2, 5, 2, 7),
    'one list': ((2, 2), 20, 4, 4, 8, 1, 9), 'a list for two heads of k': ((), 20, 4, 4, 8, 2, 20),
}


def inputs(name, dtype='float32'):
  """Returns q, k and v, the lists, and their lengths: a full list, and an empty one where there are several."""
  batch, tokens, heads, shared, d, lists, most = CASES[name]
  rng = np.random.default_rng(3)
  arrays = [normal((*batch, *shape, d), dtype, i) for i, shape in enumerate([(heads,), *[(tokens, shared)] * 2])]
  index = rng.random((*batch, lists, tokens)).argsort(-1)[..., :most]
  counts = rng.integers(0, most + 1, (*batch, lists))
  counts.reshape(-1)[[0, -1]] = 0, most
  return arrays, jnp.asarray(index, jnp.int32), jnp.asarray(counts, jnp.int32)


def exact(q, k, v, index, counts):
  """Returns attention with the mask of the lists, and zeros for a head whose list is empty."""
  heads, tokens = q.shape[-2], k.shape[-3]
  listed = np.arange(index.shape[-1]) < np.asarray(counts)[..., None]
  seen = ((np.asarray(index)[..., None] == np.arange(tokens)) & listed[..., None]).any(-2)
  mask = np.repeat(seen, heads // index.shape[-2], -2)
  flat = lambda a, n: a.reshape(-1, *a.shape[-n:])
  qkv = (a.astype('f4') for a in (flat(q, 2)[:, None], flat(k, 3), flat(v, 3)))
  y = jax.nn.dot_product_attention(*qkv, mask=flat(mask, 2)[:, :, None])
  return jnp.where(mask.any(-1)[..., None], y.reshape(q.shape), 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', CASES)
def test_it_is_attention_to_the_listed_tokens(name, way):
  arrays, *lists = inputs(name)
  run = lambda *qkv: gathered_attention(*qkv, *lists, implementation=way)
  dy = normal(arrays[0].shape, seed=9)
  y, gradients = value_and_gradients(run, dy, *arrays)
  expected, expected_gradients = value_and_gradients(lambda *qkv: exact(*qkv, *lists), dy, *arrays)
  assert y.shape == arrays[0].shape and y.dtype == arrays[0].dtype
  close(y, expected, 8)
  for found, wanted in zip(gradients, expected_gradients):
    close(found, wanted, 20)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_it_reads_listed_rows_alone(dtype):
  """Rows that no list names within its length are NaN, and so are the rows behind a number out of range."""
  (q, k, v), index, counts = inputs('one list', dtype)
  read = np.zeros(k.shape[:3], bool)
  for place in np.ndindex(counts.shape[:2]):
    read[place][np.asarray(index)[place][0, :counts[place][0]]] = True
  hidden = [jnp.where(read[..., None, None], a, jnp.nan) for a in (k, v)]
  run = jax.jit(lambda *args: gathered_attention(*args, implementation='xla'))
  y = run(q, *hidden, index, counts)
  close(np.asarray(y, 'f4'), np.asarray(exact(q, k, v, index, counts), 'f4'), 8, dtype)
  mapped = jax.vmap(lambda *args: gathered_attention(*args), (0, 0, 0, 0, 0))(q, *hidden, index, counts)
  np.testing.assert_array_equal(mapped, y)


def test_nothing_of_the_length_of_the_cache_is_made():
  q, k = normal((1, 2, 8)), normal((1, 4096, 2, 8))
  index = jnp.zeros((1, 2, 16), jnp.int32)
  made = lambda way: largest(jax.make_jaxpr(lambda *qkv: gathered_attention(*qkv, index, implementation=way))(
      q, k, k).jaxpr)
  assert made('xla') <= k.size and made(None) == made('xla') and made('dense') >= k.size
  shown = gathered_attention(q, k, k, index, explain=True)
  assert shown['cpu'] == ('xla', 'at most 16 of 4096 tokens for each list')
  assert shown['cuda'].reason == 'not mosaic_gpu: the kernels for Hopper multiply bfloat16 and float16, not float32; ' \
      "cast to bfloat16, or leave it to XLA, which has tensor cores for it at jax.default_matmul_precision " \
      "'tensorfloat32'"


Q, K, L = jnp.ones((2, 4, 8)), jnp.ones((2, 16, 2, 8)), jnp.zeros((2, 4, 3), jnp.int32)
REFUSED = {
    'shapes': (lambda: gathered_attention(Q, K[0], K[0], L), r'must be \[..., heads, d\], \[..., T, kv_heads, d\]'),
    'heads': (lambda: gathered_attention(Q[:, :3], K, K, L), 'heads of k and v must divide that of q'),
    'dtypes': (lambda: gathered_attention(Q, K, K.astype('f2'), L), 'all must be one of float32'),
    'numbers': (lambda: gathered_attention(Q, K, K, L.astype('f4')), r'must be int32\[2, lists, R\]'),
    'lengths': (lambda: gathered_attention(Q, K, K, L, L[..., 0, 0]), r'int32\[2\] must be .* int32\[2, lists\]'),
    'lists': (lambda: gathered_attention(Q, K, K, L[:, :3]), '3 lists must divide the 4 heads of q, .* give one list'),
    'a name': (lambda: gathered_attention(Q, K, K, L, implementation='flash'), 'Valid: None, dense, mosaic_gpu'),
    'elsewhere': (lambda: gathered_attention(Q, K, K, L, implementation='mosaic_tpu'), "'xla', 'dense' can"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_why_and_what_can(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()
