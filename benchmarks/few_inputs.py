"""Compares `active_matmul` and `active_outputs` with `jnp.dot` for tokens of which most inputs or outputs are skipped.

Zeros come in whole blocks of 16, and one by one. Seconds are those of the processor, of all cores together, without
those of other processes. Before that, the numbers are compared with the dense numbers.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Measurement
from kernels_pallas import active_matmul, active_outputs

SIZE, BLOCK = 4096, 16
CASES = (  # tokens, fraction of zeros, inputs that are zero together, bar
    (1, 0.75, 16, 2.0), (4, 0.75, 16, 2.0), (1, 0.5, 16, 0.0), (1, 0.9, 16, 0.0), (1, 0.75, 1, 0.0), (1, 0.9, 1, 0.0))


def inputs(tokens: int, zeros: float, block: int) -> np.ndarray:
  """Returns tokens `[tokens, SIZE]` with this fraction of zeros, in blocks that all tokens share."""
  rng = np.random.default_rng(0)
  kept = rng.permutation(SIZE // block) >= round(zeros * SIZE / block)
  return rng.standard_normal((tokens, SIZE), np.float32) * np.repeat(kept, block)


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields a claim for each case: whole blocks at 75 % zeros are to take at most half of the dense seconds."""
  w = jnp.asarray(np.random.default_rng(1).standard_normal((SIZE, SIZE), np.float32))
  dense = jax.jit(jnp.dot)
  for tokens, zeros, block, bar in CASES:
    x = jnp.asarray(inputs(tokens, zeros, block))
    sparse = jax.jit(functools.partial(active_matmul, block=BLOCK, implementation='xla'))
    np.testing.assert_allclose(sparse(x, w), dense(x, w), atol=1e-2)
    yield _claim(f'active_matmul ({tokens}, {SIZE}, {SIZE}), {zeros:.0%} zero inputs in blocks of {block}',
                 functools.partial(dense, x, w), functools.partial(sparse, x, w), bar, rounds)
  x, mask = jnp.asarray(inputs(1, 0.0, 1)), jnp.asarray(inputs(1, 0.75, 16) != 0)
  columns = jax.jit(functools.partial(active_outputs, block=BLOCK, implementation='xla'))
  np.testing.assert_allclose(columns(x, w, mask), jnp.where(mask, x @ w.T, 0), atol=1e-2)
  yield _claim(f'active_outputs (1, {SIZE}, {SIZE}), 75% skipped outputs in blocks of 16',
               functools.partial(dense, x, w), functools.partial(columns, x, w, mask), 0.0, rounds)


def _claim(what: str, dense: Callable[[], Any], sparse: Callable[[], Any], bar: float, rounds: int) -> Measurement:
  seconds = timing.take_turns({'dense': dense, 'sparse': sparse}, rounds, clock=time.process_time)
  return timing.claim(f'{what}: times less processor time than dense', list(seconds), 'dense', 'sparse', bar)
