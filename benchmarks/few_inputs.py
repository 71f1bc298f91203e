"""Compares `active_matmul`, `active_outputs` and a gated layer with dense products, for tokens that skip most of them.

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
from kernels_pallas import active_matmul, active_outputs, packed
from sparsejax import formats
from sparsejax.programs import hlo

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
  yield from _gated(rounds)


def _gated(rounds: int) -> Iterator[Measurement]:
  """Yields the time of a layer whose gate and up are one weight, and what a token reads of that weight."""
  width, neurons = SIZE // 2, 2 * SIZE
  on = np.random.default_rng(0).permutation(neurons // BLOCK) < neurons // BLOCK // 4  # a quarter of the blocks
  draw = np.random.default_rng(1).standard_normal
  gate = np.abs(draw((width, neurons), np.float32)) * np.where(np.repeat(on, BLOCK), 1, -1)
  weights = {'both': jnp.asarray(np.concatenate([gate, draw((width, neurons), np.float32)], 1) / width),
             'down': jnp.asarray(draw((neurons, width), np.float32) / neurons)}
  x = jnp.asarray(np.abs(draw((1, width), np.float32)))
  small = {'both': formats.ActiveArray.of(weights['both'], outputs=True),
           'down': formats.ActiveArray.of(weights['down'])}
  dense, sparse = jax.jit(_layer), jax.jit(packed(_layer, implementation='xla'), keep_unused=True)
  np.testing.assert_allclose(sparse(small, x), dense(weights, x), atol=1e-2)
  what = f'gated layer (1, {width}, {neurons}), gate and up in one weight, 75% of the neurons off in blocks of {BLOCK}'
  yield _claim(what, functools.partial(dense, weights, x), functools.partial(sparse, small, x), 0.0, rounds)
  number = next(i for i, leaf in enumerate(jax.tree.leaves(small)) if leaf is small['both'].values)
  loops = [read.bytes for read in hlo.reads(sparse.lower(small, x).compile().as_text(), number) if read.times is None]
  step = 4 * width * 128  # bytes of a round
  read = sum(loops) * neurons // 128 * (1 + 0.25) / 2 if loops == [step] * 2 else float('nan')
  share = read / weights['both'].nbytes
  yield Measurement(f'{what}: bytes of this weight that a token reads, of those stored', share, (share,) * 2, 0.626,
                    False, 1)


def _layer(w: Any, x: jax.Array) -> jax.Array:
  gate, up = jnp.split(x @ w['both'], 2, -1)
  return (jax.nn.relu(gate) * up) @ w['down']


def _claim(what: str, dense: Callable[[], Any], sparse: Callable[[], Any], bar: float, rounds: int) -> Measurement:
  seconds = timing.take_turns({'dense': dense, 'sparse': sparse}, rounds, clock=time.process_time)
  return timing.claim(f'{what}: times less processor time than dense', list(seconds), 'dense', 'sparse', bar)
