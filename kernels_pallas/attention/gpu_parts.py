"""Holds the parts of a step that the attention kernels for Hopper share. A warpgroup has 64 rows.

    score = jnp.where(seen(query, key, 64), score, -jnp.inf)             # `float32[64, 64]`
    score = jnp.where(same(numbers_of_queries, numbers_of_keys), score, -jnp.inf)
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.attention.gpu_plan import ROWS
from sparsejax.types import Array

NOTHING = -1e30  # largest score of a query that has seen no key: finite, because inf - inf is NaN
WGMMA = plgpu.Layout.WGMMA


def zeros(d: int) -> Array:
  return plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), WGMMA)


def row(value: float) -> Array:
  """Returns `value` for each row, in the layout of a reduced wgmma."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))


def broadcast(numbers: Array, axis: int, shape: tuple[int, ...] = (ROWS, ROWS)) -> Array:
  """Returns a number for each row (axis 0) or column (axis 1) as an array of `shape`."""
  return lax.broadcast_in_dim(numbers, shape, [axis])


def read(ref: Any, axis: int, interpret: bool) -> Array:
  """Reads a number for each row (axis 0) or column (axis 1). Interpret mode has no loads into a layout."""
  return ref[...] if interpret else hopper.load(ref, WGMMA.reduce(1 - axis), optimized=False)


def seen(query: Any, key: Any, columns: int = ROWS, turned: bool = False) -> Array:
  """Returns whether queries from `query` on may see keys from `key` on, `bool[ROWS, columns]`.

  Queries are the rows, or, if `turned`, keys are.
  """
  iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), axis, layout=WGMMA)
  return iota(int(turned)) + query >= iota(1 - int(turned)) + key


def same(rows: Array, columns: Array) -> Array:
  """Returns whether queries and keys have the same number of a segment, `bool[ROWS, columns]`."""
  shape = *rows.shape, *columns.shape
  return broadcast(rows, 0, shape) == broadcast(columns, 1, shape)


def numbers(segmented: bool, **shapes: tuple[int, ...]) -> dict[str, Any]:
  """Returns the memory of the numbers of segments, if there are any."""
  return {name: plgpu.SMEM(shape, jnp.int32) for name, shape in shapes.items()} if segmented else {}


def products(a: Any, b: Any) -> Array:
  """Returns the products of the rows of `a` and of `b`, `float32[ROWS, ROWS]`."""
  def product(acc):
    plgpu.wgmma(acc, a, hopper.transposed(b))
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((ROWS, ROWS), jnp.float32))


def added(total: Array, weights: Array, rows: Any, held: Any) -> Array:
  """Returns `total` plus `weights` times `rows`. Interpret mode multiplies no registers, and takes memory `held`."""
  if held is None:
    return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, rows))(plgpu.ACC.init(total))
  held[...] = weights

  def product(acc):
    plgpu.wgmma(acc, held, rows)
    return acc[...]

  return total + pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))


def loops(copy: Callable[[], None], compute: Callable[[], None]) -> None:
  """Runs `copy` in the last warpgroup, and `compute` in the others."""
  pl.when(lax.axis_index('wg') == hopper.COMPUTE)(copy)
  pl.when(lax.axis_index('wg') < hopper.COMPUTE)(compute)


def drained(barrier: Any, count: Array, slots: int) -> None:
  """Waits for the last arrivals on a ring of barriers, before which a thread block must not end."""
  lax.fori_loop(0, slots, lambda i, _: plgpu.barrier_wait(barrier.at[lax.rem(count + i, jnp.int32(slots))]), None)
