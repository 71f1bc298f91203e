"""Compares products of few tokens with packed weights with `jnp.dot` of the dense weight on this CPU.

All forms of one shape and one number of tokens take turns with the dense product. Before that, the numbers of each form
are compared with the dense numbers. The ratios are rows of `sparsejax/advice/tables/cpu.json`, which `sparsejax advise`
and `kernels_pallas.prepared` read. Then `prepared` chooses the form of each pattern, and the chosen form takes turns
again.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks import kernels, results, timing
from benchmarks.timing import Measurement
from kernels_pallas import models, prepared
from sparsejax import formats
from sparsejax.types import Axes

SHAPES, TOKENS = ((4096, 4096), (1024, 1024)), (1, 4, 16, 64)
ANYWHERE, N_M, BLOCKS = (0.8, 0.9, 0.95, 0.99), ((2, 4), (1, 4), (1, 8), (1, 16)), (0.5, 0.75, 0.9)
BARS = {'ell 0.9': 1.1, 'ell 0.95': 2.2, 'ell 0.99': 5.0, 'nm 1:8': 1.9}  # times dense, one token, 4096 x 4096
LEAST = 0.97  # times dense, of the form that `prepared` chooses
AXES = Axes((0,), (1,))


def weights(k: int, n: int) -> dict[str, tuple[np.ndarray, Any]]:
  """Returns weights whose zeros keep a pattern, and the patterns, by the name of a format and of the pattern."""
  rng = np.random.default_rng(0)
  w = rng.standard_normal((k, n), np.float32)
  found = {f'ell {zeros}': (np.where(rng.random((k, n)) < zeros, 0, w), sj.Unstructured()) for zeros in ANYWHERE}
  found |= {f'csc {zeros}': found[f'ell {zeros}'] for zeros in ANYWHERE}
  for kept, m in N_M:
    mask = sj.NM(kept, m)(jnp.asarray(rng.random((k, n), np.float32)))
    found[f'nm {kept}:{m}'] = np.where(mask, w, 0), sj.NM(kept, m)
  for block in (64, 128):
    for zeros in BLOCKS:
      grid = rng.permutation(k * n // block**2).reshape(k // block, n // block) >= round(zeros * k * n / block**2)
      mask = np.repeat(np.repeat(grid, block, 0), block, 1)
      found[f'block_sparse {block} {zeros}'] = np.where(mask, w, 0), sj.Block((block, block))
  return found


def taken(name: str, tokens: int) -> bool:
  """Returns whether the format of `name` is measured for `tokens`; each has tokens for which it is never fastest."""
  return {'csc': tokens >= 16, 'ell': tokens <= 16, 'nm': tokens <= 16, 'block_sparse': True}[name.split()[0]]


def product(w: Any) -> Callable[..., jax.Array]:
  """Returns the compiled product `(x, w)` with a packed or a dense `w`."""
  return jax.jit(models.OPS[w.kind].multiply) if formats.is_packed(w) else jax.jit(jnp.dot)


def times(x: jax.Array, forms: Mapping[str, Any], weights: Mapping[str, tuple[np.ndarray, Any]], rounds: int,
          others: Mapping[str, Any]) -> list[dict[str, float]]:
  """Returns the seconds of each round of the product of `x` with each of `forms`, with a dense weight, and of `others`.

  Raises `AssertionError` if a product is not that of the dense weight of its name.
  """
  dense = jnp.asarray(next(iter(weights.values()))[0])
  calls = {'dense': functools.partial(product(dense), x, dense)}
  for name, w in forms.items():
    calls[name] = functools.partial(product(w), x, w)
    np.testing.assert_allclose(calls[name](), np.asarray(x) @ weights[name][0], atol=1e-2)
  return list(timing.take_turns({**calls, **others}, rounds, calls=1 if x.shape[1] > 1024 else 5))


def scipy_blocks(x: jax.Array, given: Mapping[str, tuple[np.ndarray, Any]]) -> dict[str, Callable[[], Any]]:
  """Returns scipy's product with each block-sparse weight, in scipy's format for blocks, BSR."""
  from scipy import sparse  # Only this comparison needs scipy.
  column = np.asarray(x[0])
  blocks = lambda w, pattern: sparse.bsr_matrix(np.ascontiguousarray(w.T), blocksize=pattern.shape)
  return {f'scipy {name}': functools.partial(blocks(*each).__matmul__, column)
          for name, each in given.items() if name.startswith('block_sparse')}


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields a claim for each bar and for each prepared pattern, and writes rows of the table."""
  draw = np.random.default_rng(1).standard_normal
  inputs = {(tokens, k): jnp.asarray(draw((tokens, k)), jnp.float32) for k, _ in SHAPES for tokens in TOKENS}
  for k, n in SHAPES:
    given = weights(k, n)
    packed = {name: formats.TABLE[name.split()[0]].from_pattern(w, pattern, AXES)
              for name, (w, pattern) in given.items()}
    for tokens in TOKENS:
      forms, rows = {name: w for name, w in packed.items() if taken(name, tokens)}, []
      barred, x = (tokens, k) == (1, 4096), inputs[tokens, k]
      seconds = times(x, forms, given, rounds, scipy_blocks(x, given) if barred else {})
      for name, w in forms.items():
        claim = timing.claim(f'({tokens}, {k}, {n}), {name}: times faster than dense', seconds, 'dense', name,
                             BARS.get(name, 0.0))
        rows.append(results.table_row(models.OPS[w.kind].multiply, tokens, k, n, w.pattern.group, _zeros(name), 'xla',
                                      {'forward': claim.measured}))
        if barred and name in BARS:
          yield claim
        if barred and w.kind == 'block_sparse':
          yield timing.claim(f'({tokens}, {k}, {n}), {name}: times faster than scipy', seconds, f'scipy {name}', name,
                             1.0)
      results.update_table(kernels.TABLE, rows)
    if (k, n) == SHAPES[0]:
      yield from _prepared(inputs[1, k], packed, given, rounds)
      yield from _prepared(inputs[16, k], packed, given, rounds)


def _prepared(x: jax.Array, packed: Mapping[str, Any], given: Mapping[str, Any], rounds: int) -> Iterator[Measurement]:
  """Yields for each pattern the claim that its prepared form is not slower than dense."""
  forms = prepared({name: w for name, w in packed.items() if not name.startswith('csc')}, tokens=len(x))
  seconds = times(x, forms, given, rounds, {})
  for name, w in forms.items():
    form = w.kind if formats.is_packed(w) else 'dense'
    yield timing.claim(f'({len(x)}, {x.shape[1]}, {len(given[name][0][0])}), {name} prepared as {form}: times faster '
                       'than dense', seconds, 'dense', name, LEAST)


def _zeros(name: str) -> float:
  """Returns the fraction of zeros that `name` says."""
  asked = name.split()[-1]
  kept, _, m = asked.partition(':')
  return 1 - int(kept) / int(m) if m else float(asked)
