"""Tests the numbers of the kernels for TPUs in interpret mode, where unwritten memory is NaN, and lowers them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import blocks, f32, normal, rounded_once

from kernels_pallas import attention as ops
from kernels_pallas import block_sparse_attention, mosaic_tpu
from kernels_pallas.active import active_matmul, active_outputs
from kernels_pallas.active import tpu as active
from kernels_pallas.attention import tpu as attention
from kernels_pallas.block_sparse import tpu as block_sparse
from kernels_pallas.gathered import gathered_attention
from kernels_pallas.gathered import tpu as gathered
from kernels_pallas.n_m import tpu as n_m
from sparsejax.attention.edits import ScoreEdit, segment_edits
from sparsejax.formats import BlockSparseArray, NMArray

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
INTERPRET = pltpu.InterpretParams()


def calls(f, *args):
  """Returns the number of kernels in `f` when it is lowered for a TPU."""
  specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
  return jax.export.export(jax.jit(f), platforms=['tpu'])(*specs).mlir_module().count('tpu_custom_call')


# Block-sparse products.


def dense(w):
  """Returns the dense weight, `[Kb bk, Nb bn]`."""
  ends = [(0, g * b - n) for g, b, n in zip(w.grid, w.block, w.shape)]
  return np.pad(f32(w.to_dense()), ends)


# A case is: shape and block of the weight, tokens, dtype of x, dtype of the weight.
BLOCKS = {
    '8': ((24, 32), (8, 8), 5, F32, F32),
    '8 of 16 bits, undivided': ((30, 20), (16, 8), 1, BF16, BF16),
    '32, undivided': ((100, 70), (32, 32), 300, F32, F32),
    '64 x 128': ((128, 384), (64, 128), 1, F32, F32),
    '128': ((384, 256), (128, 128), 1, F32, F32),
    '128 of 16 bits, more than a tile': ((256, 384), (128, 128), 600, BF16, BF16),
    '128 x 256, undivided': ((200, 600), (128, 256), 5, F32, F32),
    '128 x 256, 16 bits meet 32': ((256, 512), (128, 256), 5, BF16, F32),
    'one block': ((128, 128), (128, 128), 5, F32, F32),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize('case', BLOCKS)
def test_block_sparse_products_are_those_of_the_dense_weight(case):
  shape, block, tokens, dtype, stored = BLOCKS[case]
  w = blocks(shape, block, stored)
  whole, (bk, bn) = f32(jnp.asarray(dense(w), dtype)), block
  x, dy = normal((tokens, whole.shape[0]), dtype, 2), normal((tokens, whole.shape[1]), dtype, 3)
  y, dx = (f(a, w, interpret=INTERPRET) for f, a in ((block_sparse.matmul, x), (block_sparse.matmul_transposed, dy)))
  dw = block_sparse.sampled(x, dy, w, interpret=INTERPRET)
  assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, stored)
  rounded_once(y, f32(x) @ whole, shape[0])
  rounded_once(dx, f32(dy) @ whole.T, shape[1])
  gradient = (f32(x).T @ f32(dy)).reshape(w.grid[0], bk, w.grid[1], bn).transpose(0, 2, 1, 3)
  rounded_once(dw, gradient[np.asarray(w.rows), np.asarray(w.cols)], tokens)


@pytest.mark.sampled(5)
@pytest.mark.parametrize('dtype', [F32, BF16], ids=lambda dtype: dtype.dtype.name)
@pytest.mark.parametrize('block', [(8, 8), (16, 8), (32, 32), (64, 128), (128, 128), (128, 256), (512, 512)], ids=str)
def test_block_sparse_products_lower(block, dtype):
  w = blocks((2 * block[0], 2 * block[1]), block, dtype)
  for tokens in (1, 300):
    x, dy = (jax.ShapeDtypeStruct((tokens, 2 * n), dtype) for n in block)
    assert block_sparse.refusal(x, w) is None
    assert calls(block_sparse.matmul, x, w) == 1
    assert calls(block_sparse.matmul_transposed, dy, w) == 1
    assert calls(block_sparse.sampled, x, dy, w) == 1


def test_the_transposed_product_does_not_copy_the_blocks():
  w = blocks((384, 512), (128, 128), F32)
  text = jax.export.export(jax.jit(block_sparse.matmul_transposed), platforms=['tpu'])(jnp.ones((8, 512)), w)
  shape = f'tensor<{"x".join(map(str, w.values.shape))}xf32>'
  using = [line for line in text.mlir_module().splitlines() if shape in line and 'func.func' not in line]
  assert len(using) == 1 and 'tpu_custom_call' in using[0]


# N:M.


def packed(n, m, width, shape, dtype, seed=0):
  place = np.random.default_rng(seed).random((shape[0] // m, m, shape[1] // width)).argsort(1).argsort(1)
  kept = np.repeat((place < n).reshape(shape[0], -1), width, 1)
  return NMArray.from_dense(jnp.where(kept, normal(shape, dtype, seed + 1), jnp.zeros((), dtype)), n, m, 0, width=width)


# A case is: n, m, outputs that share positions, shape of the weight, tokens, dtype of x, dtype of the weight.
N_M = {
    '2:4': (2, 4, 1, (1536, 256), 1, BF16, BF16), '2:4, three tiles': (2, 4, 1, (2304, 128), 5, F32, F32),
    '1:4': (1, 4, 1, (512, 128), 5, BF16, BF16), '2:8': (2, 8, 1, (1024, 128), 5, BF16, BF16),
    '4:8': (4, 8, 1, (512, 640), 1, BF16, BF16), '1:8': (1, 8, 1, (2048, 128), 5, F32, F32),
    '2:4 of vectors of 8': (2, 4, 8, (512, 128), 5, BF16, BF16),
    '8:16': (8, 16, 1, (512, 128), 300, BF16, BF16), '3:4, 16 bits meet 32': (3, 4, 1, (512, 128), 5, BF16, F32),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize('case', N_M)
def test_n_m_products_are_those_of_the_dense_weight(case):
  n, m, width, shape, tokens, dtype, stored = N_M[case]
  w, x = packed(n, m, width, shape, stored), normal((tokens, shape[0]), dtype, 2)
  y = n_m.matmul(x, w, interpret=INTERPRET)
  assert y.dtype == dtype and y.shape == (tokens, shape[1])
  rounded_once(y, f32(x) @ f32(w.to_dense().astype(dtype)), shape[0])


@pytest.mark.sampled
@pytest.mark.parametrize('dtype', [F32, BF16], ids=lambda dtype: dtype.dtype.name)
@pytest.mark.parametrize('pattern', [(2, 4), (1, 4), (2, 8), (4, 8), (1, 8), (8, 16), (1, 4, 128)], ids=str)
def test_n_m_products_lower(pattern, dtype):
  dense = jax.ShapeDtypeStruct((4096, 1024), dtype)
  w = jax.eval_shape(lambda w: NMArray.from_dense(w, *pattern[:2], 0, False, *pattern[2:]), dense)
  for tokens in (1, 5, 300):
    x = jax.ShapeDtypeStruct((tokens, 4096), dtype)
    assert n_m.refusal(x, w) is None and calls(n_m.matmul, x, w) == 1


# Activation-sparse products.


# A case is: K, N, block, active blocks, tokens, dtype of x, dtype of the weight.
ACTIVE = {
    'some': (1024, 256, 16, [1, 5, 6, 30, 63], 3, F32, F32), 'none': (256, 128, 128, [], 2, F32, F32),
    'more than a step': (640, 128, 32, range(2, 19), 1, BF16, BF16), 'one': (512, 384, 128, [2], 16, BF16, BF16),
    'all of them': (256, 1152, 64, range(4), 17, F32, F32), '16 bits meet 32': (512, 128, 16, [0, 31], 1, BF16, F32),
    'steps that do not divide': (320, 128, 80, [0, 1, 3], 2, F32, F32),
}


def inputs_of(case):
  """Returns x, zero outside of the active blocks, and a weight that is NaN in the rows that must not be read."""
  k, n, block, listed, tokens, dtype, stored = ACTIVE[case]
  read = np.repeat(np.isin(np.arange(k // block), list(listed)), block)
  x = jnp.where(read, normal((tokens, k), dtype, 1), jnp.zeros((), dtype))
  return x, jnp.where(read[:, None], normal((k, n), stored, 2), jnp.asarray(jnp.nan, stored)), block, len(listed)


@pytest.mark.parametrize('case', ACTIVE)
def test_active_products_read_the_active_rows_alone(case):
  x, w, block, listed = inputs_of(case)
  y = active.matmul(x, w, block, listed, interpret=INTERPRET)
  assert y.dtype == x.dtype and y.shape == (len(x), w.shape[1])
  rounded_once(y, f32(x) @ np.nan_to_num(f32(w.astype(x.dtype))), len(w))


@pytest.mark.sampled(3)
@pytest.mark.parametrize('case', ACTIVE)
def test_active_outputs_read_the_rows_of_active_outputs_alone(case):
  """The weight of the table is `[N, K]` here: its rows are outputs, and the same blocks of them are active."""
  wanted, w, block, listed = inputs_of(case)
  x, w = normal((len(wanted), w.shape[1]), wanted.dtype, 3), w.astype(wanted.dtype)
  y = active.outputs(x, wanted, w, block, listed, interpret=INTERPRET)
  assert y.dtype == x.dtype and y.shape == wanted.shape
  rounded_once(y, f32(x) @ np.nan_to_num(f32(w)).T, w.shape[1])


def test_active_products_above_the_capacity_are_dense():
  x, w, block, listed = inputs_of('some')
  assert np.isnan(active.matmul(x, w, block, listed - 1, interpret=INTERPRET)).all()
  ones = jnp.ones((len(x), w.shape[1]))
  y = active.outputs(ones, x, w, block, listed - 1, interpret=INTERPRET)
  assert (np.isnan(y) == np.isnan(w).any(1)).all()


@pytest.mark.sampled
@pytest.mark.parametrize('dtype', [F32, BF16], ids=lambda dtype: dtype.dtype.name)
@pytest.mark.parametrize('block', [16, 128, 512])
def test_active_products_lower(block, dtype):
  w = jax.ShapeDtypeStruct((4096, 2048), dtype)
  for tokens in (1, 16, 100):
    x = jax.ShapeDtypeStruct((tokens, 4096), dtype)
    assert active.refusal(x, w, block) is None
    assert calls(lambda x, w: active_matmul(x, w, block=block), x, w) == 1
    few, mask = jax.ShapeDtypeStruct((tokens, 2048), dtype), jax.ShapeDtypeStruct((tokens, 4096), bool)
    assert active.outputs_refusal(few, w, block) is None
    assert calls(lambda x, w, mask: active_outputs(x, w, mask, block=block), few, w, mask) == 1


def test_vmap_over_x_is_more_tokens_for_active_products():
  """The condition is not batched: both of its branches would be computed."""
  w, product = jax.ShapeDtypeStruct((256, 128), F32), lambda x, w: active_matmul(x, w, block=128)
  def conditions(f, *shape):
    exported = jax.export.export(jax.jit(f), platforms=['tpu'])(jax.ShapeDtypeStruct(shape, F32), w)
    return exported.mlir_module().count('stablehlo.case')

  assert conditions(jax.vmap(product, (0, None)), 2, 1, 256) == conditions(product, 2, 256)


# Attention.


def lists(heads, query_blocks, key_blocks, width, seed=0):
  """Returns lists that are empty for the first block of queries, and full for the second."""
  random = np.random.default_rng(seed)
  index = np.sort(random.random((heads, query_blocks, key_blocks)).argsort(-1)[..., :width], -1)
  counts = random.integers(0, width + 1, (heads, query_blocks))
  counts[:, :2] = 0, width
  return jnp.asarray(index, jnp.int32), jnp.asarray(counts, jnp.int32)


def masked(q, k, v, index, counts, block_q, block_k, causal, scale):
  """Returns attention with the dense mask."""
  (_, tq, heads, _), tk, share = q.shape, k.shape[1], q.shape[2] // k.shape[2]
  mask = np.zeros((heads, tq, tk), bool)
  for head, row in np.ndindex(counts.shape):
    for block in index[head, row, :counts[head, row]].tolist():
      mask[head, row * block_q:(row + 1) * block_q, block * block_k:(block + 1) * block_k] = True
  mask &= np.tri(tq, tk, dtype=bool) if causal else True
  k, v = (jnp.repeat(a, share, 2) for a in (k, v))
  logits = jnp.where(mask, jnp.einsum('bqhd,bkhd->bhqk', q, k) * scale, -1e30)
  return jnp.einsum('bhqk,bkhd->bqhd', jnp.where(mask, jax.nn.softmax(logits, -1), 0), v)


# A case is: batch, heads of q and of k, queries, keys, d, blocks of both, longest list, causal, dtype.
ATTENTION = {
    '128': (1, (2, 2), 256, 384, 64, (128, 128), 2, False, F32),
    'causal, shared heads of 16 bits': (1, (2, 1), 384, 384, 128, (128, 128), 2, True, BF16),
    'causal, other blocks, two of a batch': (2, (1, 1), 256, 512, 64, (128, 256), 2, True, F32),
}


@pytest.mark.parametrize('case', ATTENTION)
def test_attention_is_that_of_the_dense_mask(case, monkeypatch):
  batch, (heads, shared), tq, tk, d, (block_q, block_k), width, causal, dtype = ATTENTION[case]
  index, counts = lists(heads, tq // block_q, tk // block_k, width)
  args = [normal((batch, t, h, d), dtype, s) for s, h, t in ((0, heads, tq), (1, shared, tk), (2, shared, tk))]
  how = dict(block_q=block_q, block_k=block_k, causal=causal, scale=d ** -0.5)
  assert attention.refusal(*args, index, counts, **how) is None
  if heads == shared > 1:  # as if the lists did not fit into scalar memory together
    monkeypatch.setattr(mosaic_tpu, 'SCALARS', tq // block_q * tk // block_k * 2)
  f = jax.jit(functools.partial(attention.attention, **how, interpret=INTERPRET))  # The index is traced.
  y, pull_back = jax.vjp(lambda *qkv: f(*qkv, index, counts), *args)
  wanted, pull_back_wanted = jax.vjp(lambda *qkv: masked(*qkv, index, counts, **how), *(a.astype(F32) for a in args))
  sums = {F32: 1e-5, BF16: 2e-2}[dtype]  # Weights are rounded before they are multiplied.
  rounded_once(y, wanted, 1, sums)
  dy = normal(y.shape, dtype, 3)
  for got, gradient in zip(pull_back(dy), pull_back_wanted(dy.astype(F32))):
    rounded_once(got, gradient, tq, sums)
  assert not f32(y)[:, :block_q].any()


@pytest.mark.sampled
@pytest.mark.parametrize('causal', [False, True], ids=['', 'causal'])
@pytest.mark.parametrize('dtype', [F32, BF16], ids=lambda dtype: dtype.dtype.name)
@pytest.mark.parametrize('block', [(128, 128), (128, 512), (512, 512)], ids=str)
def test_attention_lowers(block, dtype, causal):
  q, index = jax.ShapeDtypeStruct((1, 1024, 2, 128), dtype), jax.ShapeDtypeStruct((2, 1024 // block[0], 2), jnp.int32)
  counts = jax.ShapeDtypeStruct(index.shape[:2], jnp.int32)
  f = functools.partial(attention.attention, block_q=block[0], block_k=block[1], causal=causal, scale=0.1)
  assert attention.refusal(q, q, q, index, counts, **f.keywords) is None
  assert calls(f, q, q, q, index, counts) == 1
  gradient = jax.grad(lambda *args: jnp.sum(f(*args).astype(F32)), (0, 1, 2))
  assert calls(gradient, q, q, q, index, counts) == 3


@pytest.mark.parametrize('case', ['padding', 'hidden'])
def test_attention_within_segments_and_without_padding(case, monkeypatch):
  """Numbers of segments, and masks of keys, are those of XLA; a query without a key has its own if it is listed."""
  random, block = np.random.default_rng(0), 128
  q, k, v = (normal((2, 256, heads, 8), F32, s) for s, heads in ((0, 2), (1, 1), (2, 1)))
  index, counts = lists(2, 2, 2, 2)
  ids = jnp.asarray(np.sort(random.integers(0, 3, (2, 256))), jnp.int32)
  mask = ScoreEdit('mask', jnp.asarray(random.random((2, 1, 1, 256)) < 0.5 * (case == 'padding')))
  edits = (mask,) if case == 'hidden' else (mask, *segment_edits(ids, ids))
  options = ops.Options(block, block, case == 'padding', 8 ** -0.5, 256, 256,
                        tuple((edit.kind, edit.array.dtype == bool) for edit in edits))
  arrays = ops._edit_arrays(edits, q, k, options)
  run = lambda *qkv, **more: block_sparse_attention(*qkv, index, counts, **options.plain, edits=edits, **more)
  wanted, pull_back_wanted = jax.vjp(lambda *qkv: run(*qkv, implementation='xla'), q, k, v)
  assert calls(run, q, k, v) == 1
  assert calls(jax.grad(lambda *qkv: jnp.sum(run(*qkv) ** 2), (0, 1, 2)), q, k, v) == 4  # the result twice
  monkeypatch.setattr(attention, 'attention', functools.partial(attention.attention, interpret=INTERPRET))
  kernel = lambda *qkv: ops._table(options)['mosaic_tpu'].function(*qkv, *arrays, index, counts)
  y, pull_back = jax.vjp(kernel, q, k, v)
  rounded_once(y, wanted, 1, 1e-5)
  dy = normal(y.shape, F32, 3)
  for got, gradient in zip(pull_back(dy), pull_back_wanted(dy)):
    rounded_once(got, gradient, 256, 1e-5)


def test_the_gradient_of_attention_runs_kernels_on_a_tpu():
  q, index = jax.ShapeDtypeStruct((1, 512, 2, 128), BF16), jax.ShapeDtypeStruct((2, 4, 2), jnp.int32)
  loss = lambda q, k, v, index: jnp.sum(block_sparse_attention(q, k, v, index, scale=0.1).astype(F32))
  assert calls(jax.value_and_grad(loss, (0, 1, 2)), q, q, q, index) == 4  # the result twice, and both gradients
  assert calls(loss, q, q, q, index) == 1
  curved = lambda q, k, v, index: jax.grad(lambda q: jnp.sum(jax.grad(loss)(q, k, v, index).astype(F32)))(q)
  jax.eval_shape(curved, q, q, q, index)  # second derivatives are those of plain JAX


# Attention to listed tokens.


def listed_tokens(heads, shared, lists, most, d, dtype):
  """Returns q, a cache of 40 tokens, and lists, whose last is empty where there are several."""
  random = np.random.default_rng(1)
  q, k, v = (normal((1, *shape, d), dtype, seed) for seed, shape in enumerate([(heads,), *[(40, shared)] * 2]))
  index = jnp.asarray(random.random((1, lists, 40)).argsort(-1)[..., :most], jnp.int32)
  return q, k, v, index, jnp.asarray([[most, *[0] * (lists - 1)]], jnp.int32)


@pytest.mark.parametrize('heads, shared, lists, most', [(4, 2, 4, 6), (4, 4, 1, 3)])
def test_attention_to_listed_tokens(heads, shared, lists, most, monkeypatch):
  monkeypatch.setattr(gathered, '_TOGETHER', 4)
  args = listed_tokens(heads, shared, lists, most, 8, F32)
  y = jax.jit(functools.partial(gathered.attention, scale=0.3, interpret=INTERPRET))(*args)
  rounded_once(y, gathered_attention(*args, scale=0.3), 8)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('dtype', [F32, BF16], ids=lambda dtype: dtype.dtype.name)
@pytest.mark.parametrize('lists', [1, 2, 8])
def test_attention_to_listed_tokens_lowers(lists, dtype):
  args = listed_tokens(8, 2, lists, 20, 64, dtype)
  assert gathered.refusal(*args) is None and calls(gathered_attention, *args) == 1


# Refusals and shared parts.


def shapes(block, nnz, dtype):
  index = jax.ShapeDtypeStruct((nnz,), jnp.int32)
  values = jax.ShapeDtypeStruct((nnz, *block), dtype)
  kept = jax.ShapeDtypeStruct((nnz,), bool)
  return BlockSparseArray(values, index, index, index, kept, None, None, True, (-2,), (block[0] * nnz, block[1]))


def of_blocks(dtype=F32, stored=F32, block=(128, 128), nnz=2):
  return block_sparse.refusal(jax.ShapeDtypeStruct((1, block[0] * nnz), dtype), shapes(block, nnz, stored))


def of_n_m(dtype=F32, n=2, m=4, shape=(1024, 256), axes=0):
  w = jax.eval_shape(lambda w: NMArray.from_dense(w, n, m, axes, check=False),
                     jax.ShapeDtypeStruct(shape, dtype))
  return n_m.refusal(jax.ShapeDtypeStruct((1, shape[0]), dtype), w)


def of_attention(dtypes=(F32, F32, F32), heads=(2, 2), length=512, block=(128, 128), rows=4, width=2):
  q, k, v = (jax.ShapeDtypeStruct((1, length, h, 64), t) for h, t in zip((heads[0], heads[1], heads[1]), dtypes))
  index = jax.ShapeDtypeStruct((heads[0], rows, width), jnp.int32)
  return attention.refusal(q, k, v, index, None, block_q=block[0], block_k=block[1], causal=True, scale=1.0)


def of_active(tokens=1, k=4096, n=1024, block=128, dtype=BF16, stored=BF16):
  return active.refusal(jax.ShapeDtypeStruct((tokens, k), dtype), jax.ShapeDtypeStruct((k, n), stored), block)


def of_outputs(tokens=1, n=4096, k=1024):
  return active.outputs_refusal(jax.ShapeDtypeStruct((tokens, k), BF16), jax.ShapeDtypeStruct((n, k), BF16), 128)


def of_listed(lists=8, most=64, dtype=F32, d=64, heads=8):
  q, k = jax.ShapeDtypeStruct((1, heads, d), dtype), jax.ShapeDtypeStruct((1, 2**17, heads, d), dtype)
  index = jax.ShapeDtypeStruct((1, lists, most), jnp.int32)
  return gathered.refusal(q, k, k, index, jax.ShapeDtypeStruct((1, lists), jnp.int32))


# A case is: the refusal, with the reason and the remedy.
REFUSALS = {
    'listed tokens of float16': (lambda: of_listed(dtype=F16), 'not float16; cast to bfloat16'),
    'many listed tokens': (lambda: of_listed(most=2**15), 'do not fit into scalar memory; share lists among heads'),
    'heads of many numbers': (lambda: of_listed(d=2**15), 'do not fit into the memory of a core; shard heads'),
    'float16': (lambda: of_blocks(F16, F16), 'not float16; cast to bfloat16'),
    'float16 blocks': (lambda: of_blocks(F32, F16), 'not float16; cast to bfloat16'),
    'blocks of 12': (lambda: of_blocks(block=(128, 12)), r'multiples of 8, not \(128, 12\); pack with block='),
    'too large blocks': (lambda: of_blocks(block=(1024, 1024)), r'\(1024, 1024\) do not fit .*; pack with block='),
    'too many blocks': (lambda: of_blocks(nnz=50_000), '50000 blocks do not fit into .*, which holds 43690; pack'),
    'N:M of float16': (lambda: of_n_m(F16), 'not float16; cast to bfloat16'),
    'N:M of a stack': (lambda: of_n_m(shape=(2, 1024, 256), axes=1), r'shape \(2, 1024, 256\) .*; pack with axes=0'),
    'N:M along the outputs': (lambda: of_n_m(axes=1), r'packed along \(-1,\); pack with axes=0'),
    '1:64': (lambda: of_n_m(n=1, m=64), '1:64 does not fit its tiles; 2:4, 1:4, .* do'),
    '17:32': (lambda: of_n_m(n=17, m=32), '17:32 does not fit its tiles'),
    'N:M, undivided contraction': (lambda: of_n_m(shape=(1152, 256)), 'multiple of 256 and outputs .* of 128: pad'),
    '1:8, undivided contraction': (lambda: of_n_m(n=1, m=8), 'multiple of 2048 and outputs .* of 128: pad'),
    'N:M, undivided outputs': (lambda: of_n_m(shape=(1024, 200)), r'\(1024, 200\) does not divide into its tiles'),
    'active of float16': (lambda: of_active(dtype=F16), 'not float16; cast to bfloat16'),
    'active, many tokens': (lambda: of_active(129), 'few tokens, up to 128, not 129; split them'),
    'active, small blocks': (lambda: of_active(block=8), 'blocks of 8 rows do not fit .*; take a multiple of 16'),
    'active, undivided': (lambda: of_active(n=200), r'\(4096, 200\) must have a multiple of 128 outputs; pad'),
    'active, large': (lambda: of_active(100, 2**16), '100 tokens of 65536 .* do not fit into .*; take fewer'),
    'outputs, undivided': (lambda: of_outputs(k=200), r'\(4096, 200\) must have a multiple of 128 inputs; pad'),
    'outputs, many': (lambda: of_outputs(100, 2**15), '100 tokens of 1024 .* do not fit into .*; take fewer'),
    'attention of float16': (lambda: of_attention((F16, F16, F16)), 'not float16; cast to bfloat16'),
    'attention of two dtypes': (lambda: of_attention((F32, F32, BF16)), 'not bfloat16 and float32; cast them to one'),
    'attention, small blocks': (lambda: of_attention(block=(64, 128)), 'multiples of 128, not 64 and 128; list larger'),
    'attention, undivided': (lambda: of_attention(length=500), '500 queries and 500 keys do not divide .*; pad'),
    'attention, heads': (lambda: of_attention(heads=(3, 2)), '3 heads of q cannot share 2 heads of k evenly; repeat'),
    'attention, large blocks': (lambda: of_attention(length=2048, block=(1024, 2048)), 'not fit into the memory .*512'),
    'attention, long lists': (lambda: of_attention(length=2**18, rows=2**11), 'not fit into scalar memory.*; list'),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_what_cannot_run_is_refused_with_the_remedy(case):
  why, wanted = REFUSALS[case]
  assert re.search(wanted, why() or 'None')
  assert (of_blocks(), of_n_m(), of_attention(), of_active(), of_active(block=8, stored=F32), of_outputs(),
          of_listed()) == (None,) * 7


@pytest.mark.parametrize('length, most, multiple, wanted', [
    (1, 512, 16, 16), (300, 512, 16, 304), (600, 512, 16, 304), (5000, 512, 16, 512), (300, 512, 128, 384),
    (300, 200, 128, 128), (300, 10, 16, 16)])
def test_tiles_are_equal_multiples_that_cover_it(length, most, multiple, wanted):
  assert mosaic_tpu.tile(length, most, multiple) == wanted


@pytest.mark.parametrize('asked, dtype, wanted', [
    (None, F32, 'DEFAULT'), ('bfloat16', F32, 'DEFAULT'), ('highest', F32, 'HIGHEST'),
    ('tensorfloat32', F32, 'HIGHEST'), ('highest', BF16, 'DEFAULT')])
def test_products_are_as_precise_as_others_of_the_program(asked, dtype, wanted):
  with jax.default_matmul_precision(asked):
    assert mosaic_tpu.precision(jnp.dtype(dtype)) == jax.lax.Precision[wanted]
    w = blocks((256, 256), (128, 128), dtype)
    assert calls(block_sparse.matmul, jax.ShapeDtypeStruct((8, 256), dtype), w) == 1


def test_products_say_over_which_axes_of_a_mesh_they_vary():
  mesh, said = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,)), []
  x, w, packed_w = jnp.ones((32, 256)), blocks((256, 256), (128, 128), F32), packed(2, 4, 1, (256, 256), F32)
  along, across = P('data'), P(None, 'data')
  for kernel, args, specs, out in ((block_sparse.matmul, (x, w), (along, P()), along),
                                   (block_sparse.matmul_transposed, (x, w), (along, P()), along),
                                   (block_sparse.sampled, (x, x, w), (along, along, P()), along),
                                   (n_m.matmul, (x, packed_w), (along, P()), along),
                                   (n_m.matmul, (x, packed_w), (P(), across), across),
                                   (active_matmul, (x, jnp.ones((256, 256))), (along, P()), along),
                                   (active_outputs, (x, jnp.ones((256, 256)), x > 0), (along, P(), along), along)):
    def noted(*args, kernel=kernel):
      y = kernel(*args)
      said.append(set(jax.typeof(y).manual_axis_type.varying))
      return y

    jax.eval_shape(jax.shard_map(noted, mesh=mesh, in_specs=specs, out_specs=out), *args)
  assert said == [{'data'}] * 7


@pytest.mark.parametrize('check_vma, wanted', [(True, 'check_vma=False'), (False, 'None')])
def test_attention_is_refused_where_splash_would_have_to_say_how_it_varies(check_vma, wanted):
  mesh, said = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,)), []
  index, q = jnp.zeros((2, 1, 1), jnp.int32), jnp.ones((1, 128, 2, 64))
  how = dict(block_q=128, block_k=128, causal=True, scale=1.0)

  def f(q):
    said.append(attention.refusal(q, q, q, index, index[..., 0], **how))
    return q

  over = jax.shard_map(f, mesh=mesh, in_specs=P(None, None, None, 'data'), out_specs=P(None, None, None, 'data'),
                       check_vma=check_vma)
  jax.eval_shape(over, q)
  assert re.search(wanted, str(said[-1]))
