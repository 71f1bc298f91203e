"""Selects the largest keys in groups of some dozens by a network of comparators, whose work for an entry grows slowly.

    mask = top_n_by_network(keys, 16, 1)      # of `int32[groups, 32, columns]`, the 16 largest of every 32

In a group of 32 the network takes 9 comparisons for each entry, where counting takes 32. The program of a network is
long, and takes about twice as long to compile.
"""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array
from sparsejax.wholes import along


def top_n_by_network(keys: Array, n: int, axis: int) -> Array:
  """Returns the mask of the `n` largest integer keys of each group, which lies along `axis`; 0 < `n` < its length.

  Among equal keys the lower index is kept first. Every pass over the keys computes one number for each group.
  """
  # Each branch slices the keys by itself, and is then a single kernel. Slices that two branches share are operands of
  # both branches, which XLA:CPU compiles to some 40 kernels.
  rows = lambda: [lax.index_in_dim(keys, i, axis, keepdims=True) for i in range(keys.shape[axis])]
  least = _once(lambda: _nth_largest(rows(), n), keys, axis)
  stop = _once(lambda: _stop(rows(), least, n), keys, axis)
  place = along(axis, keys.shape).astype(keys.dtype)
  return (keys > least) | ((keys == least) & (place < stop))


def _once(function: Callable[[], Array], keys: Array, axis: int) -> Array:
  """Returns `function()`, one number for each group.

  XLA:CPU would compute the number anew for each entry of the group, but it computes a branch once. The branch is taken
  always, since no key is below that of NaN, which XLA does not know.
  """
  groups = tuple(1 if a == axis else size for a, size in enumerate(keys.shape))
  first = lax.squeeze(lax.slice(keys, (0,) * keys.ndim, (1,) * keys.ndim), range(keys.ndim))
  return lax.cond(first > jnp.iinfo(keys.dtype).min, function, lambda: jnp.zeros(groups, keys.dtype))


def _nth_largest(rows: Sequence[Array], n: int) -> Array:
  """Returns the `n`-th largest of the rows, elementwise: each half is sorted, and merged at a single place."""
  upper, lower = (_sorted(half) for half in (rows[:len(rows) // 2], rows[len(rows) // 2:]))
  found: Array | None = None
  for i in range(max(0, n - len(lower)), min(n, len(upper)) + 1):  # the `i` largest of one half, the rest of the other
    last = [half[number - 1] for half, number in ((upper, i), (lower, n - i)) if number]
    both = last[0] if len(last) == 1 else lax.min(*last)
    found = both if found is None else lax.max(found, both)
  assert found is not None
  return found


def _sorted(rows: Sequence[Array]) -> list[Array]:
  """Returns the rows sorted elementwise, the largest first."""
  found = list(rows)
  for i, j in comparators(len(rows)):
    found[i], found[j] = lax.max(found[i], found[j]), lax.min(found[i], found[j])
  return found


def comparators(size: int) -> Iterator[tuple[int, int]]:
  """Yields the pairs that Batcher's odd-even merge sort compares (Knuth, The Art of Computer Programming, 5.2.2 M)."""
  length = 1
  while length < size:
    step = length
    while step:
      for start in range(step % length, size - step, 2 * step):
        for i in range(start, min(start + step, size - step)):
          if i // (2 * length) == (i + step) // (2 * length):
            yield i, i + step
      step //= 2
    length *= 2


def _stop(rows: Sequence[Array], least: Array, n: int) -> Array:
  """Returns the index before which keys that equal `least` are kept, so that `n` are kept."""
  kind = least.dtype
  left, stop = jnp.full_like(least, n), jnp.zeros_like(least)
  for row in rows:
    left -= (row > least).astype(kind)
  for i, row in enumerate(rows):
    kept = (row == least) & (left > 0)
    left, stop = left - kept.astype(kind), lax.select(kept, jnp.full_like(stop, i + 1), stop)
  return stop
