"""Measures the start of a training outside of `jit`: `init` of 100 million weights, and first calls on a small model.

The weights are 25 matrices of 2048 x 2048. `init` is compared with that of AdamW alone. Two starts by hand stand beside
the recipes: a master with 2:4 masks, and random masks of an exact count, which nothing ranks.

The small model has the parameters of a vision transformer of six layers, 64 wide. Its first `init` and its first
`update` compile everything that runs, with no cache on disk. AdamW alone compiles 70 programs, of one operation each,
for 3.7 seconds. The bar of one second is therefore for what a recipe adds.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import beginnings, compile_time, timing
from benchmarks.timing import Measurement

NAMES = ('asp', 'sr_ste', 'gradual_magnitude', 'rigl')
BAR, SECONDS = 2.0, 1.0  # at most so many times the `init` of AdamW, and so many seconds more for the first calls
WIDTH, DEPTH = 64, 6


def run(rounds: int = 5, names: Sequence[str] = NAMES, shape: tuple[int, ...] = (2048, 2048), leaves: int = 25
        ) -> Iterator[Measurement]:
  """Yields a claim on `init` for each recipe, and one on the seconds of the first `init` and `update`."""
  jax.config.update('jax_enable_compilation_cache', False)
  keys = jax.random.split(jax.random.key(0), leaves)
  params = {f'layer_{i}': {'kernel': jax.random.normal(key, shape)} for i, key in enumerate(keys)}
  makers = {name: compile_time.make(name) for name in ('dense', *names)}
  makers |= {name: make(compile_time.INNER) for name, make in beginnings.STARTS.items()}
  starts = {name: lambda tx=tx: jax.tree.leaves(tx.init(params)) for name, tx in makers.items()}
  seconds = list(timing.take_turns(starts, min(rounds, 5)))
  for name in (*names, *beginnings.STARTS):
    what = f'{name}: init of {leaves * shape[0] * shape[1]} weights, over AdamW'
    yield timing.claim(what, seconds, name, 'dense', BAR, at_least=False)
  alone = first_calls('dense')
  for name in (*names, *beginnings.FIRST_CALLS):
    more = first_calls(name) - alone
    what = f'{name}: processor seconds of the first init and update on a small transformer, beyond {alone:.1f} of AdamW'
    yield Measurement(what, more, (more, more), SECONDS, False, 1)


def first_calls(name: str) -> float:
  """Returns the processor seconds of the first `init` and `update` of a recipe, with nothing compiled yet."""
  by_hand = beginnings.FIRST_CALLS.get(name)
  params, tx = transformer(), by_hand(compile_time.INNER) if by_hand else compile_time.make(name)
  grads = jax.block_until_ready(jax.tree.map(jnp.ones_like, params))
  jax.clear_caches()
  start = time.process_time()
  moves, _ = tx.update(grads, tx.init(params), params)
  jax.block_until_ready(moves)
  return time.process_time() - start


def transformer() -> dict[str, Any]:
  """Returns the parameters of a small vision transformer."""
  shapes = {'query': (1, 1), 'key': (1, 1), 'value': (1, 1), 'out': (1, 1), 'up': (1, 4), 'down': (4, 1)}
  keys = iter(jax.random.split(jax.random.key(0), DEPTH * len(shapes) + 2))
  dense = lambda n, m: {'kernel': jax.random.normal(next(keys), (n, m)), 'bias': jnp.zeros(m)}
  norm = lambda: {'scale': jnp.ones(WIDTH), 'bias': jnp.zeros(WIDTH)}
  blocks = {f'block_{i}': {name: dense(n * WIDTH, m * WIDTH) for name, (n, m) in shapes.items()} |
            {'before': norm(), 'between': norm()} for i in range(DEPTH)}
  return {'patches': dense(48, WIDTH), **blocks, 'head': dense(WIDTH, 10)}
