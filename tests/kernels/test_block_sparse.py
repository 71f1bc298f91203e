"""Tests that products with a `BlockSparseArray` are those with the dense masked weight, in every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from products import ROUNDING, WAYS, close, normal, value_and_gradients

import sparsejax as sj
from benchmarks import packed_training
from kernels_pallas import block_sparse_matmul, dispatch, sampled_matmul
from kernels_pallas.block_sparse import reference
from sparsejax import formats, io
from sparsejax.formats import BlockSparseArray
from sparsejax.types import Axes

# Shape of the weight, block, and fraction of blocks that are kept. The name says what is odd about the weight.
WEIGHTS = {
    'one block': ((16, 8), (16, 8), 1.0), 'all kept': ((32, 64), (16, 16), 1.0), 'square': ((64, 64), (16, 16), 0.4),
    'columns that do not divide': ((64, 50), (16, 16), 0.5), 'rows that do not divide': ((70, 64), (32, 16), 0.3),
    'neither': ((45, 30), (32, 32), 0.7), 'nothing kept': ((64, 96), (16, 32), 0.0),
    'a tenth': ((160, 160), (16, 16), 0.1), 'wide blocks': ((32, 96), (8, 48), 0.5),
    'eight columns': ((256, 64), (32, 8), 0.9),
}
MANY = {'a tenth': 4000, 'eight columns': 512}  # Gathered inputs of these tokens do not fit the cache.


def weight(name, dtype='float32', seed=0):
  """Returns the dense masked weight, its mask, and the packed weight."""
  (k, n), (bk, bn), kept = WEIGHTS[name]
  rng = np.random.default_rng(seed)
  grid = rng.random((-(-k // bk), -(-n // bn))) < kept
  mask = np.kron(grid, np.ones((bk, bn)))[:k, :n] > 0
  w = jnp.where(mask, jnp.asarray(rng.standard_normal((k, n)), dtype), 0)
  return w, mask, BlockSparseArray.from_dense(w, mask, (bk, bn))


def exact(a, b):
  """Returns the product in float64, computed on the host."""
  return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


# The format.


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_weight_comes_back_bit_for_bit_and_is_listed_row_and_column(name, tmp_path):
  w, mask, packed = weight(name)
  assert packed.problem() is None
  assert packed.shape == w.shape and packed.dtype == w.dtype and packed.contracted_size == len(w)
  for dense in (packed.to_dense(), jax.jit(formats.unpack)(packed)):
    np.testing.assert_array_equal(np.asarray(dense).view('u4'), np.asarray(w).view('u4'))
  assert set(np.asarray(packed.rows).tolist()) == set(range(packed.grid[0]))
  assert set(np.asarray(packed.cols).tolist()) == set(range(packed.grid[1]))
  assert sum(packed.fan_in) == sum(packed.fan_out) == len(packed.rows)
  by_row = np.asarray(packed.rows)[packed.order], np.asarray(packed.cols)[packed.order]
  assert sorted(zip(*by_row)) == list(zip(*by_row))
  io.save(tmp_path / 'f', {'w': packed})
  again = io.load(tmp_path / 'f')['w']
  assert jax.tree.structure(again) == jax.tree.structure(packed)  # The structure includes fan_in, fan_out and full.
  np.testing.assert_array_equal(again.to_dense(), w)


def test_what_a_mask_keeps_is_stored_though_it_is_zero_and_nothing_else():
  w, mask = np.ones((32, 32), 'f4'), np.zeros((32, 32), bool)
  w[:16, :16] = 0
  mask[:16, :8], mask[16:, 16:] = True, True
  packed = BlockSparseArray.from_dense(w, mask, (16, 16))
  np.testing.assert_array_equal(packed.to_dense(), np.where(mask, w, 0))
  assert list(zip(packed.rows.tolist(), packed.cols.tolist())) == [(0, 0), (1, 1)]


@pytest.mark.parametrize('shape, axes, k', [
    ((8, 4, 6), Axes((0,), (1, 2)), 8), ((4, 6, 8), Axes((0, 1), (2,)), 24),
    ((1, 1, 8, 12), Axes((2,), (3,), (0, 1)), 8), ((6, 8), 1, 8)])
def test_kernels_of_any_layout_are_one_matrix(shape, axes, k):
  w = np.random.default_rng(0).standard_normal(shape).astype('f4')
  packed = BlockSparseArray.from_dense(w, block=(4, 3), axes=axes)
  assert packed.contracted_size == k and packed.problem() is None
  np.testing.assert_array_equal(packed.to_dense(), w)
  x = normal((5, k))
  close(block_sparse_matmul(x, packed, implementation='xla'), formats.matmul(x, packed), k)


def stack(kept=((1, 0), (0, 1))):
  """Returns two matrices with equally many blocks in different places."""
  masks = [np.kron(np.asarray(m), np.ones((8, 8))) > 0 for m in (np.eye(2), kept)]
  w = np.stack([np.where(m, np.random.default_rng(i).standard_normal((16, 16)), 0) for i, m in enumerate(masks)])
  return w.astype('f4')


@pytest.mark.parametrize('grid, block, tokens, looped', [
    ((8, 8), 128, 256, False), ((8, 8), 128, 257, True),  # Half of the blocks are stored: 4 MB of parts.
    ((8, 16), 16, 64, False), ((8, 17), 16, 64, True),  # 64 blocks
])
def test_gradients_of_small_weights_are_not_looped(grid, block, tokens, looped):
  mask = np.indices(grid).sum(0) % 2 == 0
  w = BlockSparseArray.from_dense(jnp.ones(np.multiply(grid, block)), np.kron(mask, np.ones((block, block), bool)),
                                  (block, block))
  x, dy = (jnp.zeros((tokens, n)) for n in w.shape)
  made = jax.make_jaxpr(reference.gradients)(x, dy, w)
  assert any(eqn.primitive.name == 'scan' for eqn in made.eqns) == looped


def test_a_stack_goes_through_vmap_and_scan():
  w = stack(((0, 1), (1, 0)))
  packed = BlockSparseArray.from_dense(w, block=(8, 8), axes=Axes((1,), (2,), (), (0,)))
  x = normal((3, 16))
  expected = [exact(x, one) for one in w]
  close(jax.vmap(lambda one: block_sparse_matmul(x, one, implementation='xla'))(packed), expected, 16)
  close(jax.lax.scan(lambda c, one: (c, block_sparse_matmul(x, one, implementation='xla')), 0, packed)[1], expected, 16)
  np.testing.assert_array_equal(packed.to_dense(), w)


@pytest.mark.parametrize('first, fan_in', [
    ([[1, 1, 1], [1, 0, 0], [1, 0, 0]], None), ([[0, 0, 1], [1, 1, 1], [0, 0, 1]], (1, 1, 3))])
def test_matrices_of_a_stack_that_differ_in_their_columns_or_rows(first, fan_in):
  """If columns or rows have different numbers of blocks, their fan is not known, and sums go by segments."""
  w = np.stack([np.kron(one, np.ones((8, 8))) for one in (first, [[1, 0, 1], [0, 1, 1], [0, 0, 1]])]).astype('f4')
  packed = BlockSparseArray.from_dense(w, block=(8, 8), axes=Axes((1,), (2,), (), (0,)))
  assert packed.fan_in == fan_in and packed.fan_out is None and packed.problem() is None
  x = normal((3, 24))
  one = lambda p: jax.vjp(lambda x, v: block_sparse_matmul(x, formats.with_values(p, v), implementation='xla'), x,
                          p.values)
  for i in range(2):
    y, back = one(jax.tree.map(lambda a, i=i: a[i], packed))
    dx, dv = back(jnp.ones_like(y))
    close(y, exact(x, w[i]), 24)
    close(dx, exact(np.ones_like(y), w[i].T), 24)
    assert dv.shape == packed.values.shape[1:]


BROKEN = {
    'rows': lambda p: {'rows': p.rows.at[0].set(99)}, 'cols': lambda p: {'cols': p.cols[::-1]},
    'order': lambda p: {'order': p.order[::-1]}, 'fan_in': lambda p: {'fan_in': (*p.fan_in[1:], p.fan_in[0] + 1)},
    'kept': lambda p: {'kept': p.kept[1:]}, 'full': lambda p: {'full': not p.full},
    'dtype': lambda p: {'rows': p.rows.astype(jnp.int16)},
    'length': lambda p: {'order': p.order[1:]},
    'filling': lambda p: {'values': p.values.at[-1, -1, -1].set(1)},
}


@pytest.mark.parametrize('what', BROKEN)
def test_broken_metadata_is_found(what, tmp_path):
  packed = weight('rows that do not divide')[2]
  assert packed.problem() is None
  broken = dataclasses.replace(packed, **BROKEN[what](packed))
  assert broken.problem()
  with pytest.raises(ValueError, match="'w'"):
    io.save(tmp_path / 'f', {'w': broken})


def test_only_values_are_trained():
  packed = weight('square')[2]
  tree = {'a': packed, 'b': jnp.ones(3)}
  values = formats.values(tree)
  assert jax.tree.structure(values) == jax.tree.structure({'a': 0, 'b': 0})
  back = formats.with_values(tree, jax.tree.map(lambda v: 2 * v, values))
  np.testing.assert_array_equal(back['a'].to_dense(), 2 * packed.to_dense())


# The products.


@pytest.mark.sampled(8)
@pytest.mark.parametrize('name, way, dtype', [
    *((name, way, 'float32') for name in WEIGHTS for way in WAYS),
    *(('neither', way, dtype) for way in WAYS for dtype in ROUNDING if dtype != 'float32')])
def test_products_and_gradients_are_those_of_the_masked_dense_weight(name, way, dtype):
  w, mask, packed = weight(name, dtype)
  k, n = w.shape
  for tokens in ((2, 3), (40,), (MANY.get(name, 1),)):
    x, dy = normal((*tokens, k), dtype), normal((*tokens, n), dtype, 1)
    product = lambda x, v: block_sparse_matmul(x, formats.with_values(packed, v), implementation=way)
    y, (dx, dv) = value_and_gradients(product, dy, x, packed.values)
    assert y.dtype == dx.dtype == dv.dtype == x.dtype
    close(y, exact(x, w), k, dtype)
    close(dx, exact(dy, w.T), n, dtype)
    flat = exact(np.asarray(x, np.float64).reshape(-1, k).T, np.asarray(dy, np.float64).reshape(-1, n))
    expected = BlockSparseArray.from_dense(jnp.asarray(flat, 'float32'), mask, packed.block).values
    close(dv, expected, x.size // k, dtype)
    if len(tokens) == 2:
      close(sampled_matmul(x, dy, packed, implementation=way), expected, x.size // k, dtype)


@pytest.mark.parametrize('way', WAYS)
def test_no_tokens_and_vmap(way):
  w, _, packed = weight('rows that do not divide')
  product = lambda x: block_sparse_matmul(x, packed, implementation=way)
  assert product(jnp.zeros((0, 70))).shape == (0, 64) and product(jnp.zeros((3, 0, 70))).shape == (3, 0, 64)
  x = normal((4, 5, 70))
  close(jax.vmap(product)(x), exact(x, w), 70)
  close(jax.vmap(jax.grad(lambda x: product(x).sum()))(x), np.broadcast_to(w.sum(1), (4, 5, 70)), 64)
  assert sampled_matmul(jnp.zeros((0, 70)), jnp.zeros((0, 64)), packed, implementation=way).sum() == 0


def test_infinity_does_not_reach_what_is_not_stored():
  _, _, packed = weight('square')
  x = jnp.full((20, 64), jnp.inf).at[:, 16:].set(1)
  y = block_sparse_matmul(x, packed, implementation='xla')
  touched = np.zeros(4, bool)
  touched[np.asarray(packed.cols)[np.asarray(packed.rows) == 0]] = True
  assert (np.isfinite(y).all(0).reshape(4, 16).all(1) == ~touched).all() and touched.any() and not touched.all()


def test_sharded_by_tokens_and_by_output_columns():
  """Tokens are sharded under plain `jit`; columns are sharded as a stack of the shards' columns."""
  mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
  rng = np.random.default_rng(0)
  w = (rng.standard_normal((32, 64)) * np.kron(np.tile(np.eye(4), 2)[:, :8], np.ones((8, 8)))).astype('f4')
  packed = BlockSparseArray.from_dense(w, block=(8, 8))
  x = jax.device_put(normal((8, 32)), NamedSharding(mesh, P('data')))
  y = jax.jit(lambda x: block_sparse_matmul(x, packed, implementation='xla'))(x)
  close(y, exact(x, w), 32)
  columns = w.reshape(32, 4, 16).transpose(1, 0, 2)
  shards = BlockSparseArray.from_dense(columns, block=(8, 8), axes=Axes((1,), (2,), (), (0,)))
  local = lambda x, w: block_sparse_matmul(x, jax.tree.map(lambda a: a[0], w), implementation='xla')
  by_column = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P('data'), P('model')), out_specs=P('data', 'model')))
  close(by_column(x, shards), exact(x, w), 32)
  gradient = jax.grad(lambda v: by_column(x, formats.with_values(shards, v)).sum())(shards.values)
  whole = lambda v: block_sparse_matmul(x, formats.with_values(packed, v), implementation='xla').sum()
  dense = formats.with_values(packed, jax.grad(whole)(packed.values)).to_dense()
  close(formats.with_values(shards, gradient).to_dense(), dense.reshape(32, 4, 16).transpose(1, 0, 2), 32)


