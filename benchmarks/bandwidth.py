"""Compares exact masks of 4096 x 4096 scores with one reading of the scores at the bandwidth of a measured copy.

The copy is that of numpy into an array that is there already. A copy reads and writes, so that the bound, one reading,
is half of its time. Scores of two bytes are compared with float32 scores of the same values.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Measurement
from sparsejax import ranking

SHAPE = (4096, 4096)
BAR = 12.0  # at most so many times the bound
GROUPS = {f'{n}:4 along axis {axis}': lambda s, n=n, axis=axis: ranking.top_n_in_groups(s, n, 4, axis)
          for n in (2, 1) for axis in (0, 1)}
MASKS = {**GROUPS, '10 % of the leaf': lambda s: ranking.top_n(s, s.size // 10)}
BFLOAT16 = {'2:4 along axis 0': 1.0, '2:4 along axis 1': 1.0, '10 % of the leaf': 1.0}  # at most so many times float32


def copying(scores: jax.Array) -> Callable[[], None]:
  """Returns a call that copies as many bytes as `scores` has."""
  source, target = np.array(scores), np.zeros_like(scores)
  return lambda: np.copyto(target, source)


def run(rounds: int = 20) -> Iterator[Measurement]:
  """Yields the claims on float32 scores, then the claims on bfloat16 scores. Every mask has to have the exact count."""
  wide = jnp.abs(jax.random.normal(jax.random.key(0), SHAPE))
  scores = {'float32': wide, 'bfloat16': wide.astype(jnp.bfloat16)}
  contestants = {'copy': copying(wide)}
  for name, mask in MASKS.items():
    kept = wide.size // 10 if mask is MASKS['10 % of the leaf'] else wide.size * int(name[0]) // 4
    for kind, x in scores.items():
      chosen = jax.jit(mask)
      if int(chosen(x).sum()) != kept:
        raise AssertionError(f'bandwidth: the mask of {name} of {kind} does not keep {kept}.')
      contestants[f'{name}, {kind}'] = lambda chosen=chosen, x=x: chosen(x)
  seconds = [{**each, 'bound': each['copy'] / 2} for each in timing.take_turns(contestants, rounds)]
  for name in MASKS:
    yield timing.claim(f'{name}, float32: over one reading', seconds, f'{name}, float32', 'bound', BAR, False)
  for name, bar in BFLOAT16.items():
    yield timing.claim(f'{name}, bfloat16: over float32', seconds, f'{name}, bfloat16', f'{name}, float32', bar, False)
