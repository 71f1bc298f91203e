"""Counts what is not zero, in a parameter and in its groups of neighbours, in about the time of one pass over it.

    census.taken(w, Axes((0,), (1,)), groups=(4, 8))   # (nonzeros, {4: most nonzeros in a group of 4, 8: ...})
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours
from sparsejax.types import Array, Axes

_FACTORS = 32  # Slices are added up to this factor of a group; a reduction of wider ones is the smaller program.


def taken(w: Array, axes: Axes, groups: tuple[int, ...] = ()) -> tuple[int, dict[int, int]]:
  """Returns how many weights of `w` are not zero, and for each m of `groups` the most of them in a group of m.

  Groups lie along the contracted axes of `axes`, whose length each m divides. -0.0 is zero, and NaN is not.
  """
  counts, most = jax.device_get(_counted(w, axes.contracted, tuple(sorted(groups))))
  return int(np.sum(counts, dtype=np.int64)), {m: int(n) for m, n in most.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _counted(w: Array, contracted: tuple[int, ...], groups: tuple[int, ...]) -> tuple[Array, dict[int, Array]]:
  """Returns the nonzeros of parts of `w`, and the most in a group of each m of `groups`, which increase.

  CPUs add small integers of neighbours many times faster than they reduce to wide integers. Every count is therefore
  made of smaller counts.
  """
  nonzero = (w != 0).astype(jnp.uint8)
  if not groups or not w.size:
    return _summed(nonzero, 1), dict.fromkeys(groups, jnp.uint8(0))
  place, counts = min(contracted), {1: neighbours.merged(nonzero, contracted, math.lcm(*groups))}
  for m in groups:
    least = max(d for d in counts if m % d == 0)
    counts[m] = _together(counts[least].astype(jnp.uint8 if m < 256 else jnp.uint16), m // least, place)
  return _summed(counts[groups[-1]], groups[-1]), {m: jnp.max(counts[m]) for m in groups}


def _summed(counts: Array, bound: int) -> Array:
  """Returns `counts`, which are at most `bound`, summed over all axes but the first."""
  for a in range(counts.ndim):
    while counts.shape[a] % 2 == 0 and 0 not in counts.shape and 2 * bound < 256 and not _sharded(counts, a):
      counts, bound = _together(counts, 2, a), 2 * bound
  return jnp.sum(counts, axis=tuple(range(1, counts.ndim)), dtype=jnp.int32)


def _together(counts: Array, n: int, axis: int) -> Array:
  """Returns the sums of `n` neighbours along `axis`."""
  while n > 1:
    factor = next((d for d in range(2, min(n, _FACTORS) + 1) if n % d == 0), n)
    parts = neighbours.split(counts, factor, axis)
    if factor > _FACTORS or _sharded(parts, axis + 1):
      counts = jnp.sum(parts, axis=axis + 1, dtype=counts.dtype)
    else:
      counts = sum(jax.lax.index_in_dim(parts, i, axis + 1, keepdims=False) for i in range(1, factor)
                   ) + jax.lax.index_in_dim(parts, 0, axis + 1, keepdims=False)
    n //= factor
  return counts


def _sharded(x: Array, axis: int) -> bool:
  """Returns whether `axis` lies across devices of an Explicit mesh, where neighbours may be on two devices."""
  return tuple(jax.typeof(x).sharding.spec)[axis] is not None
