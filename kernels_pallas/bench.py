"""Kernels on the GPU that is here, beside dense products by XLA in the same run: `python -m kernels_pallas.bench`.

Each kernel is compared with what XLA computes before it is timed. A time is that of all kernels that a call runs, what
comes before and after ours included, as the GPU itself reports it (CUPTI): no waiting for the host. It is the median
over rounds, in which sparse and dense take turns. What fails is a row with its error.
"""

import argparse
import csv
import functools
import importlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from kernels_pallas import block_sparse_matmul, sampled_matmul
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.sparse24 import sparse24_matmul
from sparsejax import formats
from sparsejax.formats import BlockSparseArray, Sparse24Array
from sparsejax.types import Array

SECONDS = 450  # after these no further case is begun
ROUNDS, CALLS = 8, 5
LAYERS = 4  # of a decoded token: one weight alone would stay in the L2 cache in part
FIELDS = ('kernel', 'shape', 'sparsity', 'error', 'sparse_us', 'dense_us', 'speedup', 'least', 'most', 'ideal', 'bar',
          'holds', 'failure', 'rounds', 'device', 'driver', 'jax', 'commit')


class Case(NamedTuple):
  """`sparse(*args)` against `dense(*others)`.

  `expected` is what `sparse` should give, computed by XLA. The bar is on how many times faster sparse is.
  """

  sparse: Callable[..., Array]
  args: tuple[Any, ...]
  dense: Callable[..., Array]
  others: tuple[Any, ...]
  expected: Callable[[], Array]
  ideal: float
  bar: float


def cases() -> Iterator[tuple[str, str, float, Callable[[], Case]]]:
  """Name, shape, sparsity, and what makes the case, as late as possible: arrays are large."""
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
    yield '2:4', f'{n} x {n} x {n}', 0.5, functools.partial(_two_of_four, n, n, 1, 2.0, 1.2)
  for tokens in (1, 8, 16):
    label = f'{tokens} x 8192 x 8192, {LAYERS} times'
    yield '2:4, decode', label, 0.5, functools.partial(_two_of_four, tokens, 8192, LAYERS, 16 / 9, 1.4)
  for n in (8192, 16384):
    for sparsity in (0.75, 0.9):
      yield 'attention', f'{n} x {n}, 8 heads of 128', sparsity, functools.partial(_attention, n, sparsity)


def _random(seed: int, *shape: int) -> Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _dot(a: Array, b: Array, i: int = 1, j: int = 0) -> Array:
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32).astype(a.dtype)


def _listed(rows: int, columns: int, sparsity: float, seed: int = 0) -> np.ndarray:
  """bool `[rows, columns]`: equally many in every column, at random."""
  keep = max(1, round((1 - sparsity) * rows))
  return np.argsort(np.argsort(np.random.default_rng(seed).random((rows, columns)), axis=0), axis=0) < keep


