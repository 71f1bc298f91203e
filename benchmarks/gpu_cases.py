"""Makes the cases that are measured on a GPU.

A `GpuCase` compares a kernel with a dense product. An `Entry` becomes a row of a table for `sparsejax advise`.

    for kernel, shape, sparsity, make in cases():
      case = make()
      jax.jit(case.sparse)(*case.args), case.expected()                            # equal but for rounding
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import active_matmul, active_outputs, block_sparse_matmul, gathered_attention, sampled_matmul
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.sparse24 import sparse24_matmul
from sparsejax.formats import BlockSparseArray, Sparse24Array
from sparsejax.types import Array

LAYERS = 4  # weights that a decoded token passes: a single weight would stay in the L2 cache in part
ACTIVE = 16  # inputs or outputs that a token skips together


class GpuCase(NamedTuple):
  """A `GpuCase` compares `sparse(*args)`, a kernel, with `dense(*others)`.

  `expected()` is the result of `sparse`, computed by XLA. `ideal` is how many times faster than dense sparse could be,
  by the products or by the bytes that it saves. `bar` is how many times faster sparse has to be.
  """

  sparse: Callable[..., Array]
  args: tuple[Any, ...]
  dense: Callable[..., Array]
  others: tuple[Any, ...]
  expected: Callable[[], Array]
  ideal: float
  bar: float


def cases() -> Iterator[tuple[str, str, float, Callable[[], GpuCase]]]:
  """Yields the kernel's name, the shape, the sparsity, and a function that makes the case.

  A case is made as late as possible, because its arrays are large.
  """
  size = '8192 x 8192 x 8192'
  for block in ((128, 128), (64, 256), (128, 256)):
    for sparsity, share in ((0.7, 0.8), (0.8, 0.8), (0.9, 0.7)):
      label = f'{size}, blocks of {block[0]} x {block[1]}'
      make = functools.partial(_blocks, block, sparsity)
      yield 'block-sparse', label, sparsity, functools.partial(make, share, 'forward')
      if block == (128, 128):
        yield 'block-sparse, dx', label, sparsity, functools.partial(make, share, 'dx')
        yield 'block-sparse, dw', label, sparsity, functools.partial(make, 0.7, 'dw')
  for sparsity in (0.5, 0.75, 0.9):
    label = f'16 x 8192 x 8192, {LAYERS} times, blocks of 128 x 128'
    yield 'block-sparse, decode', label, sparsity, functools.partial(_decoded, 16, 8192, sparsity)
  for n in (4096, 8192):
    yield '2:4', f'{n} x {n} x {n}', 0.5, functools.partial(_halved, n, n, 1, 2.0, 1.2)
  for tokens in (1, 8, 16):
    label = f'{tokens} x 8192 x 8192, {LAYERS} times'
    yield '2:4, decode', label, 0.5, functools.partial(_halved, tokens, 8192, LAYERS, 16 / 9, 1.4)
  for n in (8192, 16384):
    for sparsity in (0.75, 0.9):
      label = f'{n} x {n}, 8 heads of 128'
      yield 'attention', label, sparsity, functools.partial(_attention, n, sparsity)
      yield 'attention, gradients', label, sparsity, functools.partial(_attention_gradients, n, sparsity)
  for sparsity in (0.5, 0.75, 0.9):
    label = f'1 x 8192 x 8192, {LAYERS} times, blocks of {ACTIVE}'
    yield 'active inputs', label, sparsity, functools.partial(_few_inputs, 1, 8192, sparsity)
    yield 'active outputs', label, sparsity, functools.partial(_few_outputs, 1, 8192, sparsity)
  for length, keep in ((16384, 1024), (65536, 4096)):
    label = f'1 query, {keep} of {length} tokens, 8 heads of 128'
    yield 'listed tokens', label, 1 - keep / length, functools.partial(_listed_tokens, length, keep)


def _random(seed: int, *shape: int) -> Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def dot(a: Array, b: Array, i: int = 1, j: int = 0) -> Array:
  """Returns the dense product by XLA over axis `i` of `a` and axis `j` of `b`, summed in float32, in a's dtype."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32).astype(a.dtype)


def _listed(rows: int, columns: int, sparsity: float, seed: int = 0) -> np.ndarray:
  """Returns a random `bool[rows, columns]` that is `True` equally often in every column."""
  keep = max(1, round((1 - sparsity) * rows))
  return np.argsort(np.argsort(np.random.default_rng(seed).random((rows, columns)), axis=0), axis=0) < keep


