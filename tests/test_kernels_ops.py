"""The products of `kernels_pallas` beside block-sparse ones: the numbers of the dense reference, or a refusal."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.active import active_matmul
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.n_m import nm_matmul
from kernels_pallas.n_m import reference as n_m_reference
from kernels_pallas.unstructured import unstructured_matmul
from sparsejax import formats, io, patterns
from sparsejax.formats import CSCArray, NMArray
from sparsejax.types import Axes

DTYPES = {'float32': 1e-6, 'bfloat16': 8e-3, 'float16': 1e-3}
WAYS = ('xla', 'dense')  # the others do not run on CPUs, and have tests of their own
TOKENS = {'none': (0,), 'a vector': (), 'one': (1,), 'odd': (3, 7), 'many': (70,)}
# All numbers of tokens in one dtype, and all dtypes for one of them.
inputs = pytest.mark.parametrize('tokens, dtype', [
    *((tokens, 'float32') for tokens in TOKENS), ('odd', 'bfloat16'), ('odd', 'float16')])


@pytest.fixture(scope='module', autouse=True)
def quickly_compiled():
  """Hundreds of small programs: most of the time is LLVM's."""
  before = jax.config.values['jax_disable_most_optimizations']
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)
  jax.clear_caches()  # other modules count on the bits of the rest


def close(found, expected, k, dtype='float32'):
  """Up to rounding of a sum of `k` products."""
  atol = 4 * DTYPES[dtype] * math.sqrt(k)
  np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), atol=atol, rtol=atol)