def _blocks(block: tuple[int, int], sparsity: float, share: float, which: str) -> Case:
  n = 8192
  w = _packed(block, sparsity, n, n)
  dense, x, ideal = w.to_dense(), _random(1, n, n), 1 / w.density
  if which == 'dw':
    run = lambda x, dy, w: sampled_matmul(x, dy, w, implementation='mosaic_gpu').reshape(-1, block[1])
    blocks = lambda: _dot(x, dense, 0, 0).reshape(n // block[0], block[0], n // block[1], block[1])
    expected = lambda: blocks()[w.rows, :, w.cols].reshape(-1, block[1])
    return Case(run, (x, dense, w), functools.partial(_dot, i=0, j=0), (x, dense), expected, ideal, share * ideal)
  product = functools.partial(block_sparse_matmul, implementation='mosaic_gpu')
  if which == 'dx':
    back = functools.partial(_dot, i=1, j=1)
    kernel = importlib.import_module('kernels_pallas.block_sparse.gpu').matmul_transposed
    return Case(kernel, (x, w), back, (x, dense), lambda: back(x, dense), ideal, share * ideal)
  return Case(product, (x, w), _dot, (x, dense), lambda: _dot(x, dense), ideal, share * ideal)


def _packed(block: tuple[int, int], sparsity: float, k: int, n: int, seed: int = 0) -> BlockSparseArray:
  mask = _listed(k // block[0], n // block[1], sparsity, seed)
  return BlockSparseArray.from_dense(_random(seed, k, n), np.repeat(np.repeat(mask, block[0], 0), block[1], 1), block)


def _half(seed: int, k: int, n: int) -> Array:
  """A 2:4 weight `[k, n]` of a size that leaves what it is multiplied with as large as it was."""
  groups = _random(seed, k // 4, 4, n) / jnp.bfloat16(k / 2) ** 0.5
  place = jnp.argsort(jnp.argsort(jnp.abs(groups.astype(jnp.float32)), axis=1), axis=1)
  return jnp.where(place >= 2, groups, jnp.zeros((), groups.dtype)).reshape(k, n)


def _two_of_four(tokens: int, n: int, layers: int, ideal: float, bar: float) -> Case:
  dense = [_half(seed, n, n) for seed in range(layers)]
  packed = [Sparse24Array.from_dense(w, check=False) for w in dense]
  return _through(sparse24_matmul, _random(layers, tokens, n), packed, dense, ideal, bar)


def _decoded(tokens: int, n: int, sparsity: float) -> Case:
  packed = [_packed((128, 128), sparsity, n, n, seed) for seed in range(LAYERS)]
  dense = [w.to_dense() for w in packed]
  return _through(block_sparse_matmul, _random(LAYERS, tokens, n), packed, dense, 1 / packed[0].density, 1.0)


def _through(op: Callable[..., Any], x: Array, packed: list[Any], dense: list[Array], ideal: float, bar: float) -> Case:
  """One weight after the other."""
  kernel = functools.partial(op, implementation='mosaic_gpu')
  through = lambda product: lambda x, weights: functools.reduce(product, weights, x)
  return Case(through(kernel), (x, packed), through(_dot), (x, dense), lambda: through(_dot)(x, dense), ideal, bar)


def _attention(length: int, sparsity: float) -> Case:
  heads, d, block = 8, 128, 128
  q, k, v = (_random(seed, length, heads, d) for seed in range(3))
  seen = np.stack([_listed(length // block, length // block, sparsity, head).T for head in range(heads)])
  index = jnp.asarray(np.stack([[np.flatnonzero(row) for row in head] for head in seen]), jnp.int32)
  attend = lambda how, q, k, v, index: block_sparse_attention(q, k, v, index, implementation=how)
  ideal = 1 / seen.mean()
  return Case(functools.partial(attend, 'mosaic_gpu'), (q, k, v, index), _best_attention(q, k, v), (q, k, v),
              lambda: attend('xla', q, k, v, index), ideal, 0.8 * ideal)


def _best_attention(q: Array, k: Array, v: Array) -> Callable[..., Array]:
  """cuDNN's, if it is there, or else XLA's."""
  cudnn = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
  try:
    jax.block_until_ready(jax.jit(cudnn)(q, k, v))
  except Exception as error:  # which one depends on what is missing
    print(f'kernels_pallas.bench: no cuDNN attention ({_line(error)}); dense attention is XLA\'s.', file=sys.stderr)
    return functools.partial(jax.nn.dot_product_attention, implementation='xla')
  return cudnn


# What `sparsejax advise` reads: any op, as `implementation=None` runs it, forward and with its gradients.


class Entry(NamedTuple):
  """An op of `m` tokens and a weight `[k, n]`, this share of it zero in blocks, or, `[4, 1]`, in 2 of 4."""

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


def table(begin: float) -> Iterator[dict[str, Any]]:
  """Rows as `sparsejax.advice.Measured` has them."""
  here = environment()
  for entry in entries():
    op, *shape, block, sparsity = entry
    try:
      if time.perf_counter() - begin > SECONDS:
        raise ValueError(f'left out: {SECONDS} seconds had passed')
      found = {f'ratio_{name}': round(ratio, 3) for name, ratio in _ratios(entry).items()}
      chosen = op(*_operands(entry)[:2], explain=True)['cuda'].implementation
    except Exception as error:
      print(f'kernels_pallas.bench: {op.__name__} {shape} {block} {sparsity}: {_line(error)}', file=sys.stderr)
      continue
    row = {'op': op.__name__, 'implementation': chosen, **dict(zip('mkn', shape)), 'block': list(block),
           'sparsity': sparsity, **found, 'hardware': here['device'], 'jax': here['jax'], 'commit': here['commit']}
    print(json.dumps(row), flush=True)
    yield row


def _operands(entry: Entry) -> tuple[Array, Any, Array, Array]:
  """The input, the packed weight, the dense one and a cotangent."""
  _, m, k, n, block, sparsity = entry
  if block == (4, 1):
    dense = _half(0, k, n)
    packed = Sparse24Array.from_dense(dense, check=False)
  else:
    packed = _packed(block, sparsity, k, n)
    dense = packed.to_dense()
  return _random(1, m, k), packed, dense, _random(2, m, n)


def _ratios(entry: Entry) -> dict[str, float]:
  """How many times faster than dense: 'forward', and 'train', with both gradients."""
  x, packed, dense, dy = _operands(entry)

  def trained(product):
    def step(x, w, dy, like):
      y, back = jax.vjp(lambda x, w: product(x, w, like), x, w)
      return y, *back(dy)
    return jax.jit(step)

  sparse_step = trained(lambda x, values, like: entry.op(x, formats.with_values(like, values)))
  dense_step = trained(lambda x, w, like: x @ w)  # whose gradients are products of 16 bits too
  ways = {'forward': ((jax.jit(entry.op), (x, packed)), (jax.jit(_dot), (x, dense))),
          'train': ((sparse_step, (x, packed.values, dy, packed)), (dense_step, (x, dense, dy, dense)))}
  found = {}
  for name, (sparse, other) in ways.items():
    one, two = (jax.tree.leaves(f(*args)) for f, args in (sparse, other))
    if len(one) == 3:  # the gradient of the weight, where it has any
      one[2], two[2] = formats.with_values(packed, one[2]).to_dense(), jnp.where(dense == 0, 0, two[2])
    for a, b in zip(one, two, strict=True):
      _error(a, b)
    found[name] = float(np.median([_milliseconds(*other) / _milliseconds(*sparse) for _ in range(3)]))
  return found


# Measuring.


def _milliseconds(f: Callable[..., Any], args: tuple[Any, ...]) -> float:
  """What the kernels of one call take, the median of several."""
  _, times = profiler.measure(f, iterations=CALLS)(*args)
  if not times:
    raise ValueError('the GPU reported no kernel')
  return float(np.median(times))


def _error(got: Array, wanted: Array) -> float:
  """Relative; raises `ValueError` if rounding does not explain it."""
  got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
  if got.shape != wanted.shape or not np.isfinite(got).all():
    raise ValueError(f'what it gives, {list(got.shape)}, is not finite, or not of shape {list(wanted.shape)}')
  error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
  if error > 0.01:
    raise ValueError(f'relative error {error:.3g}, where rounding explains 0.01 at most')
  return error


def measured(case: Case) -> dict[str, Any]:
  """One row: the error, and the medians of both over rounds."""
  sparse, dense = jax.jit(case.sparse), jax.jit(case.dense)
  error = _error(sparse(*case.args), case.expected())
  contestants = (sparse, case.args), (dense, case.others)
  rounds = [[_milliseconds(*one) for one in contestants[::order]][::order] for order in (1, -1) * (ROUNDS // 2)]
  one, other = (float(np.median(times)) for times in zip(*rounds))
  ratios = [b / a for a, b in rounds]
  return {'error': f'{error:.2e}', 'sparse_us': f'{one * 1e3:.2f}', 'dense_us': f'{other * 1e3:.2f}',
          'speedup': f'{np.median(ratios):.3f}', 'least': f'{min(ratios):.3f}', 'most': f'{max(ratios):.3f}',
          'ideal': f'{case.ideal:.3f}', 'bar': f'{case.bar:.3f}', 'rounds': len(rounds),
          'holds': 'yes' if np.median(ratios) >= case.bar else 'no'}


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'[:300]


def _output(*command: str) -> str:
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def environment() -> dict[str, str]:
  driver = _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').splitlines()
  return {'device': jax.devices()[0].device_kind, 'driver': driver[0] if driver else 'unknown', 'jax': jax.__version__,
          'commit': _output('git', 'rev-parse', '--short', 'HEAD')}


def rows(begin: float) -> Iterator[dict[str, Any]]:
  here = environment()
  for kernel, shape, sparsity, make in cases():
    row = {'kernel': kernel, 'shape': shape, 'sparsity': f'{sparsity:.0%}', **here}
    if time.perf_counter() - begin > SECONDS:
      yield {**row, 'failure': f'left out: {SECONDS} seconds had passed'}
      continue
    try:
      yield {**row, **measured(make())}
    except Exception as error:  # one kernel that fails does not keep the others from being measured
      yield {**row, 'failure': _line(error)}


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='kernels_pallas.bench', description=__doc__.split('\n\n')[0])
  parser.add_argument('--out', default='kernels.csv', help='the CSV to write (kernels.csv)')
  parser.add_argument('--table', help='what to write for `sparsejax advise`: sparsejax/advice/tables/h200.json')
  options = parser.parse_args(arguments)
  if jax.default_backend() != 'gpu':
    print(f'kernels_pallas.bench: the default device is a {jax.default_backend()}, no GPU, so nothing was measured.')
    return 2
  begin = time.perf_counter()
  with open(options.out, 'w', newline='') as file:
    lines = csv.DictWriter(file, FIELDS, restval='')
    lines.writeheader()
    for row in rows(begin):
      lines.writerow(row)
      file.flush()
      times = '{sparse_us} us, dense {dense_us} us, {speedup}x of {ideal}, bar {bar}: {holds}'
      said = row.get('failure') or times.format(**row)
      print(f'{row["kernel"]:16} {row["shape"]:40} {row["sparsity"]:>4}  {said}', flush=True)
  if options.table:
    pathlib.Path(options.table).write_text('[\n' + ',\n'.join(json.dumps(row) for row in table(begin)) + '\n]\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
