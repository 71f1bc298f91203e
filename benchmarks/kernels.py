"""Block-sparse products against `jnp.dot` of the dense weight on this CPU, forward, and forward with backward.

Both get the same numbers; what the packed product gives is compared with the dense one before it is timed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from kernels_pallas import block_sparse_matmul
from sparsejax import formats


class Case(NamedTuple):
  """`tokens`, K and N, a block, the share of blocks that are zero; the times faster it has to be, `None` for no bar."""

  tokens: int
  k: int
  n: int
  block: int
  sparsity: float
  forward: float | None
  train: float | None = None
  balanced: bool = True


CASES = (
    Case(1024, 1024, 4096, 128, 0.5, 1.4), Case(1024, 1024, 4096, 128, 0.75, 2.5, 1.6),
    Case(1024, 1024, 4096, 128, 0.875, 4.0, 2.7),
    Case(256, 1024, 1024, 128, 0.5, 1.4, 1.6), Case(256, 1024, 1024, 128, 0.75, 2.5, 2.8),
    Case(256, 1024, 1024, 128, 0.875, 3.2, 4.4),
    Case(1, 4096, 4096, 64, 0.8, 5.0), Case(1, 4096, 4096, 64, 0.9, 10.0), Case(1, 4096, 4096, 64, 0.95, 20.0),
    Case(1024, 1024, 4096, 128, 0.5, 1.3, balanced=False), Case(1024, 1024, 4096, 128, 0.9, 3.5, balanced=False),
)

WHAT = {'forward': 'forward', 'train': 'forward and backward'}


def blocks(case: Case, seed: int = 0) -> np.ndarray:
  """Which blocks are kept, bool `[K / block, N / block]`: if balanced as many in each column, about so in each row."""
  rng, (kb, nb) = np.random.default_rng(seed), (case.k // case.block, case.n // case.block)
  if not case.balanced:
    return rng.permutation(kb * nb).reshape(kb, nb) >= round(case.sparsity * kb * nb)
  kept = round((1 - case.sparsity) * kb)
  # Each column takes the rows that have least so far, among equals at random.
  mask = np.zeros((kb, nb), bool)
  for column in range(nb):
    mask[np.lexsort((rng.random(kb), mask.sum(1)))[:kept], column] = True
  return mask


def operands(case: Case) -> tuple[jax.Array, jax.Array, formats.BlockSparseArray]:
  """x `[M, K]`, the dense weight `[K, N]`, and the weight packed."""
  rng = np.random.default_rng(1)
  mask = np.kron(blocks(case), np.ones((case.block, case.block))) > 0
  w = np.where(mask, rng.standard_normal((case.k, case.n)), 0).astype(np.float32)
  x = rng.standard_normal((case.tokens, case.k)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(w), formats.BlockSparseArray.from_dense(w, mask, (case.block, case.block))


def trained(product: Callable[[Any, Any], jax.Array]) -> Callable[..., Any]:
  """A product and the gradients of both operands, for a given cotangent."""
  def step(x, w, dy):
    y, back = jax.vjp(product, x, w)
    return y, back(dy)

  return jax.jit(step)


def contestants(case: Case) -> dict[str, dict[str, Callable[[], Any]]]:
  """For 'forward' and 'train', where there is a bar: 'dense' and 'packed', checked to give the same."""
  x, w, packed = operands(case)
  dense = lambda x, w: jnp.dot(x, w)
  dy = jax.random.normal(jax.random.key(2), (case.tokens, case.n))
  forward, forward_sparse = jax.jit(dense), jax.jit(lambda x, packed: block_sparse_matmul(x, packed))
  scale = np.sqrt(case.k) * 1e-5
  np.testing.assert_allclose(forward_sparse(x, packed), forward(x, w), atol=scale, rtol=1e-4)
  found = {'forward': {'dense': lambda: forward(x, w), 'packed': lambda: forward_sparse(x, packed)}}
  if case.train is not None:
    train = trained(dense)
    step = jax.jit(lambda x, packed, dy: trained(
        lambda x, v: block_sparse_matmul(x, formats.with_values(packed, v)))(x, packed.values, dy))
    (_, (dx, dw)), (_, (dx_sparse, dv)) = train(x, w, dy), step(x, packed, dy)
    np.testing.assert_allclose(dx_sparse, dx, atol=np.sqrt(case.n) * 1e-5, rtol=1e-4)
    kept = formats.BlockSparseArray.from_dense(dw, np.asarray(packed.to_dense()) != 0, packed.block)
    np.testing.assert_allclose(dv, kept.values, atol=np.sqrt(case.tokens) * 1e-5, rtol=1e-4)
    found['train'] = {'dense': lambda: train(x, w, dy), 'packed': lambda: step(x, packed, dy)}
  return found


def run(rounds: int = 20) -> Iterator[timing.Claim]:
  """One claim for each case and bar."""
  for case in CASES:
    ways = contestants(case)
    for name, bar in (('forward', case.forward), ('train', case.train)):
      if bar is None:
        continue
      seconds = list(timing.take_turns(ways[name], rounds, 1 + 2048 // (case.tokens + 128)))
      speed, spread = timing.ratio(seconds, 'dense', 'packed')
      pattern = f'{case.block}-blocks{"" if case.balanced else ", unbalanced"}'
      what = f'({case.tokens}, {case.k}, {case.n}), {pattern}, {case.sparsity:.1%} zero: {WHAT[name]}'
      yield timing.Claim(f'{what}, times faster than dense', speed, spread, bar, True, rounds)
