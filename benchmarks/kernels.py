"""Compares products with packed weights with `jnp.dot` of the dense weight on this CPU.

Both products get the same numbers, and the packed result is compared with the dense result before either is timed. The
forward product is timed by itself, and together with its gradients. All ratios are also written to
`sparsejax/advice/tables/cpu.json`, which `sparsejax advise` reads.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results, timing
from benchmarks.timing import Measurement
from kernels_pallas import block_sparse_matmul, nm_matmul, unstructured_matmul
from sparsejax import advice, formats, patterns
from sparsejax.formats import BlockSparseArray, CSCArray, NMArray
from sparsejax.types import Axes

TABLE = advice.TABLES / 'cpu.json'
WHAT = {'forward': 'forward', 'train': 'forward and backward'}


class Case(NamedTuple):
  """A `Case` names an op for `tokens` tokens and a weight `[k, n]` of which the fraction `sparsity` is zero in blocks.

  `block` holds the lengths of a block: `(1, 1)` for unstructured zeros, and `(M, width)` for N:M. `forward` and `train`
  are the bars: how many times faster than dense the op has to be. `None` means that there is no bar. `balanced` says
  that each block column keeps equally many blocks.
  """

  op: Callable[..., Any]
  tokens: int
  k: int
  n: int
  block: tuple[int, int]
  sparsity: float
  forward: float | None = None
  train: float | None = None
  balanced: bool = True

  def __str__(self) -> str:
    group = '{}x{}'.format(*self.block)
    kind = {block_sparse_matmul: f'blocks of {group}', nm_matmul: f'N:M of {group}'}.get(self.op, 'unstructured')
    return (f'({self.tokens}, {self.k}, {self.n}), {kind}{"" if self.balanced else ", unbalanced"}, '
            f'{self.sparsity:.1%} zero')


def _blocks(tokens: int, k: int, n: int, block: int, *bars: tuple[Any, ...], balanced: bool = True) -> list[Case]:
  return [Case(block_sparse_matmul, tokens, k, n, (block, block), *bar, balanced=balanced) for bar in bars]


LARGE, SMALL = (1024, 1024, 4096), (256, 1024, 1024)
CASES = (
    *_blocks(*LARGE, 128, (0.5, 1.4), (0.75, 2.5, 1.6), (0.875, 4.0, 2.7)),
    *_blocks(*SMALL, 128, (0.5, 1.4, 1.6), (0.75, 2.5, 2.8), (0.875, 3.2, 4.4)),
    *_blocks(1, 4096, 4096, 64, (0.8, 5.0), (0.9, 10.0), (0.95, 20.0)),
    *_blocks(*LARGE, 128, (0.5, 1.3), (0.9, 3.5), balanced=False),
    *(Case(unstructured_matmul, *shape, (1, 1), *bars) for shape in (SMALL, LARGE)
      for bars in ((0.9, 1.6, 1.0), (0.95, 2.5, 1.0))),
    # The cases below have no bar, because sparse does not win or no claim needs a number; they are rows of the table.
    *_blocks(16, 1024, 4096, 128, (0.5,), (0.75,), (0.875,)),
    *_blocks(*LARGE, 64, (0.5,), (0.75,), (0.875,)), *_blocks(*SMALL, 64, (0.5,), (0.75,), (0.875,)),
    *_blocks(*LARGE, 32, (0.5,), (0.75,), (0.875,)), *_blocks(*SMALL, 32, (0.5,), (0.75,), (0.875,)),
    *(Case(unstructured_matmul, *shape, (1, 1), 0.8) for shape in (SMALL, LARGE)),
    *(Case(nm_matmul, *SMALL, (m, width), 1 - n / m) for n, m, width in (
        (2, 4, 1), (1, 4, 1), (2, 4, 128), (1, 4, 128), (1, 8, 128))),
)


def kept(case: Case) -> np.ndarray:
  """Returns the mask, `bool[k, n]`, `True` where a weight is kept.

  If `balanced`, each block column keeps equally many blocks, and each block row about equally many. Otherwise, and for
  unstructured zeros, positions are random. N:M masks come from `patterns.NM` of random scores.
  """
  rng = np.random.default_rng(0)
  if case.op is nm_matmul:
    pattern = patterns.NM(round((1 - case.sparsity) * case.block[0]), *case.block)
    return np.asarray(pattern(jnp.asarray(rng.random((case.k, case.n)), jnp.float32)))
  kb, nb = case.k // case.block[0], case.n // case.block[1]
  if not case.balanced or case.op is unstructured_matmul:
    grid = rng.permutation(kb * nb).reshape(kb, nb) >= round(case.sparsity * kb * nb)
  else:  # Each column takes the rows that have the fewest blocks so far; ties are broken at random.
    grid = np.zeros((kb, nb), bool)
    for column in range(nb):
      grid[np.lexsort((rng.random(kb), grid.sum(1)))[:round((1 - case.sparsity) * kb)], column] = True
  return np.repeat(np.repeat(grid, case.block[0], 0), case.block[1], 1)


def packed(case: Case, w: np.ndarray, mask: np.ndarray) -> formats.PackedArray:
  if case.op is nm_matmul:
    m, width = case.block
    return NMArray.from_dense(jnp.asarray(w), round((1 - case.sparsity) * m), m, 0, width=width)
  if case.op is unstructured_matmul:
    return CSCArray.from_dense(w, mask)
  return BlockSparseArray.from_dense(w, mask, case.block)


def contestants(case: Case) -> dict[str, dict[str, Callable[[], Any]]]:
  """Returns, for 'forward' and 'train', a call each for 'dense' and 'packed', after comparing their results."""
  rng, mask = np.random.default_rng(1), kept(case)
  w = np.where(mask, rng.standard_normal((case.k, case.n)), 0).astype(np.float32)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  x, dy, sparse, w = draw(case.tokens, case.k), draw(case.tokens, case.n), packed(case, w, mask), jnp.asarray(w)
  dense_forward, sparse_forward = jax.jit(jnp.dot), jax.jit(case.op)
  dense_train = timing.with_gradients(jnp.dot)
  sparse_train = timing.with_gradients(lambda x, values, index: case.op(x, formats.with_values(index, values)))
  near = lambda a, b, terms: np.testing.assert_allclose(a, b, atol=1e-5 * np.sqrt(terms), rtol=1e-4)
  near(sparse_forward(x, sparse), dense_forward(x, w), case.k)
  (_, dx, dw), (_, dx_sparse, dv) = dense_train(x, w, dy), sparse_train(x, sparse.values, dy, sparse)
  near(dx_sparse, dx, case.n)
  near(formats.with_values(sparse, dv).to_dense(), jnp.where(mask, dw, 0), case.tokens)
  return {'forward': {'dense': lambda: dense_forward(x, w), 'packed': lambda: sparse_forward(x, sparse)},
          'train': {'dense': lambda: dense_train(x, w, dy),
                    'packed': lambda: sparse_train(x, sparse.values, dy, sparse)}}


def convolution(rounds: int) -> Measurement:
  """Returns the claim on a 1x1 convolution of MobileNet's kind, 85 % of its blocks zero, against XLA's convolution."""
  rng = np.random.default_rng(2)
  x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 14, 14, 512), (1, 1, 512, 512)))
  pattern = patterns.Block((64, 64), 0.85)
  axes = Axes((2,), (3,), (0, 1))
  w = jnp.where(pattern(jnp.abs(w), None, axes), w, 0)
  sparse = BlockSparseArray.from_dense(w, block=pattern.shape, axes=axes)
  dense = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), 'VALID', dimension_numbers=(
      'NHWC', 'HWIO', 'NHWC')))
  product = jax.jit(block_sparse_matmul)
  np.testing.assert_allclose(product(x, sparse), dense(x, w), atol=1e-3)
  seconds = timing.take_turns({'dense': lambda: dense(x, w), 'packed': lambda: product(x, sparse)}, rounds, calls=3)
  return timing.claim('1x1 convolution 512 to 512, 8 x 14 x 14, 85 % zero in blocks of 64x64: times faster than dense',
                      seconds, 'dense', 'packed', 1.0)


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields one claim for each bar, and writes its rows of the table at the end."""
  rows = []
  for case in CASES:
    ratios = {}
    for name, ways in contestants(case).items():
      # Small products run several times in a row, so that the packed weight is in the cache, as in a loop over tokens.
      seconds = timing.take_turns(ways, rounds, calls=1 + 2048 // (case.tokens + 128))
      what, bar = f'{case}: {WHAT[name]}, times faster than dense', getattr(case, name)
      claim = timing.claim(what, seconds, 'dense', 'packed', bar)
      ratios[name] = claim.measured
      if bar is not None:
        yield claim
    if case.balanced:
      rows.append(results.table_row(*case[:6], implementation(case), ratios))
  yield convolution(rounds)
  TABLE.parent.mkdir(exist_ok=True)
  results.update_table(TABLE, rows)


def implementation(case: Case) -> str:
  """Returns the name of the implementation that runs for a case on this CPU."""
  x, mask = jnp.zeros((case.tokens, case.k), jnp.float32), kept(case)
  return case.op(x, packed(case, mask.astype(np.float32), mask), explain=True)['cpu'].implementation