def normal(shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Products with a packed weight: op, shape of the weight, contracted axes, what is kept of it, and how it is packed.

COLUMNS = (unstructured_matmul, lambda w, mask, axes: CSCArray.from_dense(w, mask, axes))


def share(kept):
  return lambda shape, axes: np.random.default_rng(2).random(shape) < kept


def holes(shape, axes):
  """Empty rows and columns, the first and the last among them."""
  mask = np.random.default_rng(2).random(shape) < 0.3
  mask[[0, 7, -1]] = mask[:, [0, 9, -1]] = False
  return mask


def of(n, m, width=1):
  """Of N:M, the mask, and how it is packed."""
  pattern = patterns.NM(n, m, width)
  return (nm_matmul, lambda w, mask, axes: NMArray.from_dense(w, n, m, axes, width=width)), (
      lambda shape, axes: np.asarray(pattern(normal(shape, seed=3), None, axes)))


MATRIX = Axes((0,), (1,))
WEIGHTS = {
    '2:4': (*of(2, 4), (32, 31), MATRIX), '3:7': (*of(3, 7), (35, 6), MATRIX),
    '2:4x8': (*of(2, 4, 8), (32, 24), MATRIX), '2:4x32': (*of(2, 4, 32), (36, 96), MATRIX),
    '7:8x32, not worth it': (*of(7, 8, 32), (16, 32), MATRIX),
    '2:4 attention out': (*of(2, 4), (2, 8, 5), Axes((0, 1), (2,))),
    '1:4x32 query, across heads': (*of(1, 4, 32), (8, 4, 48), Axes((0,), (1, 2))),
    '1:4x6, outputs in another order': (*of(1, 4, 6), (8, 4, 9), Axes((0,), (2, 1))),
    '2:4x5 between': (*of(2, 4, 5), (4, 10, 6), Axes((0, 2), (1,))),
    'csc 90 %': (COLUMNS, share(0.1), (45, 31), MATRIX), 'csc 50 %': (COLUMNS, share(0.5), (17, 40), MATRIX),
    'csc with holes': (COLUMNS, holes, (20, 24), MATRIX), 'csc, nothing': (COLUMNS, share(0.0), (8, 6), MATRIX),
    'csc, all': (COLUMNS, share(1.1), (8, 6), MATRIX), 'csc, one row': (COLUMNS, share(0.5), (1, 9), MATRIX),
    'csc attention out': (COLUMNS, share(0.2), (2, 9, 5), Axes((0, 1), (2,))),
    'csc [out, in]': (COLUMNS, share(0.2), (7, 16), Axes((1,), (0,))),
    'csc query': (COLUMNS, share(0.2), (8, 2, 7), Axes((0,), (1, 2))),
}
SOME = ('2:4', '2:4x32', 'csc 90 %')  # one of each way to compute
some = pytest.mark.parametrize('name, way', [
    ('2:4', 'dense'), ('2:4x32', 'xla'), ('csc 90 %', 'xla'), ('csc 90 %', 'dense')])


def weight(name, dtype='float32'):
  """The op, the dense weight as [K, *outputs], it packed, and what turns an array like it into [K, *outputs]."""
  (op, packing), kept, shape, axes = WEIGHTS[name]
  mask = kept(shape, axes)
  w = jnp.where(mask, normal(shape, dtype, seed=1), 0)
  others = [a for a in range(len(shape)) if a not in axes.contracted]
  k = math.prod(shape[a] for a in axes.contracted)
  matrix = lambda a: np.transpose(np.asarray(a, np.float64), (*axes.contracted, *others)).reshape(
      k, *(shape[a] for a in others))
  return op, matrix(w), packing(w, mask, axes), matrix


def value_and_gradients(f, dy, *args):
  """In one program: `f(*args)`, and its gradients for the cotangent `dy`."""
  def both(dy, *args):
    y, back = jax.vjp(f, *args)
    return y, back(dy)

  return jax.jit(both)(dy, *args)


def product(x, w):
  return np.tensordot(np.asarray(x, np.float64), w, 1)


XLA = ('3:7', '2:4x8', '1:4x32 query, across heads')


# How the axes lie is the same for both; the loops of 'xla' take seconds to compile.
@pytest.mark.parametrize('name, way', [(name, way) for name in WEIGHTS for way in WAYS
                                       if 'csc' in name or way == 'dense' or name in XLA])
def test_products_and_gradients_are_those_of_the_dense_masked_weight(name, way):
  op, dense, packed, matrix = weight(name)
  k = len(dense)
  x = normal((3, 7, k))
  dy = normal((3, 7, *dense.shape[1:]), seed=5)
  run = lambda x, v: op(x, formats.with_values(packed, v), implementation=way)
  y, (dx, dv) = value_and_gradients(run, dy, x, packed.values)
  assert y.shape == dy.shape and y.dtype == x.dtype
  close(y, product(x, dense), k)
  close(dx, np.tensordot(np.asarray(dy, np.float64), np.moveaxis(dense, 0, -1), dense.ndim - 1), dense[0].size)
  dense_gradient = np.tensordot(np.asarray(x, np.float64), np.asarray(dy, np.float64), ((0, 1), (0, 1)))
  assert dv.shape == packed.values.shape and dv.dtype == packed.dtype
  # The gradient of what is stored, in its place; what only fills a group up has one too.
  stored = matrix(dataclasses.replace(packed, values=jnp.ones_like(packed.values)).to_dense())
  close(matrix(formats.with_values(packed, dv).to_dense()), np.where(stored != 0, dense_gradient, 0), 21)


@inputs
@some
def test_any_number_of_tokens_in_any_dtype(name, way, dtype, tokens):
  op, dense, packed, _ = weight(name, dtype)
  x = normal((*TOKENS[tokens], len(dense)), dtype)
  def run(x, v):
    y = op(x, formats.with_values(packed, v), implementation=way)
    return y.astype('f4').sum(), y

  (dx, dv), y = jax.jit(jax.grad(run, (0, 1), has_aux=True))(x, packed.values)
  assert y.shape == (*TOKENS[tokens], *dense.shape[1:]) and y.dtype == x.dtype
  close(y, product(x, dense), len(dense), dtype)
  assert (dx.shape, dx.dtype, dv.shape, dv.dtype) == (x.shape, x.dtype, packed.values.shape, packed.dtype)
  if not TOKENS[tokens] or TOKENS[tokens][0]:
    close(dx, np.broadcast_to(dense.sum(-1), x.shape), dense[0].size, dtype)
  else:
    assert not np.any(dv)


@some
def test_the_dtypes_of_x_and_of_the_values_may_differ(name, way):
  op, dense, packed, _ = weight(name, 'float32')
  x = normal((5, len(dense)), 'bfloat16')
  dy = jnp.ones((5, *dense.shape[1:]), 'bfloat16')
  y, (dx, dv) = value_and_gradients(
      lambda x, v: op(x, formats.with_values(packed, v), implementation=way), dy, x, packed.values)
  assert (y.dtype, dx.dtype, dv.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  close(y, product(x, dense), len(dense), 'bfloat16')


@some
def test_vmap_over_inputs_weights_and_both(name, way):
  op, dense, packed, _ = weight(name)
  x, stack = normal((2, 5, len(dense))), jax.tree.map(lambda a: jnp.stack([a, a]), packed)
  stack = formats.with_values(stack, stack.values * jnp.asarray([1.0, -2.0]).reshape(2, *[1] * packed.values.ndim))
  run = lambda x, w: op(x, w, implementation=way)
  close(jax.jit(jax.vmap(run, (0, None)))(x, packed), product(x, dense), len(dense))
  close(jax.jit(jax.vmap(run, (None, 0)))(x[0], stack), [product(x[0], dense), product(x[0], -2 * dense)], len(dense))
  close(jax.jit(jax.vmap(run))(x, stack), [product(x[0], dense), product(x[1], -2 * dense)], len(dense))
  close(jax.lax.scan(lambda _, w: (None, run(x[0], w)), None, stack)[1][1], product(x[0], -2 * dense), len(dense))
  loss = lambda v, x: run(x, formats.with_values(packed, v)).sum()
  each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(packed.values, x)
  close(each.sum(0), jax.jit(jax.grad(loss))(packed.values, x), 10)


@pytest.mark.parametrize('name', SOME[1:])
def test_tokens_may_be_spread_over_devices(name):
  op, dense, packed, _ = weight(name)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  x = normal((16, 4, len(dense)))

  def loss(v, x):
    run = lambda x, v: jax.lax.psum(jnp.sin(op(x, formats.with_values(packed, v), implementation='xla')).sum(), 'data')
    return jax.shard_map(run, mesh=mesh, in_specs=(P('data'), P()), out_specs=P())(x, v)

  one = lambda v, x: jnp.sin(op(x, formats.with_values(packed, v), implementation='dense')).sum()
  for a, b in zip(*(jax.jit(jax.grad(f, (0, 1)))(packed.values, x) for f in (loss, one))):
    close(a, b, len(dense))


def largest(jaxpr):
  """Entries of the largest array that a program makes, in programs inside of it too."""
  sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
  inner = [largest(getattr(one, 'jaxpr', one)) for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params)]
  return max([*sizes, *inner, 0])


def test_n_m_makes_neither_the_dense_weight_nor_its_gradient():
  """Vectors make nothing dense; what unpacks the weight makes of the gradient no more than a slab of 512 outputs."""
  _, dense, packed, _ = weight('1:4x32 query, across heads')
  x = normal((3, len(dense)))
  loss = lambda x, v, way: jnp.sum(nm_matmul(x, formats.with_values(packed, v), implementation=way) ** 2)
  made = lambda way: largest(jax.make_jaxpr(jax.grad(lambda x, v: loss(x, v, way), (0, 1)))(x, packed.values).jaxpr)
  assert made('xla') < dense.size <= made('dense')
  w = jnp.where(patterns.NM(1, 4)(normal((64, 1100))), 1.0, 0)
  packed, x, dy = NMArray.from_dense(w, 1, 4, 0), normal((3, 64)), normal((3, 1100))
  slab = lambda x, dy: n_m_reference.sampled_by_slab(x, dy, packed)
  assert largest(jax.make_jaxpr(slab)(x, dy).jaxpr) <= 64 * 512
  close(jax.jit(slab)(x, dy), n_m_reference.sampled(x, dy, packed), 3)


def test_unstructured_products_reach_the_sparse_routine_on_both_ways():
  _, w, packed, _ = weight('csc 90 %')
  x = normal((64, len(w)))
  count = lambda f: jax.jit(f).lower(x, packed).as_text().count('@cpu_csr_sparse_dense_ffi')
  run = lambda x, w: unstructured_matmul(x, w, implementation='xla')
  assert count(run) == 1
  assert count(jax.grad(lambda x, w: jnp.sin(run(x, w)).sum())) == 2
  dense = lambda x, w: unstructured_matmul(x, w, implementation='dense')  # `None` would choose the routine
  assert count(jax.grad(lambda x, w: jnp.sin(dense(x, w)).sum())) == 0


# What `None` chooses, and says.

CHOICES = {
    'element-wise N:M': ('2:4', 300, 'dense', '1 outputs share .* CPUs N:M is not faster than dense'),
    'narrow vectors': ('2:4x8', 300, 'dense', '8 outputs share'), 'vectors': ('2:4x32', 300, 'xla', '50% are zero'),
    'few zeros': ('7:8x32, not worth it', 300, 'dense', '12% are zero, and vectors pay from 40%'),
    'unstructured': ('csc 90 %', 300, 'xla', '[89].% are zero, 300 tokens: the sparse routine of XLA on CPUs$'),
    'few tokens': ('csc 90 %', 8, 'xla', 'pays from 85% and 64 tokens on, and a weight that is left dense'),
    'half': ('csc 50 %', 300, 'dense', '300 tokens: unpacked; sparse pays from'),
}


@pytest.mark.parametrize('case', CHOICES)
def test_what_is_chosen_is_explained(case):
  name, tokens, chosen, why = CHOICES[case]
  op, dense, packed, _ = weight(name)
  x = normal((tokens, len(dense)))
  explained = op(x, packed, explain=True)
  assert explained['cpu'].implementation == chosen and re.search(why, explained['cpu'].reason), str(explained)
  text = lambda way: jax.jit(lambda x, w: op(x, w, implementation=way)).lower(x, packed).as_text(debug_info=False)
  assert text(None).count('dot_general') == text(chosen).count('dot_general')
  assert ('while' in text(None)) == ('while' in text(chosen))


# CSCArray.


def stack():
  """Two matrices, of as many nonzeros each."""
  w = np.zeros((2, 6, 5), 'f4')
  w[0].flat[[0, 7, 29]], w[1].flat[[3, 8, 9]] = (1, -0.0, 2), (np.nan, 3, 4)
  return w


@pytest.mark.parametrize('name', [name for name in WEIGHTS if 'csc' in name])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_columns_come_back_bit_for_bit(name, dtype, tmp_path):
  _, kept, shape, axes = WEIGHTS[name]
  raw = np.random.default_rng(4).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
  bits = lambda a: np.asarray(a).view(f'u{np.dtype(dtype).itemsize}')
  w = np.where(kept(shape, axes), bits(raw.view(dtype).reshape(shape)), 0).astype(f'u{raw.shape[-1]}').view(dtype)
  masked = CSCArray.from_dense(raw.view(dtype).reshape(shape), kept(shape, axes), axes)
  for packed in (CSCArray.from_dense(w, axes=axes), masked):
    assert packed.problem() is None and (packed.shape, packed.dtype) == (w.shape, w.dtype)
    for dense in (packed.to_dense(), jax.jit(formats.unpack)(packed)):
      np.testing.assert_array_equal(bits(dense), bits(w))
    io.save(tmp_path / 'f', {'w': packed})
    again = io.load(tmp_path / 'f')['w']
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    for found, saved in zip(jax.tree.leaves(again), jax.tree.leaves(packed)):
      assert found.dtype == saved.dtype and np.asarray(found).tobytes() == np.asarray(saved).tobytes()
  assert packed.nbytes == packed.values.size * (w.dtype.itemsize + 12) + 4 * (
      packed.contracted + math.prod(packed.outputs) + 2)


def test_columns_are_listed_as_documented():
  w = np.zeros((3, 4), 'f4')
  w[2, 0], w[0, 1], w[2, 1], w[1, 3] = 1, 2, 3, 4
  packed = CSCArray.from_dense(w)
  assert packed.values.tolist() == [1, 2, 3, 4] and packed.rows.tolist() == [2, 0, 2, 1]
  assert packed.cols.tolist() == [0, 1, 1, 3] and packed.starts.tolist() == [0, 1, 3, 3, 4]
  assert packed.order.tolist() == [1, 3, 0, 2] and packed.row_starts.tolist() == [0, 1, 2, 4]
  masked = CSCArray.from_dense(w, np.eye(3, 4, dtype=bool))
  assert masked.values.tolist() == [2 * 0, 0, 3 * 0] and masked.rows.tolist() == masked.cols.tolist() == [0, 1, 2]


def test_stacks_of_columns_and_pack():
  w = stack()
  packed = CSCArray.from_dense(w, axes=Axes((1,), (2,), layer=(0,)))
  assert packed.values.shape == (2, 3) and packed.problem() is None
  np.testing.assert_array_equal(np.asarray(packed.to_dense()).view('u4'), w.view('u4'))
  np.testing.assert_array_equal(jax.vmap(lambda p: p.to_dense())(packed), w)
  tree = {'a': {'kernel': w[0]}, 'b': np.ones(3, 'f4')}
  found = formats.pack(tree, 'csc')
  assert isinstance(found['a']['kernel'], CSCArray)
  np.testing.assert_array_equal(formats.unpack(found)['a']['kernel'], w[0])
  x = normal((4, 6))
  close(formats.matmul(x, found['a']['kernel']), np.asarray(x, np.float64) @ w[0], 6)


BROKEN = {
    'rows': (lambda p: {'rows': p.rows.at[0].set(99)}, 'rows are not all from 0 to 19'),
    'order of places': (lambda p: {'cols': p.cols[::-1]}, 'not in the order of their columns'),
    'order': (lambda p: {'order': p.order[::-1]}, 'its order do not list'),
    'starts': (lambda p: {'starts': p.starts.at[3].add(1)}, 'its starts do not'),
    'row_starts': (lambda p: {'row_starts': p.row_starts.at[3].add(1)}, 'its row_starts do not'),
    'dtype': (lambda p: {'rows': p.rows.astype(jnp.int16)}, 'its rows int16'),
    'length': (lambda p: {'values': p.values[1:]}, r'must be int32\['),
}


@pytest.mark.parametrize('what', BROKEN)
def test_broken_columns_are_found(what):
  packed = weight('csc with holes')[2]
  change, why = BROKEN[what]
  assert packed.problem() is None
  assert re.search(why, dataclasses.replace(packed, **change(packed)).problem())


# Active inputs.


@inputs
@pytest.mark.parametrize('way', WAYS)
def test_active_products_are_those_of_what_is_not_skipped(tokens, dtype, way):
  x, w = normal((*TOKENS[tokens], 96), dtype), normal((96, 40), dtype, seed=1)
  mask = np.arange(96) % 48 < 20
  run = lambda x, w: active_matmul(x, w, threshold=0.5, mask=jnp.asarray(mask), block=8, implementation=way)
  kept = np.where((np.abs(np.asarray(x, np.float32)) >= 0.5) & mask, np.asarray(x, np.float64), 0)
  y, (dx, dw) = value_and_gradients(run, jnp.ones((*TOKENS[tokens], 40), dtype), x, w)
  assert y.shape == (*TOKENS[tokens], 40) and y.dtype == x.dtype
  close(y, kept @ np.asarray(w, np.float64), 96, dtype)
  close(dx, np.where(kept != 0, np.asarray(w, np.float64).sum(1), 0), 40, dtype)
  close(dw, np.broadcast_to(kept.reshape(-1, 96).sum(0)[:, None], w.shape), 96, dtype)


@pytest.mark.parametrize('capacity', [0, 1, 3, 6, None])
def test_blocks_that_are_not_active_are_not_read_unless_there_are_too_many(capacity):
  """3 of 6 blocks are; NaN stands in the others. A NaN in x is below no threshold."""
  x = normal((2, 96)).at[:, 32:80].set(0).at[0, 5].set(0.25)
  w = normal((96, 8), seed=1)
  poisoned = w.at[32:80].set(jnp.nan)
  run = lambda x, w, **options: active_matmul(x, w, block=16, capacity=capacity, implementation='xla', **options)
  y = run(x, poisoned)
  if capacity in (0, 1):
    assert np.isnan(y).all()
  else:
    close(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64), 96)
  assert np.isfinite(jax.jit(jax.grad(lambda x: run(x, poisoned).sum()))(x)).all() == (capacity not in (0, 1))
  close(run(x, w, threshold=0.3), np.where(np.abs(x) < 0.3, 0, x).astype('f8') @ np.asarray(w, np.float64), 96)
  close(run(x, w, threshold=jnp.where(jnp.arange(96) < 16, 9.0, 0)), np.where(np.arange(96) < 16, 0, x) @ w, 96)
  assert np.isnan(run(x.at[1, 0].set(jnp.nan), w, threshold=0.3)).any(1).tolist() == [False, True]
  close(jax.jit(jax.vmap(lambda x: run(x, w)))(x), x @ w, 96)


