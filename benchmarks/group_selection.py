"""Compares the N:M mask of a 4096 x 4096 float32 matrix with two `argsort`s over the groups, the usual way to rank."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.timing import Measurement
from sparsejax import ranking

SHAPE = (4096, 4096)
BARS = {4: 200.0, 8: 120.0, 16: 50.0, 32: 20.0}  # at least so many times faster, n = m / 4


def by_argsort(w: jax.Array, n: int, m: int) -> jax.Array:
  """Returns the mask of the `n` largest of every `m` along axis 0, by two stable sorts, with the ties of `ranking`."""
  groups = jnp.moveaxis(w, 0, -1).reshape(w.shape[1], -1, m)
  ranks = jnp.argsort(jnp.argsort(-groups, axis=-1, stable=True), axis=-1)
  return jnp.moveaxis((ranks < n).reshape(w.shape[::-1]), -1, 0)


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields one claim for each group size. The matrix has ties (rounded normals), and both masks have to be equal."""
  w = jnp.round(jax.random.normal(jax.random.key(0), SHAPE) * 512) / 512
  for m, bar in BARS.items():
    ours = jax.jit(lambda w, m=m: ranking.top_n_in_groups(jnp.abs(w), m // 4, m, 0))
    theirs = jax.jit(lambda w, m=m: by_argsort(jnp.abs(w), m // 4, m))
    if not bool(jnp.all(ours(w) == theirs(w))):
      raise AssertionError(f'group_selection: the masks differ at m = {m}.')
    seconds = timing.take_turns({'argsort': lambda f=theirs: f(w), 'ranking': lambda f=ours: f(w)}, rounds)
    what = f'{m // 4}:{m} mask of 4096 x 4096, times faster than argsort'
    yield timing.claim(what, seconds, 'argsort', 'ranking', bar)
