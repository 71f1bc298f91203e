"""Compares the unstructured mask of a 4096 x 4096 float32 matrix, which keeps one weight of ten, with two other ways.

The other ways are a stable `argsort` and `top_k`.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import timing
from benchmarks.timing import Measurement
from sparsejax import ranking

SHAPE = (4096, 4096)
KEPT = SHAPE[0] * SHAPE[1] // 10
BARS = {'argsort': 15.0, 'top_k': 7.0}  # at least so many times faster


def by_argsort(scores: jax.Array, n: int) -> jax.Array:
  """Returns the mask of the `n` highest scores, by a stable sort, with the ties of `ranking`."""
  return _mask_of(jnp.argsort(-scores.reshape(-1), stable=True)[:n], scores)


def by_top_k(scores: jax.Array, n: int) -> jax.Array:
  return _mask_of(lax.top_k(scores.reshape(-1), n)[1], scores)


def _mask_of(places: jax.Array, scores: jax.Array) -> jax.Array:
  return jnp.zeros(scores.size, bool).at[places].set(True).reshape(scores.shape)


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields one claim for each way. All masks have to be equal.

  The matrix has ties, also at the cut, because its normal numbers are rounded.
  """
  w = jnp.round(jax.random.normal(jax.random.key(0), SHAPE) * 512) / 512
  ways = {'ranking': ranking.top_n, 'argsort': by_argsort, 'top_k': by_top_k}
  chosen = {name: jax.jit(lambda w, way=way: way(jnp.abs(w), KEPT)) for name, way in ways.items()}
  masks = {name: choose(w) for name, choose in chosen.items()}
  for name in BARS:
    if not bool(jnp.all(masks['ranking'] == masks[name])):
      raise AssertionError(f'selection: the masks of ranking and {name} differ.')
  seconds = list(timing.take_turns({name: lambda f=choose: f(w) for name, choose in chosen.items()}, rounds))
  for name, bar in BARS.items():
    yield timing.claim(f'10 % mask of 4096 x 4096, times faster than {name}', seconds, name, 'ranking', bar)
