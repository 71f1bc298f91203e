"""Compares a program with attention, and its gradients, with the same program under `sparse_attention` on this CPU.

The program is `jax.nn.dot_product_attention`. Before the measurement, the numbers are compared with those of the
program with the mask of the blocks.
"""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Measurement
from kernels_pallas import sparse_attention
from sparsejax.attention import BlockMask

LENGTH, HEADS, D, BLOCK = 2048, 4, 64, 64
LISTED = {8: (2.0, 2.0), 3: (4.0, 4.0)}  # blocks of keys in a list, of 32, and the bars of result and gradients


def run(rounds: int = 20, length: int = LENGTH) -> Iterator[Measurement]:
  """Yields how many times faster the program is with sparse attention, in processor seconds of all cores."""
  draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, length, HEADS, D))
  given, n, dense = tuple(map(draw, range(3))), length // BLOCK, jax.nn.dot_product_attention
  for listed, bars in LISTED.items():
    order = np.random.default_rng(0).random((HEADS, n, n)).argsort(-1)
    mask = order < listed
    sparse = sparse_attention(dense, lambda site, mask=mask: BlockMask(mask, BLOCK, BLOCK))
    _check(dense, sparse, mask, given)
    loss = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1, 2)))
    for what, make, bar in (('', jax.jit, bars[0]), (' with gradients', loss, bars[1])):
      one, other = make(dense), make(sparse)
      turns = timing.take_turns({'dense': lambda f=one: f(*given), 'sparse': lambda f=other: f(*given)}, rounds,
                                clock=time.process_time)
      yield timing.claim(f'{length} tokens, {HEADS} heads of {D}{what}, {1 - listed / n:.0%} zero: times faster than '
                         'dense', turns, 'dense', 'sparse', bar)


def _check(dense, sparse, mask, given) -> None:
  seen = jnp.asarray(np.repeat(np.repeat(mask, BLOCK, 1), BLOCK, 2)[None])
  np.testing.assert_allclose(jax.jit(sparse)(*given), jax.jit(lambda *a: dense(*a, mask=seen))(*given), atol=1e-4)