def _blocks(block: tuple[int, int], sparsity: float, share: float, which: str) -> GpuCase:
  n = 8192
  w = _packed(block, sparsity, n, n)
  dense, x, ideal = w.to_dense(), _random(1, n, n), 1 / w.density
  if which == 'dw':
    run = lambda x, dy, w: sampled_matmul(x, dy, w, implementation='mosaic_gpu').reshape(-1, block[1])
    blocks = lambda: dot(x, dense, 0, 0).reshape(n // block[0], block[0], n // block[1], block[1])
    expected = lambda: blocks()[w.rows, :, w.cols].reshape(-1, block[1])
    return GpuCase(run, (x, dense, w), functools.partial(dot, i=0, j=0), (x, dense), expected, ideal, share * ideal)
  if which == 'dx':
    back = functools.partial(dot, i=1, j=1)
    kernel = importlib.import_module('kernels_pallas.block_sparse.gpu').matmul_transposed
    return GpuCase(kernel, (x, w), back, (x, dense), lambda: back(x, dense), ideal, share * ideal)
  product = functools.partial(block_sparse_matmul, implementation='mosaic_gpu')
  return GpuCase(product, (x, w), dot, (x, dense), lambda: dot(x, dense), ideal, share * ideal)


def _packed(block: tuple[int, int], sparsity: float, k: int, n: int, seed: int = 0) -> BlockSparseArray:
  mask = _listed(k // block[0], n // block[1], sparsity, seed)
  return BlockSparseArray.from_dense(_random(seed, k, n), np.repeat(np.repeat(mask, block[0], 0), block[1], 1), block)


def _two_of_four(seed: int, k: int, n: int) -> Sparse24Array:
  """Returns a 2:4 weight `[k, n]`, scaled so that a product with it keeps the variance of its input."""
  groups = _random(seed, k // 4, 4, n) / jnp.bfloat16(k / 2) ** 0.5
  place = jnp.argsort(jnp.argsort(jnp.abs(groups.astype(jnp.float32)), axis=1), axis=1)
  return Sparse24Array.from_dense(jnp.where(place >= 2, groups, 0).reshape(k, n), check=False)


def _halved(tokens: int, n: int, layers: int, ideal: float, bar: float) -> GpuCase:
  packed = [_two_of_four(seed, n, n) for seed in range(layers)]
  return _through(sparse24_matmul, _random(layers, tokens, n), packed, ideal, bar)


def _decoded(tokens: int, n: int, sparsity: float) -> GpuCase:
  packed = [_packed((128, 128), sparsity, n, n, seed) for seed in range(LAYERS)]
  return _through(block_sparse_matmul, _random(LAYERS, tokens, n), packed, 1 / packed[0].density, 1.0)


def _through(op: Callable[..., Any], x: Array, packed: list[Any], ideal: float, bar: float) -> GpuCase:
  """Returns the case that multiplies `x` by one weight after the other."""
  kernel, dense = functools.partial(op, implementation='mosaic_gpu'), [w.to_dense() for w in packed]
  through = lambda product: lambda x, weights: functools.reduce(product, weights, x)
  return GpuCase(through(kernel), (x, packed), through(dot), (x, dense), lambda: through(dot)(x, dense), ideal, bar)


def _few_inputs(tokens: int, n: int, sparsity: float) -> GpuCase:
  product = lambda how, x, w, mask: active_matmul(x, w, mask=mask, block=ACTIVE, implementation=how)
  return _few(product, lambda x, w, mask: dot(jnp.where(mask, x, 0), w), tokens, n, sparsity)


def _few_outputs(tokens: int, n: int, sparsity: float) -> GpuCase:
  def product(how, x, w, mask):
    return active_outputs(x, w, jnp.broadcast_to(mask, x.shape), block=ACTIVE, implementation=how)

  return _few(product, lambda x, w, mask: jnp.where(mask, dot(x, w, 1, 1), 0), tokens, n, sparsity)


def _few(product: Callable[..., Any], dense: Callable[..., Array], tokens: int, n: int, sparsity: float) -> GpuCase:
  """Returns the case that passes one layer after the other, each a square weight and a mask of what is active."""
  layers = [(_random(seed, n, n) / jnp.bfloat16(n) ** 0.5,
             jnp.asarray(np.repeat(_listed(n // ACTIVE, 1, sparsity, seed)[:, 0], ACTIVE))) for seed in range(LAYERS)]
  through = lambda one: lambda x, layers: functools.reduce(lambda x, layer: one(x, *layer), layers, x)
  x, ideal = _random(LAYERS, tokens, n), 1 / (1 - sparsity)
  return GpuCase(through(functools.partial(product, 'mosaic_gpu')), (x, layers), through(dense), (x, layers),
                 lambda: through(functools.partial(product, 'xla'))(x, layers), ideal, 0.75 * ideal)


def _listed_tokens(length: int, keep: int) -> GpuCase:
  heads, d = 8, 128
  q, (k, v) = _random(0, 1, heads, d), (_random(seed, 1, length, heads, d) for seed in (1, 2))
  index = jnp.asarray([[np.flatnonzero(_listed(length, 1, 1 - keep / length, head)) for head in range(heads)]],
                      jnp.int32)
  attend = lambda how, q, k, v, index: gathered_attention(q, k, v, index, implementation=how)
  whole = _best_attention(q[:, None], k, v)
  return GpuCase(functools.partial(attend, 'mosaic_gpu'), (q, k, v, index), lambda q, *kv: whole(q[:, None], *kv)[:, 0],
                 (q, k, v), lambda: attend('xla', q, k, v, index), length / keep, 0.5 * length / keep)


def _attention_gradients(length: int, sparsity: float) -> GpuCase:
  """Returns the case of all three gradients, `[3, length, heads, d]`."""
  case = _attention(length, sparsity)

  def gradients(attend):
    summed = lambda q, k, v, *index: jnp.sum(attend(q, k, v, *index).astype(jnp.float32))
    return lambda *args: jnp.stack(jax.grad(summed, (0, 1, 2))(*args))

  by_xla = lambda q, k, v, index: block_sparse_attention(q, k, v, index, implementation='xla')
  return GpuCase(gradients(case.sparse), case.args, gradients(case.dense), case.others,
                 lambda: gradients(by_xla)(*case.args), case.ideal, 1.0)


def _attention(length: int, sparsity: float) -> GpuCase:
  heads, d, block = 8, 128, 128
  q, k, v = (_random(seed, length, heads, d) for seed in range(3))
  seen = np.stack([_listed(length // block, length // block, sparsity, head).T for head in range(heads)])
  index = jnp.asarray(np.stack([[np.flatnonzero(row) for row in head] for head in seen]), jnp.int32)
  attend = lambda how, q, k, v, index: block_sparse_attention(q, k, v, index, implementation=how)
  ideal = 1 / seen.mean()
  return GpuCase(functools.partial(attend, 'mosaic_gpu'), (q, k, v, index), _best_attention(q, k, v), (q, k, v),
              lambda: attend('xla', q, k, v, index), ideal, 0.8 * ideal)


def _best_attention(q: Array, k: Array, v: Array) -> Callable[..., Array]:
  """Returns the dense attention of cuDNN, or of XLA where cuDNN cannot run."""
  cudnn = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
  try:
    jax.block_until_ready(jax.jit(cudnn)(q, k, v))
  except Exception as error:  # The type of the error depends on what is missing.
    print(f'benchmarks gpu: no cuDNN attention ({line(error)}); dense attention is XLA\'s.', file=sys.stderr)
    return functools.partial(jax.nn.dot_product_attention, implementation='xla')
  return cudnn


class Entry(NamedTuple):
  """An `Entry` names an op for `m` tokens and a weight `[k, n]` of which the fraction `sparsity` is zero, in blocks.

  `block` `(4, 1)` stands for 2:4. `sparsejax advise` reads the measured rows: the op runs as `implementation=None` runs
  it, forward, and with its gradients.
  """

  op: Callable[..., Any]
  m: int
  k: int
  n: int
  block: tuple[int, int]
  sparsity: float


def entries() -> Iterator[Entry]:
  k = n = 4096
  for m in (16, 256, 1024, 4096, 16384):
    for sparsity in (0.5, 0.75, 0.9):
      yield Entry(block_sparse_matmul, m, k, n, (128, 128), sparsity)
    if m <= 4096:
      yield Entry(sparse24_matmul, m, k, n, (4, 1), 0.5)
  for block in ((64, 64), (64, 256), (128, 256)):
    for sparsity in (0.5, 0.75, 0.9):
      yield Entry(block_sparse_matmul, 4096, k, n, block, sparsity)


def operands(entry: Entry) -> tuple[Array, Any, Array, Array]:
  """Returns the input, the packed weight, the dense weight and a cotangent of the product."""
  _, m, k, n, block, sparsity = entry
  packed = _two_of_four(0, k, n) if block == (4, 1) else _packed(block, sparsity, k, n)
  return _random(1, m, k), packed, packed.to_dense(), _random(2, m, n)


def line(error: Exception) -> str:
  """Returns the type and the message of an error on one line of at most 300 characters."""
  return f'{type(error).__name__}: {" ".join(str(error).split())}'[:300]
