"""Measures the kernels on this GPU beside dense products by XLA in the same run: `python -m benchmarks gpu`.

Each kernel is compared with the result of XLA before it is timed. A time is the sum over all kernels that a call runs,
as the GPU itself reports it (CUPTI), so the host's waiting does not count. The kernels of XLA before and after a kernel
of this library count. A reported time is the median over rounds, in which sparse and dense take turns. A case that
fails is a row with its error. Only `sparsejax` and `kernels_pallas` have to be installed.
"""

import csv
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from benchmarks import results, timing
from benchmarks.gpu_cases import Entry, GpuCase, cases, dot, entries, line, operands
from sparsejax import formats
from sparsejax.types import Array

SECONDS = 450  # no further case begins after this time
ROUNDS, CALLS = 8, 5
FIELDS = ('kernel', 'shape', 'sparsity', 'error', 'sparse_us', 'dense_us', 'speedup', 'least', 'most', 'ideal', 'bar',
          'holds', 'failure', 'rounds', 'device', 'driver', 'jax', 'commit')


def rows(begin: float) -> Iterator[dict[str, Any]]:
  """Yields a row of `FIELDS` for each case; after `SECONDS` since `begin`, rows that say that they were left out."""
  here = environment()
  for kernel, shape, sparsity, make in cases():
    row = {'kernel': kernel, 'shape': shape, 'sparsity': f'{sparsity:.0%}', **here}
    if time.perf_counter() - begin > SECONDS:
      yield {**row, 'failure': f'left out: {SECONDS} seconds had passed'}
      continue
    try:
      yield {**row, **measured(make())}
    except Exception as error:  # A kernel that fails does not stop the others.
      yield {**row, 'failure': line(error)}


def _milliseconds(f: Callable[..., Any], args: tuple[Any, ...]) -> float:
  """Returns the milliseconds that the kernels of one call take: the median over `CALLS` calls."""
  _, times = profiler.measure(f, iterations=CALLS)(*args)
  if not times:
    raise ValueError('the GPU reported no kernel')
  return float(np.median(times))


def _error(got: Array, wanted: Array) -> float:
  """Returns the relative error of `got`; raises `ValueError` if rounding does not explain the error."""
  got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
  if got.shape != wanted.shape or not np.isfinite(got).all():
    raise ValueError(f'the result of shape {list(got.shape)} is not finite, or not of shape {list(wanted.shape)}')
  error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
  if error > 0.01:
    raise ValueError(f'relative error {error:.3g}, where rounding explains 0.01 at most')
  return error


def measured(case: GpuCase) -> dict[str, Any]:
  """Returns the fields of a row that are measured: the error, and the medians over rounds of both times."""
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


def table(begin: float) -> Iterator[dict[str, Any]]:
  """Yields a row for each entry, as `sparsejax.advice.Measured` reads it; entries that fail are printed instead."""
  for entry in entries():
    op, *shape, block, sparsity = entry
    try:
      if time.perf_counter() - begin > SECONDS:
        raise ValueError(f'left out: {SECONDS} seconds had passed')
      ratios = _ratios(entry)
      chosen = op(*operands(entry)[:2], explain=True)['cuda'].implementation
    except Exception as error:
      print(f'benchmarks gpu: {op.__name__} {shape} {block} {sparsity}: {line(error)}', file=sys.stderr)
      continue
    row = results.table_row(*entry, chosen, ratios)
    print(json.dumps(row), flush=True)
    yield row


def _ratios(entry: Entry) -> dict[str, float]:
  """Returns how many times faster than dense the op is: 'forward', and 'train', which includes both gradients."""
  x, packed, dense, dy = operands(entry)
  sparse_step = timing.with_gradients(lambda x, values, like: entry.op(x, formats.with_values(like, values)))
  dense_step = timing.with_gradients(jnp.matmul)  # Its gradients are products of 16 bits too.
  ways = {'forward': ((jax.jit(entry.op), (x, packed)), (jax.jit(dot), (x, dense))),
          'train': ((sparse_step, (x, packed.values, dy, packed)), (dense_step, (x, dense, dy)))}
  found = {}
  for name, (sparse, other) in ways.items():
    one, two = (jax.tree.leaves(f(*args)) for f, args in (sparse, other))
    if len(one) == 3:  # The third array is the gradient of the weight: compare it where the weight has values.
      one[2], two[2] = formats.with_values(packed, one[2]).to_dense(), jnp.where(dense == 0, 0, two[2])
    for a, b in zip(one, two, strict=True):
      _error(a, b)
    found[name] = float(np.median([_milliseconds(*other) / _milliseconds(*sparse) for _ in range(3)]))
  return found


# The command.


def environment() -> dict[str, str]:
  """Returns the device, the version of its driver, the version of JAX, and the commit."""
  driver = timing.output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader').splitlines()
  return {**timing.environment(), 'driver': driver[0] if driver else 'unknown'}


def main(out: str, table_out: str | None) -> int:
  """Measures all cases into the CSV `out`, and the entries into the JSON `table_out`, if given.

  Returns the exit status: 2, without writing a file, if the default device is no GPU.
  """
  if jax.default_backend() != 'gpu':
    print(f'benchmarks gpu: the default device is a {jax.default_backend()}, no GPU, so nothing was measured.')
    return 2
  begin = time.perf_counter()
  with open(out, 'w', newline='') as file:
    lines = csv.DictWriter(file, FIELDS, restval='')
    lines.writeheader()
    for row in rows(begin):
      lines.writerow(row)
      file.flush()
      times = '{sparse_us} us, dense {dense_us} us, {speedup}x of {ideal}, bar {bar}: {holds}'
      said = row.get('failure') or times.format(**row)
      print(f'{row["kernel"]:16} {row["shape"]:40} {row["sparsity"]:>4}  {said}', flush=True)
  if table_out:
    results.write_table(pathlib.Path(table_out), table(begin))
  return 0
