"""Scores: how much a weight is worth keeping, one number each, larger is better.

A score is `score(w, signals) -> float32 like w`. It looks at one leaf and knows nothing of masks or counts. One that
misses a signal raises `ValueError` and says which.
"""

import jax
import jax.numpy as jnp

from sparsejax.types import Array, Signals


def magnitude(w: Array, signals: Signals = Signals()) -> Array:
  """`|w|`. NaN stays NaN, which `ranking` puts last."""
  del signals
  return jnp.abs(w).astype(jnp.float32)


def random(w: Array, signals: Signals) -> Array:
  """Uniform in [0, 1), drawn in float32 whatever the weight's dtype: bfloat16 has too few levels to rank a matrix.

  Needs `signals.key`.
  """
  if signals.key is None:
    raise ValueError('scores.random: needs a PRNG key; pass `key=jax.random.key(seed)` to the recipe.')
  return jax.random.uniform(signals.key, w.shape, jnp.float32)


def gradient(w: Array, signals: Signals) -> Array:
  """`|dL/dw|`. Needs `signals.grad`, so there is none before the first update."""
  if signals.grad is None:
    raise ValueError('scores.gradient: needs the gradient of this leaf, and the caller has none here '
                     '(masks made in `init` cannot use it); score with magnitude or random instead.')
  return jnp.abs(signals.grad).astype(jnp.float32)
