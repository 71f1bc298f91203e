"""Tests the numbers of the kernels for Hopper in interpret mode, where unwritten memory is NaN, and lowers them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import blocks, equations, f32, normal, rounded_once

from kernels_pallas import (
  active_matmul,
  active_outputs,
  block_sparse_attention,
  block_sparse_matmul,
  hopper,
  nm_matmul,
)
from kernels_pallas.active import gpu as active
from kernels_pallas.attention import gpu as attention
from kernels_pallas.attention import gpu_backward
from kernels_pallas.block_sparse import gpu as block_sparse
from kernels_pallas.gathered import gathered_attention
from kernels_pallas.gathered import gpu as gathered
from kernels_pallas.sparse24 import gpu as sparse24
from kernels_pallas.sparse24 import reference, sparse24_matmul
from sparsejax.formats import NMArray, Sparse24Array

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
transposes = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason='interpret mode cannot transpose a reference before JAX 0.12')


def lowered(f, *args):
  """Returns the text of the program that is lowered for CUDA."""
  specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
  checks = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
  return jax.export.export(jax.jit(f), platforms=['cuda'], disabled_checks=checks)(*specs).mlir_module()


def kernels(f, *args):
  return lowered(f, *args).count('mosaic_gpu_v2')


# Block-sparse products.

# A case is: grid and block of the weight, tokens, dtype of x, dtype of the weight, known counts.
BLOCKS = {
    '64': ((4, 5), (64, 64), 130, BF16, BF16, True),
    '64, counts not known': ((4, 5), (64, 64), 1, F16, F32, False),
    '128': ((3, 2), (128, 128), 300, BF16, BF16, True),
    '128, few tokens': ((2, 3), (128, 128), 20, F16, BF16, True),
    '64 x 256': ((3, 2), (64, 256), 1, BF16, F32, True),
    '128 x 256, counts not known': ((2, 2), (128, 256), 70, F16, F16, False),
    'one block': ((1, 1), (64, 64), 5, BF16, BF16, True),
}
block_cases = pytest.mark.parametrize('grid, block, tokens, dtype, stored, known', BLOCKS.values(), ids=BLOCKS)


def block_case(grid, block, tokens, dtype, stored, known):
  k, n = (g * b for g, b in zip(grid, block))
  w = blocks((k, n), block, stored)
  if not known:
    w = dataclasses.replace(w, fan_in=None, fan_out=None)
  return normal((tokens, k), dtype, 2), normal((tokens, n), dtype, 3), w


@pytest.mark.sampled(3)
@block_cases
def test_block_sparse_products(grid, block, tokens, dtype, stored, known):
  x, _, w = block_case(grid, block, tokens, dtype, stored, known)
  cast = dataclasses.replace(w, values=w.values.astype(dtype))
  rounded_once(block_sparse.matmul(x, w, interpret=True), f32(x) @ f32(cast.to_dense()), x.shape[1])


@pytest.mark.sampled(3)
@transposes
@block_cases
def test_block_sparse_products_with_the_transpose(grid, block, tokens, dtype, stored, known):
  _, dy, w = block_case(grid, block, tokens, dtype, stored, known)
  cast = dataclasses.replace(w, values=w.values.astype(dtype))
  rounded_once(block_sparse.matmul_transposed(dy, w, interpret=True), f32(dy) @ f32(cast.to_dense()).T, dy.shape[1])


@pytest.mark.sampled(3)
@transposes
@block_cases
def test_the_stored_blocks_of_a_product(grid, block, tokens, dtype, stored, known):
  x, dy, w = block_case(grid, block, tokens, dtype, stored, known)
  got = block_sparse.sampled(x, dy, w, interpret=True)
  assert got.dtype == stored
  whole = (f32(x).T @ f32(dy)).reshape(grid[0], block[0], grid[1], block[1])
  rounded_once(got, whole[w.rows, :, w.cols], tokens)


@pytest.mark.sampled(4)
@pytest.mark.parametrize('fan', [(3, 1, 2), (1,), (4, 4)])
@pytest.mark.parametrize('together', [1, 2])
def test_pairs_hold_every_block_once_and_never_cross_a_column(fan, together):
  cols = np.repeat(np.arange(len(fan)), fan)
  w = dataclasses.replace(blocks((64 * max(fan), 64 * len(fan)), (64, 64), BF16), cols=jnp.asarray(cols, jnp.int32),
                          rows=jnp.zeros(len(cols), jnp.int32), fan_in=fan)
  for one in (w, dataclasses.replace(w, fan_in=None)):
    first, second, count = block_sparse._pairs(one, together)
    pairs = [{int(a), int(b)} for a, b in zip(first[:count[0]], second[:count[0]])]
    assert sorted(i for pair in pairs for i in pair) == list(range(len(cols)))
    assert all(len(pair) <= together and len({cols[i] for i in pair}) == 1 for pair in pairs)


@pytest.mark.sampled
@pytest.mark.parametrize('block', block_sparse.BLOCKS)
@pytest.mark.parametrize('tokens', [1, 2000])
def test_block_sparse_products_lower_for_cuda_with_their_gradients(block, tokens):
  w = blocks((700, 1000), block, F32)
  x = jnp.zeros((tokens, 700), BF16)
  assert kernels(block_sparse_matmul, x, w) == 1
  loss = lambda x, values: block_sparse_matmul(x, dataclasses.replace(w, values=values)).astype(F32).sum()
  assert kernels(jax.value_and_grad(loss, (0, 1)), x, w.values) == 3
  text = jax.jit(block_sparse_matmul).lower(x, w).as_text()
  assert 'mosaic' not in text


@pytest.mark.parametrize('tokens', [1, 16, 64, 256, 1024])
@pytest.mark.parametrize('columns', [8, 32, 64])
@pytest.mark.parametrize('width', [64, 128, 256])
def test_tiles_are_as_large_as_leaves_enough_to_go_round(tokens, columns, width):
  t = block_sparse.tiles(tokens, 128, width, BF16, columns)
  busy = -(-tokens // t.multiple) * columns * t.cluster
  assert t.tokens in (64, 128) and t.tokens * width <= 128 * 128
  assert t.multiple <= 128 or 2 * busy > hopper.CORES
  assert t.together == (tokens <= 64 and width >= 128)


@pytest.mark.parametrize('tokens, filled', [(1, None), (16, None), (24, None), (25, '32')])
def test_few_tokens_are_not_copied(tokens, filled):
  packed = jax.eval_shape(lambda w: Sparse24Array.from_dense(w, check=False), jax.ShapeDtypeStruct((256, 256), BF16))
  for f, w in ((block_sparse_matmul, blocks((256, 256), (128, 128), BF16)), (sparse24_matmul, packed)):
    text = lowered(f, jnp.zeros((tokens, 256), BF16), w)
    pads = re.findall(rf'stablehlo.pad .*tensor<{tokens}x256x.*-> tensor<(\d+)x', text)
    assert set(pads) - {str(tokens)} == {filled} - {None}


def test_it_lowers_within_shard_map():
  w = blocks((256, 256), (128, 128), BF16)
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  f = jax.shard_map(lambda x: block_sparse_matmul(x, w), mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  assert kernels(f, jnp.zeros((512, 256), BF16)) == 1


def test_too_much_shared_memory_is_an_error_when_it_is_lowered():
  x, w = jnp.zeros((2048, 256), BF16), blocks((256, 256), (128, 128), BF16)
  sizes = block_sparse.tiles(*x.shape, 128, BF16, w.grid[1])
  f = lambda slots: functools.partial(block_sparse.matmul, sizes=dataclasses.replace(sizes, slots=slots))
  assert kernels(f(sizes.slots), x, w) == 1
  with pytest.raises(ValueError, match='shared memory'):
    kernels(f(sizes.slots + 1), x, w)


@pytest.mark.parametrize('n, blocks', [(1, 1), (7, 3), (264, 132), (300, 132), (2048, 132)])
@pytest.mark.parametrize('seed', range(3))
def test_blocks_have_about_equally_much_to_do(n, blocks, seed):
  """Each tile is computed once, in the round where it was, and no thread block works much longer than the average."""
  lengths = np.random.default_rng(seed).integers(1, 13, n)
  order = hopper.scheduled(lengths, blocks)
  rounds = lambda a: [sorted(a[first:first + blocks]) for first in range(0, n, blocks)]
  assert rounds(order) == rounds(np.arange(n))
  work = lambda order: max(lengths[order[block::blocks]].sum() for block in range(blocks))
  assert work(order) <= work(np.arange(n)) and work(order) <= lengths.sum() / blocks + 6


def test_tiles_go_through_all_columns_by_sweeps_the_longest_columns_first():
  order = block_sparse._order((1, 5, 3), 5, 3, 2, 100)
  assert [sorted(part) for part in np.split(order, [15])] == [list(range(15)), []]
  alike = block_sparse._order((2, 2, 2), 5, 3, 2, 4)
  assert alike.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, 12, 13, 14]
  assert block_sparse._order(None, 5, 3, 2, 4).tolist() == alike.tolist()
  row, column = zip(*(hopper.banded(jnp.int32(i), 5, 3, 2) for i in range(15)))  # the order of the other kernels
  assert (np.asarray(row) * 3 + np.asarray(column)).tolist() == alike.tolist()
  first = block_sparse._order((1, 9, 3), 4, 3, 2, 2)
  assert (first[:2] % 3 == 1).all() and sorted(first) == list(range(12))


# Attention.


def listed(heads, rows, columns, stored, seed=0):
  """Returns which blocks are seen, and their lists. The first row of the first head sees none."""
  seen = np.random.default_rng(seed).random((heads, rows, columns)) < stored
  seen[0, 0] = False
  counts = seen.sum(-1)
  index = np.argsort(~seen, axis=-1, kind='stable')[..., :max(1, counts.max())]
  return seen, jnp.asarray(index, jnp.int32), jnp.asarray(counts, jnp.int32)


def attended(q, k, v, seen, causal, scale):
  scores = np.where(seen, np.einsum('bqhd,bkhd->bhqk', q, k) * scale, -np.inf)
  if causal:
    scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
  top = scores.max(-1, keepdims=True)
  p = np.exp(scores - np.where(np.isfinite(top), top, 0))
  return np.einsum('bhqk,bkhd->bqhd', p / np.maximum(p.sum(-1, keepdims=True), 1e-30), v)


# A case is: batch, heads, heads of k, queries, keys, d, block_q, block_k, causal, dtype.
ATTENTION = {
    'two tiles, heads of 64': (1, 1, 1, 256, 256, 64, 128, 128, False, BF16),
    'causal, small blocks of keys, shared heads': (1, 2, 1, 256, 256, 64, 128, 64, True, F16),
    'causal, large blocks of queries, heads of 128': (1, 1, 1, 512, 512, 128, 256, 128, True, BF16),
    'more keys than queries, two of a batch': (2, 1, 1, 128, 384, 64, 128, 192, False, BF16),
}


@transposes
@pytest.mark.parametrize('case', ATTENTION.values(), ids=ATTENTION)
def test_attention_to_listed_blocks(case):
  batch, heads, shared, queries, keys, d, block_q, block_k, causal, dtype = case
  seen, index, counts = listed(heads, queries // block_q, keys // block_k, 0.7)
  shapes = (batch, queries, heads, d), *[(batch, keys, shared, d)] * 2
  q, k, v = (normal(shape, dtype, i) for i, shape in enumerate(shapes))
  got = attention.attention(q, k, v, index, counts, block_q=block_q, block_k=block_k, causal=causal, scale=0.3,
                            interpret=True)
  whole = np.repeat(np.repeat(seen, block_q, 1), block_k, 2)
  k, v = (np.repeat(f32(a), heads // shared, 2) for a in (k, v))
  wanted = attended(f32(q), k, v, whole, causal, 0.3)
  assert not f32(got)[:, :block_q, 0].any()
  np.testing.assert_allclose(f32(got), wanted, atol=4 * float(jnp.finfo(dtype).eps), rtol=0.02)


@transposes
@pytest.mark.parametrize('causal', [False, True])
def test_attention_to_whole_lists_needs_no_counts(causal):
  index = jnp.asarray([[[0, 2], [1, 2], [0, 1]]], jnp.int32)
  q, k, v = (normal((2, 384, 1, 64), BF16, i) for i in range(3))
  f = functools.partial(attention.attention, q, k, v, index, block_q=128, block_k=128, causal=causal, scale=0.3,
                        interpret=True)
  y = f32(f())
  assert np.isfinite(y).all()  # Unwritten memory would be NaN.
  np.testing.assert_array_equal(y, f32(f(jnp.full((1, 3), 2, jnp.int32))))


@transposes
def test_queries_without_keys_do_not_care_what_their_list_says():
  q, k, v = (normal((1, 256, 1, 64), BF16, i) for i in range(3))
  index, counts = jnp.asarray([[[1], [0]]], jnp.int32), jnp.asarray([[0, 1]], jnp.int32)
  f = functools.partial(attention.attention, q, k, index=index, counts=counts, block_q=128, block_k=128, causal=False,
                        scale=0.3, interpret=True)
  y = f32(f(v=v.at[:, 128:].set(jnp.nan)))
  assert not y[:, :128].any()
  np.testing.assert_array_equal(y, f32(f(v=v)))


@pytest.mark.sampled(4)
@pytest.mark.parametrize('counted', [False, True])
@pytest.mark.parametrize('d', [64, 128])
@pytest.mark.parametrize('block_k', [64, 128])
@pytest.mark.parametrize('causal', [False, True])
def test_attention_lowers_for_cuda(d, block_k, causal, counted):
  q, index, counts = jnp.zeros((1, 1024, 4, d), BF16), jnp.zeros((4, 8, 3), jnp.int32), jnp.zeros((4, 8), jnp.int32)
  f = functools.partial(attention.attention, block_q=128, block_k=block_k, causal=causal, scale=1.0)
  assert kernels(f, q, q, q, index, *[counts] * counted) == 1


@transposes
@pytest.mark.sampled(1)
@pytest.mark.parametrize('case', ['', 'causal', 'segments', 'segments, causal', 'segments, hidden'])
def test_attention_and_its_gradients_are_those_of_xla(case):
  """Two heads share keys; most keys of the case `hidden` have a number of a segment that no query has."""
  random, batch = np.random.default_rng(0), 1 + (case == 'segments')
  q, dy = (normal((batch, 256, 2, 64), BF16, seed) for seed in (0, 1))
  k, v = (normal((batch, 256, 1, 64), BF16, seed) for seed in (2, 3))
  index, counts = jnp.asarray([[[0, 2], [1, 2]], [[1, 0], [0, 0]]], jnp.int32), jnp.asarray([[2, 2], [1, 0]], jnp.int32)
  ids = jnp.asarray(np.sort(random.integers(0, 3, (batch, 256))), jnp.int32)
  pair = ids, jnp.where(random.random(ids.shape) < 0.9, -1, ids) if 'hidden' in case else ids
  options = dict(block_q=128, block_k=64, causal='causal' in case, scale=0.1,
                 segments=pair if 'segments' in case else None)
  xla = lambda *qkv: block_sparse_attention(*qkv, index, counts, implementation='xla', **options)
  wanted, pull_back = jax.vjp(xla, *(each.astype(F32) for each in (q, k, v)))
  got = attention.attention(q, k, v, index, counts, interpret=True, **options)
  np.testing.assert_allclose(f32(got), f32(wanted), atol=4 * float(jnp.finfo(BF16).eps), rtol=0.02)
  found = gpu_backward.attention_gradients(dy, q, k, v, index, counts, interpret=True, **options)
  for a, b in zip(found, pull_back(dy.astype(F32))):
    np.testing.assert_allclose(f32(a), f32(b), atol=1e-2 * float(jnp.abs(b).max()))


@pytest.mark.sampled(1)
@pytest.mark.parametrize('d', [64, 128])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('segmented', [False, True])
def test_gradients_of_attention_lower_for_cuda(d, causal, segmented):
  """The program has the attention, `dq`, and `dk` with `dv`; the shared memory of all of them fits."""
  q, k, index = jnp.zeros((2, 512, 4, d), BF16), jnp.zeros((2, 512, 2, d), BF16), jnp.zeros((4, 4, 3), jnp.int32)

  def loss(q, k, v, index, segments):
    y = block_sparse_attention(q, k, v, index, causal=causal, segments=segments if segmented else None)
    return y.astype(F32).sum()

  assert kernels(jax.value_and_grad(loss, (0, 1, 2)), q, k, k, index, jnp.zeros((2, 512), jnp.int32)) == 3


# Activation-sparse products.


@pytest.mark.sampled(1)
@pytest.mark.parametrize('count', [0, 3, 11])
def test_active_products(count):
  """Rows that are not active are NaN. Of 12 blocks, none, a part of a step, and more than two steps are active."""
  x, w = normal((3, 192), BF16), normal((192, 256), BF16, 1)
  there = np.repeat(np.isin(np.arange(12), np.random.default_rng(0).permutation(12)[:count]), 16)
  y = active.matmul(jnp.where(there, x, 0), jnp.where(there[:, None], w, jnp.nan), 16, 12, interpret=True)
  rounded_once(y, np.where(there, f32(x), 0) @ f32(w), 192)


@pytest.mark.sampled(1)
@pytest.mark.parametrize('block', [8, 16, 64])
def test_active_products_lower_for_cuda(block):
  x, w = jnp.zeros((1, 4096), BF16), jnp.zeros((4096, 4096), BF16)
  assert kernels(functools.partial(active_matmul, block=block), x, w) == 1
  assert active_matmul(x, w, block=block, explain=True)['cuda'].implementation == 'mosaic_gpu'
  assert active.refusal(x, w.astype(F32), 16).startswith('x and w must have one dtype')


@pytest.mark.sampled(1)
@pytest.mark.parametrize('count', [0, 3, 11])
def test_active_outputs(count):
  """Rows of outputs that are not active are NaN. Of 12 blocks, none, a part of a tile, and two tiles are active."""
  x, w = normal((3, 192), BF16), normal((192, 192), BF16, 1)
  there = np.repeat(np.isin(np.arange(12), np.random.default_rng(0).permutation(12)[:count]), 16)
  wanted = jnp.broadcast_to(there, (3, 192)).astype(BF16)
  y = active.outputs(x, wanted, jnp.where(there[:, None], w, jnp.nan), 16, 12, interpret=True)
  rounded_once(y, np.where(there, f32(x) @ f32(w).T, 0), 192)


def test_parts_of_active_outputs_cover_the_sum_and_none_is_empty():
  for k, n, cores in ((640, 128, 6), (4096, 4096, 132), (64, 8, 132), (11008, 4096, 132), (4096, 2**17, 132)):
    plan = active.outputs_plan(jnp.zeros((1, k), BF16), jax.ShapeDtypeStruct((n, k), BF16), 8, n // 8, cores)
    steps = [int(plan.trips(jnp.int32(part))) for part in range(plan.parts)]
    assert sum(steps) == k // 64 and min(steps) > 0 and plan.blocks <= cores


@pytest.mark.sampled(1)
@pytest.mark.parametrize('block', [8, 16, 64])
def test_active_outputs_lower_for_cuda(block):
  x, w, mask = jnp.zeros((1, 4096), BF16), jnp.zeros((4096, 4096), BF16), jnp.ones((1, 4096), bool)
  assert kernels(functools.partial(active_outputs, block=block), x, w, mask) == 1
  assert active_outputs(x, w, mask, block=block, explain=True)['cuda'].implementation == 'mosaic_gpu'
  assert re.search('multiple of 64 inputs; pad', active.outputs_refusal(x[:, 8:], w[:, 8:], 16))


# Attention to listed tokens.


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='interpret mode has no layouts before JAX 0.12')
def test_attention_to_listed_tokens():
  """A list of more than a step, and an empty one, for two heads each; a list is cut into parts."""
  q, k, v = (normal((1, *shape, 64), BF16, seed) for seed, shape in enumerate([(4,), (150, 2), (150, 2)]))
  index = jnp.asarray(np.random.default_rng(1).random((1, 2, 150)).argsort(-1)[..., :140], jnp.int32)
  args = q, k, v, index, jnp.asarray([[140, 0]], jnp.int32)
  y = gathered.attention(*args, scale=0.3, interpret=True)
  np.testing.assert_allclose(f32(y), f32(gathered_attention(*args, scale=0.3)), atol=8e-3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('d', [64, 128])
@pytest.mark.parametrize('lists', [1, 8])
def test_attention_to_listed_tokens_lowers_for_cuda(lists, d):
  q, k = jnp.zeros((2, 8, d), BF16), jnp.zeros((2, 1000, 2, d), BF16)
  assert kernels(gathered_attention, q, k, k, jnp.zeros((2, lists, 300), jnp.int32)) == 1
  assert gathered.refusal(q[..., :32], k, k[..., :32], None, None).endswith('pad with zeros')


# 2:4.


def two_of_four(shape, dtype, seed=0):
  w = np.random.default_rng(seed).standard_normal(shape)
  places = np.argsort(np.random.default_rng(seed + 1).random((-(-shape[0] // 4), 4, *shape[1:])), axis=1)
  return jnp.asarray(np.where((places < 2).reshape(-1, *shape[1:])[:shape[0]], w, 0), dtype)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('shape, axes', [
    ((256, 128), (0,)), ((30, 5), (0,)), ((8, 3, 100), (2,)), ((4, 10, 6), (0, 1))])
def test_sparse24_matmul_and_its_gradients_are_those_of_the_dense_weight(shape, axes):
  order = [*axes, *(a for a in range(len(shape)) if a not in axes)]
  sizes = [shape[a] for a in order]
  w = jnp.transpose(two_of_four((int(np.prod(sizes[:len(axes)])), *sizes[len(axes):]), F32).reshape(sizes),
                    np.argsort(order))
  packed, x = Sparse24Array.from_dense(w, axes), normal((2, 3, int(np.prod(sizes[:len(axes)]))), F32, 5)
  merged = lambda w: jnp.transpose(w, order).reshape(x.shape[-1], -1)
  dense = lambda x, w: (x @ merged(w)).reshape(*x.shape[:-1], *sizes[len(axes):])
  np.testing.assert_allclose(sparse24_matmul(x, packed), dense(x, w), rtol=1e-5, atol=1e-5)
  assert sparse24_matmul(x[:0], packed).shape == (0, 3, *sizes[len(axes):])
  loss = lambda f: lambda x, w: jnp.sum(f(x, w) ** 2)
  op = lambda x, values: sparse24_matmul(x, dataclasses.replace(packed, values=values))
  dx, dv = jax.grad(loss(op), (0, 1))(x, packed.values)
  wanted, dw = jax.grad(loss(dense), (0, 1))(x, w)
  np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=1e-4)
  kept = Sparse24Array.from_dense(jnp.where(w != 0, dw, 0), axes)
  got = jnp.where(w != 0, dataclasses.replace(packed, values=dv).to_dense(), 0)
  np.testing.assert_allclose(got, kept.to_dense(), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_2_to_4_values_is_made_by_slabs_of_outputs():
  w = two_of_four((8, 2500), F32)
  packed, x, dy = Sparse24Array.from_dense(w), normal((3, 8), F32, 5), normal((3, 2500), F32, 6)
  step = lambda x, dy, values: jax.vjp(
      lambda v: sparse24_matmul(x, dataclasses.replace(packed, values=v)), values)[1](dy)[0]
  kept = Sparse24Array.from_dense(jnp.where(w != 0, x.T @ dy, 0))
  got = dataclasses.replace(packed, values=step(x, dy, packed.values)).to_dense()
  np.testing.assert_allclose(jnp.where(w != 0, got, 0), kept.to_dense(), rtol=1e-5, atol=1e-5)
  filled = (jax.ShapeDtypeStruct((3, n), F32) for n in (2 * packed.values.shape[1], len(packed.values)))
  made = jax.make_jaxpr(lambda x, dy: reference.sampled(x, dy, packed))(*filled).jaxpr
  dots = [eqn.outvars[0].aval.shape for eqn in equations(made) if eqn.primitive.name == 'dot_general']
  assert [shape[0] for shape in dots] == [1024]


@pytest.mark.sampled
@pytest.mark.parametrize('tokens, shape, n', [
    (1, (4096, 1024), 8), (16, (4096, 1024), 16), (300, (4096, 1024), 64), (9000, (4096, 1024), 256), (1, (300, 70), 8),
    (300, (300, 70), 64), (9000, (300, 70), 128)])
@pytest.mark.parametrize('dtype', [BF16, F16])
def test_sparse24_lowers_for_cuda_to_the_sparse_instruction(tokens, shape, n, dtype):
  """An instruction takes as many tokens as there are, or as leave enough tiles for all multiprocessors."""
  w = jax.eval_shape(lambda w: Sparse24Array.from_dense(w, check=False), jax.ShapeDtypeStruct(shape, dtype))
  text = lowered(sparse24_matmul, jax.ShapeDtypeStruct((tokens, shape[0]), dtype), w)
  assert text.count('mosaic_gpu_v2') == 1
  found = set(re.findall(r'wgmma\.mma_async\.sp\.sync\.aligned\.(\S+) .*?(\d), p, 1, 1, 0, 0;', text))
  kind = 'bf16' if dtype == BF16 else 'f16'
  assert found == {(f'm64n{n}k32.f32.{kind}.{kind}', selector) for selector in '01'}


def test_the_metadata_of_a_thread_are_two_registers_of_four_instructions():
  packed = Sparse24Array.from_dense(two_of_four((128, 64), BF16))
  assert packed.metadata.shape[2:] == (128, 2) and sparse24.WORDS // sparse24.INSTRUCTION == 4


# Refusals.


def n_m_refusal(n, m, width=1):
  w = NMArray.from_dense(jnp.ones((8, 4)), n, m, 0, check=False, width=width)
  return nm_matmul(jnp.ones((1, 8), BF16), w, explain=True)['cuda'].reason


def attention_refusal(queries=256, keys=256, d=64, heads=(2, 2), dtypes=(BF16, BF16), block_q=128, block_k=128):
  q = jax.ShapeDtypeStruct((1, queries, heads[0], d), dtypes[0])
  k = jax.ShapeDtypeStruct((1, keys, heads[1], d), dtypes[1])
  index = jax.ShapeDtypeStruct((heads[0], queries // block_q, 1), jnp.int32)
  counts = jax.ShapeDtypeStruct(index.shape[:2], jnp.int32)
  return attention.refusal(q, k, k, index, counts, block_q=block_q, block_k=block_k, causal=False, scale=1.0)


REFUSED = {
    'float32': (lambda: block_sparse.refusal(jnp.zeros((1, 64)), blocks((64, 64), (64, 64), BF16)), 'cast to bfloat16'),
    'block': (lambda: block_sparse.refusal(jnp.zeros((1, 64), BF16), blocks((64, 64), (32, 32), BF16)), 'pack with'),
    'float32, 2:4': (lambda: sparse24.refusal(jnp.zeros((1, 128)), None), 'tensorfloat32'),
    'integers': (lambda: sparse24.refusal(jnp.zeros((1, 128), jnp.int8), None), 'not int8'),
    'attention in float32': (lambda: attention_refusal(dtypes=(F32, F32)), 'cast to bfloat16'),
    'two dtypes': (lambda: attention_refusal(dtypes=(BF16, F16)), 'one dtype'),
    'heads of 80': (lambda: attention_refusal(d=80), 'heads of 64 and 128'),
    'blocks of queries': (lambda: attention_refusal(block_q=64), 'multiples of 128'),
    'blocks of keys': (lambda: attention_refusal(block_k=32), 'multiples of 64'),
    'undivided': (lambda: attention_refusal(queries=300), 'pad with zeros'),
    '2:4 of one format': (lambda: n_m_refusal(2, 4), "pack it as 'sparse24'"),
    '1:4': (lambda: n_m_refusal(1, 4), '2:4 only, not 1:4; prune'),
    '2:4 in vectors': (lambda: n_m_refusal(2, 4, 2), 'not 2:4 in vectors of 2;'),
    'shared heads': (lambda: attention_refusal(heads=(3, 2)), 'evenly'),
}


@pytest.mark.parametrize('refusal, why', REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_with_the_remedy(refusal, why):
  assert why in refusal()


def test_what_can_run_is_not_refused():
  for block in block_sparse.BLOCKS:
    for dtype in (BF16, F16):
      assert block_sparse.refusal(jnp.zeros((1, block[0]), dtype), blocks(block, block, dtype)) is None
      assert hopper.refused_dtype(dtype) is None
  assert attention_refusal() is None


def test_a_cuda_that_miscompiles_causal_masks_is_refused(monkeypatch):
  q = jax.ShapeDtypeStruct((1, 128, 1, 64), BF16)
  refusal = functools.partial(attention.refusal, q, q, q, None, None, block_q=128, block_k=128, scale=1.0)
  for version, bad in ((12070, False), (12080, True), (12090, True), (12091, False), (13000, False), (None, False)):
    monkeypatch.setattr(attention, '_cuda', lambda version=version: version)
    assert ('12.9.1' in (refusal(causal=True) or '')) == bad and refusal(causal=False) is None