def test_the_dense_weight_is_in_no_program_of_the_sparse_products():
  """The program has no array of the size of the dense weight, forward or backward."""
  (k, n), _, _ = WEIGHTS['a tenth']
  packed = weight('a tenth')[2]
  loss = lambda x, v: (block_sparse_matmul(x, formats.with_values(packed, v), implementation='xla') ** 2).sum()
  for tokens in (4, 40):
    text = jax.jit(jax.grad(loss, (0, 1))).lower(normal((tokens, k)), packed.values).as_text()
    assert f'<{k}x{n}xf32>' not in text and f'<{k // 16}x{n // 16}x16x16xf32>' not in text
    assert f'<{tokens}x{n}xf32>' in text


# Choices and refusals.


def test_what_is_chosen_is_explained():
  sparse, filled = weight('a tenth')[2], weight('all kept')[2]
  choices = block_sparse_matmul(normal((40, 160)), sparse, explain=True)
  assert choices['cpu'].implementation == 'xla' and '%' in choices['cpu'].reason
  assert list(choices) == ['cpu', *dispatch.PLATFORMS]
  head, _, *rows = str(choices).splitlines()
  assert head.split() == ['platform', 'implementation', 'reason']
  assert [row.split()[:2] for row in rows] == [[name, choice.implementation] for name, choice in choices.items()]
  assert block_sparse_matmul(normal((40, 32)), filled, explain=True)['cpu'].implementation == 'dense'