@pytest.mark.parametrize('tokens, outputs, way, why', [
    (1, 2**15, 'xla', 'reads the active blocks'), (1, 64, 'dense', 'lies in the cache'),
    (17, 2**15, 'dense', '17 tokens')])
def test_active_products_pay_for_few_tokens_and_large_weights(tokens, outputs, way, why):
  choice = active_matmul(jnp.ones((tokens, 128)), jnp.zeros((128, outputs)), explain=True)['cpu']
  assert choice.implementation == way and why in choice.reason


# Attention: batch, Tq, Tk, heads, kv_heads, d, block_q, block_k, how many blocks are listed.

ATTENTION = {
    'plain': ((2,), 32, 32, 2, 2, 8, 8, 8, 2), 'no batch, shared heads': ((), 32, 48, 4, 2, 8, 16, 8, 3),
    'lengths that do not divide': ((2,), 21, 27, 2, 1, 8, 8, 8, 4), 'two batches': ((2, 3), 8, 16, 1, 1, 4, 4, 8, 1),
    'longer queries': ((1,), 40, 16, 2, 2, 8, 8, 8, 2), 'everything': ((1,), 16, 24, 2, 2, 8, 8, 8, 3),
}


def attended(name, dtype='float32'):
  """Inputs, index, counts, options, and the mask that they are."""
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
  """In float32, of the whole mask; a query that sees no key gives zeros."""
  y = jax.nn.dot_product_attention(*(a.reshape(-1, *a.shape[-3:]).astype('f4') for a in (q, k, v)), mask=mask[None])
  return jnp.where(mask.any(-1).T[..., None], y, 0).reshape(q.shape)


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


