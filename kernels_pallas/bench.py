"""Kernels on the GPU that is here, beside dense products by XLA in the same run: `python -m kernels_pallas.bench`.

Each kernel is compared with what XLA computes before it is timed. A time is the median over rounds, in which sparse and
dense take turns; in a round, a program on the device calls the kernel many times in a chain, each call waiting for the
one before, and the time of a short chain is taken from that of a long one. What fails is a row with its error.
"""

import argparse
import csv
import functools
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import block_sparse_matmul, sampled_matmul
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.sparse24 import sparse24_matmul
from sparsejax.formats import BlockSparseArray, Sparse24Array
from sparsejax.types import Array

SECONDS = 450  # after these no further case is begun
ROUNDS = 15
FIELDS = ('kernel', 'shape', 'sparsity', 'error', 'sparse_us', 'dense_us', 'speedup', 'ideal', 'bar', 'holds',
          'failure', 'rounds', 'device', 'driver', 'jax', 'commit')


class Case(NamedTuple):
  """`sparse(*args)` against `dense(*others)`; the first of each is what a chain changes from call to call.

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
      make = functools.partial(_blocks, block, sparsity, share)
      yield 'block-sparse', label, sparsity, functools.partial(make, 'forward')
      if block == (128, 128):
        yield 'block-sparse, dx', label, sparsity, functools.partial(make, 'dx')
        yield 'block-sparse, dw', label, sparsity, functools.partial(make, 'dw')
  for n in (4096, 8192):
    yield '2:4', f'{n} x {n} x {n}', 0.5, functools.partial(_two_of_four, n, n, 2.0, 1.2)
  for tokens in (1, 8, 16):
    yield '2:4, decode', f'{tokens} x 8192 x 8192', 0.5, functools.partial(_two_of_four, tokens, 8192, 16 / 9, 1.4)
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
  mask = _listed(n // block[0], n // block[1], sparsity)
  whole = np.repeat(np.repeat(mask, block[0], 0), block[1], 1)
  w = BlockSparseArray.from_dense(_random(0, n, n), whole, block)
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


def _two_of_four(tokens: int, n: int, ideal: float, bar: float) -> Case:
  groups = _random(0, n // 4, 4, n)
  place = jnp.argsort(jnp.argsort(jnp.abs(groups.astype(jnp.float32)), axis=1), axis=1)
  dense = jnp.where(place >= 2, groups, jnp.zeros((), groups.dtype)).reshape(n, n)
  w, x = Sparse24Array.from_dense(dense, check=False), _random(1, tokens, n)
  run = functools.partial(sparse24_matmul, implementation='mosaic_gpu')
  return Case(run, (x, w), _dot, (x, dense), lambda: _dot(x, dense), ideal, bar)


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


# Measuring.


def _chain(f: Callable[..., Array], calls: int) -> Callable[..., Array]:
  """`calls` times `f`, each waiting for the one before: its first argument depends on that one's result."""
  def chained(first, *rest):
    def call(_, first):
      y = jax.lax.optimization_barrier(f(first, *rest))  # all of it, although one number is taken
      return first.at[(0,) * first.ndim].add((y.reshape(-1)[0] * 1e-30).astype(first.dtype))
    return jax.lax.fori_loop(0, calls, call, first)
  return jax.jit(chained)


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def _contestant(f: Callable[..., Array], args: tuple[Any, ...]) -> Callable[[], float]:
  """What gives seconds of one call."""
  few, more = _chain(f, 2), None
  jax.block_until_ready(few(*args))
  once = max(min(_seconds(lambda: few(*args)) for _ in range(3)) / 2, 2e-6)
  calls = int(np.clip(0.03 / once, 8, 1000))
  more = _chain(f, 2 + calls)
  jax.block_until_ready(more(*args))
  return lambda: max(_seconds(lambda: more(*args)) - _seconds(lambda: few(*args)), 0.0) / calls


def measured(case: Case) -> dict[str, Any]:
  """One row: the error, and the medians of both over rounds."""
  got, wanted = (np.asarray(a, np.float32) for a in (jax.jit(case.sparse)(*case.args), case.expected()))
  if got.shape != wanted.shape or not np.isfinite(got).all():
    raise ValueError(f'what it gives, {list(got.shape)}, is not finite, or not of shape {list(wanted.shape)}')
  error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
  if error > 0.01:
    raise ValueError(f'relative error {error:.3g}, where rounding explains 0.01 at most')
  sparse, dense = _contestant(case.sparse, case.args), _contestant(case.dense, case.others)
  rounds = [(sparse(), dense()) if i % 2 else (dense(), sparse())[::-1] for i in range(ROUNDS)]
  one, other = (float(np.median(times)) for times in zip(*rounds))
  if min(one, other) <= 0:
    raise ValueError('too noisy to be timed')
  speedup = float(np.median([b / a for a, b in rounds if a > 0]))
  return {'error': f'{error:.2e}', 'sparse_us': f'{one * 1e6:.2f}', 'dense_us': f'{other * 1e6:.2f}',
          'speedup': f'{speedup:.3f}', 'ideal': f'{case.ideal:.3f}', 'bar': f'{case.bar:.3f}',
          'holds': 'yes' if speedup >= case.bar else 'no', 'rounds': ROUNDS}


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
  out = parser.parse_args(arguments).out
  if jax.default_backend() != 'gpu':
    print(f'kernels_pallas.bench: the default device is a {jax.default_backend()}, no GPU, so nothing was measured.')
    return 2
  with open(out, 'w', newline='') as file:
    table = csv.DictWriter(file, FIELDS, restval='')
    table.writeheader()
    for row in rows(time.perf_counter()):
      table.writerow(row)
      file.flush()
      times = '{sparse_us} us, dense {dense_us} us, {speedup}x of {ideal}, bar {bar}: {holds}'
      said = row.get('failure') or times.format(**row)
      print(f'{row["kernel"]:16} {row["shape"]:40} {row["sparsity"]:>4}  {said}', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