@pytest.mark.parametrize('platform, mark', [('tpu', 'tpu_custom_call'), ('cuda', 'mosaic_gpu_v2'), ('cpu', None)])
def test_what_is_lowered_for_a_platform_has_its_kernels(platform, mark):
  """The test lowers the product, both gradients, and `vmap` over x, which is one product of more tokens."""
  mask = np.kron(np.eye(2), np.ones((128, 128))) > 0
  packed = BlockSparseArray.from_dense(jnp.asarray(mask, jnp.bfloat16), mask)
  product = lambda x, v: block_sparse_matmul(x, formats.with_values(packed, v))
  programs = {1: product, 3: jax.grad(lambda x, v: (product(x, v) ** 2).sum(), (0, 1)),
              -1: jax.vmap(product, (0, None))}
  x = jax.ShapeDtypeStruct((4, 256, 256), jnp.bfloat16)
  for calls, program in programs.items():
    exported = jax.export.export(jax.jit(program), platforms=[platform], disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')])(x, packed.values)
    text = exported.mlir_module()
    marks = ('tpu_custom_call', 'mosaic_gpu_v2')
    assert {m: text.count(f'@{m}(') for m in marks} == {m: abs(calls) if m == mark else 0 for m in marks}


SQUARE = weight('square')[2]
REFUSED = {
    'implementation': (lambda: block_sparse_matmul(normal((4, 64)), SQUARE, implementation='mosaic_tpuu'),
                       "unknown implementation 'mosaic_tpuu'.*Did you mean.*'mosaic_tpu'.*Valid.*'?dense.*xla"),
    'cannot run here': (lambda: block_sparse_matmul(normal((4, 64)), SQUARE, implementation='mosaic_gpu'),
                        r"'mosaic_gpu' cannot run this: it is for cuda, and the default device is cpu.*'xla'.*can"),
    'length': (lambda: block_sparse_matmul(normal((4, 60)), SQUARE), r'\(4, 60\).*must end in 64.*reshape'),
    'dtype': (lambda: block_sparse_matmul(jnp.ones((4, 64), jnp.int32), SQUARE), 'int32; cast x to float32, bfloat16'),
    'dense': (lambda: block_sparse_matmul(normal((4, 64)), jnp.ones((64, 64))), 'must be a formats.BlockSparseArray'),
    'stack': (lambda: block_sparse_matmul(normal((4, 16)), BlockSparseArray.from_dense(
        stack(), block=(8, 8), axes=Axes((1,), (2,), (), (0,)))), r'\(2, 16, 16\) is a stack.*vmap or scan'),
    'cotangent': (lambda: sampled_matmul(normal((4, 64)), jnp.ones((4, 60)), SQUARE), r'\(4, 60\) must be \(4, 64\)'),
    'block': (lambda: BlockSparseArray.from_dense(np.ones((4, 4), 'f4'), block=(0, 4)), 'two whole numbers'),
    'mask': (lambda: BlockSparseArray.from_dense(np.ones((4, 4), 'f4'), np.ones((4, 2), bool)),
             r'mask of shape \(4, 2\)'),
    'counts': (lambda: BlockSparseArray.from_dense(np.stack([np.eye(16), np.ones((16, 16))]).astype('f4'), block=(8, 8),
                                                   axes=Axes((1,), (2,), (), (0,))), "numbers of blocks, '2', '4'"),
    'taps': (lambda: BlockSparseArray.from_dense(np.ones((3, 3, 4, 4), 'f4'), axes=Axes((2,), (3,), (0, 1))), '1x1'),
    'traced': (lambda: jax.jit(BlockSparseArray.from_dense)(jnp.ones((4, 4))), 'not known here'),
    'pack': (lambda: formats.pack({'conv': {'kernel': jnp.ones((3, 3, 8, 8))}}, '8x8'), "'conv/kernel'.*1x1"),
}


@pytest.mark.parametrize('what', REFUSED)
def test_refusals_say_what_and_what_else(what):
  call, message = REFUSED[what]
  with pytest.raises(ValueError, match=message):
    call()


def test_training_packed_weights_is_training_masked_ones(standard_promotion):
  """The benchmark's own runs, made small: packed losses equal masked losses up to rounding, and differ from dense."""
  sizes = packed_training.Sizes(width=64, hidden=128, tokens=48, block=16)
  learned = {name: packed_training.losses(run, 12) for name, run in packed_training.runs(sizes).items()}
  np.testing.assert_allclose(learned['packed'], learned['masked'], rtol=1e-5)
  assert abs(learned['dense'][-1] / learned['masked'][-1] - 1) > 0.01


def test_a_stack_with_equally_many_blocks_a_layer_packs_though_empty_rows_differ():
  axes, w = Axes((1,), (2,), layer=(0,)), normal((3, 64, 64))
  w = jnp.where(sj.Block((8, 8), 0.9)(abs(w), None, axes), w, 0)
  stack = formats.pack({'kernel': w}, sj.Block((8, 8)), axes={'kernel': axes})['kernel']
  np.testing.assert_array_equal(stack.to_dense(), w)
  assert stack.problem() is None and len(set(np.asarray(stack.kept).sum(1))) == 1
  x = normal((5, 64))
  for layer in range(3):
    one = jax.tree.map(lambda a, layer=layer: a[layer], stack)
    close(block_sparse_matmul(x, one), x @ w[layer], 64)