# Refusals.

NM24, WIDE, CSC = (weight(name)[2] for name in SOME)
HALF = jnp.ones((4, 16))
ONES = jnp.ones((16, 8))
QUERIES, LISTED = jnp.ones((16, 2, 8)), jnp.zeros((2, 2, 1), jnp.int32)
REFUSED = {
    'N:M: another format': (lambda: nm_matmul(HALF, CSC), 'nm_matmul: .*formats.NMArray, not CSCArray; NMArray.from'),
    'N:M: length': (lambda: nm_matmul(HALF, NM24),
                    r'nm_matmul: x of shape \(4, 16\) must end in 32.*\(32, 31\).*reshape x'),
    'N:M: scalar': (lambda: nm_matmul(jnp.float32(1), NM24), r'x of shape \(\)'),
    'N:M: dtype': (lambda: nm_matmul(jnp.ones((4, 32), int), NM24), 'x has dtype int32; float32, bfloat16 and float16'),
    'N:M: stack': (lambda: nm_matmul(HALF, NMArray.from_dense(
        jnp.zeros((3, 16, 4)), 2, 4, Axes((1,), (2,), layer=(0,)), width=2)), r'\(3, 16, 4\).*one of it at a time'),
    'N:M: name': (lambda: nm_matmul(jnp.ones((4, 32)), NM24, implementation='mosaic'),
                  "nm_matmul: unknown implementation 'mosaic'.*dense, mosaic_tpu, xla"),
    'N:M: elsewhere': (lambda: nm_matmul(jnp.ones((4, 32)), NM24, implementation='mosaic_tpu'),
                       "'mosaic_tpu' cannot run this: it is for tpu, and the default device is cpu. 'xla', 'dense'"),
    'columns: another format': (lambda: unstructured_matmul(HALF, HALF), 'formats.CSCArray, not .*CSCArray.from_dense'),
    'columns: length': (lambda: unstructured_matmul(HALF, CSC), r'unstructured_matmul: x of shape .* end in 45'),
    'columns: stack': (lambda: unstructured_matmul(HALF, CSCArray.from_dense(
        stack(), axes=Axes((1,), (2,), layer=(0,)))), r'x of shape \(4, 16\)|is a stack'),
    'columns: a stack of the right length': (lambda: unstructured_matmul(jnp.ones((4, 6)), CSCArray.from_dense(
        stack(), axes=Axes((1,), (2,), layer=(0,)))), r'weight of shape \(2, 6, 5\) is a stack.*vmap'),
    'columns: name': (lambda: unstructured_matmul(jnp.ones((4, 45)), CSC, implementation='mosaic_gpu'),
                      "unknown implementation 'mosaic_gpu'.*None, dense, xla"),
    'columns: mask': (lambda: CSCArray.from_dense(ONES, np.ones((4, 2), bool)), r'mask of shape \(4, 2\)'),
    'columns: mask of numbers': (lambda: CSCArray.from_dense(np.ones((4, 4), 'f4'), np.ones((4, 4))), 'must be bool'),
    'columns: traced': (lambda: jax.jit(CSCArray.from_dense)(ONES), 'CSCArray.from_dense: .*traced'),
    'columns: too many': (lambda: CSCArray.from_dense(jax.ShapeDtypeStruct((2**16, 2**15), 'f4')), '2.31 weights'),
    'columns: counts': (lambda: CSCArray.from_dense(np.stack([np.eye(4), np.ones((4, 4))]).astype('f4'), axes=Axes(
        (1,), (2,), layer=(0,))), "different numbers of nonzeros, '16', '4'; pack them one by one"),
    'columns: taps': (lambda: CSCArray.from_dense(jnp.ones((3, 3, 4, 4)), axes=Axes((2,), (3,), (0, 1))), 'spatial'),
    'columns: file': (lambda: CSCArray.restored({}, (4, 4), {'axes': [0, 1], 'stacked': 0}), 'contracted along'),
    'active: shapes': (lambda: active_matmul(HALF, HALF), r'\(4, 16\) and w of shape \(4, 16\) must be \[..., K\]'),
    'active: block': (lambda: active_matmul(HALF, ONES, block=6), 'block 6 must be a whole number that divides K = 16'),
    'active: mask': (lambda: active_matmul(HALF, ONES, mask=jnp.ones((4,), bool)), r'mask of shape \(4,\).*\(16,\)'),
    'active: capacity': (lambda: active_matmul(HALF, ONES, capacity=0.5), 'capacity 0.5 must be a number of blocks'),
    'active: dtype': (lambda: active_matmul(HALF.astype(int), ONES), 'x has dtype int32'),
    'active: name': (lambda: active_matmul(HALF, ONES, implementation='mosaic_tpu'), 'active_matmul: unknown impl'),
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
