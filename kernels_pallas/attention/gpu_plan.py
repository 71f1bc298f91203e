"""Plans block-sparse attention on Hopper: the sizes that are known at trace time, and which tile of queries is where.

    plan = make_plan(q, k, index, counts, block_q=128, block_k=128, causal=True, scale=0.125, interpret=False)
    batch, head, tile = plan.place(i)                                                # of the i-th tile of queries
    unmasked, trips = steps(plan, index, counts)                                     # `int32[heads, tiles]` each
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from kernels_pallas import hopper
from sparsejax.types import Array

ROWS = 64  # queries of a warpgroup
AHEAD = 2  # tiles of queries in shared memory
QUERIES = hopper.COMPUTE * ROWS  # of a tile


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
  """An `AttentionPlan` holds the sizes of the kernel, and says which tile of queries and which keys a number means."""

  heads: int
  group: int  # heads of q that share a head of k and v
  tiles: int  # tiles of queries of a head
  work: int  # tiles of all heads
  block_q: int
  block_k: int
  keys: int  # keys of a step
  d: int  # length of a query and of a key
  slots: int  # steps in shared memory
  blocks: int  # thread blocks of the grid
  causal: bool
  scale: float
  steps: int | None  # steps of each tile, where the number is known at trace time

  @property
  def parts(self) -> int:
    """The steps that a block of keys takes."""
    return self.block_k // self.keys

  def place(self, i: Array) -> tuple[Array, Array, Array]:
    """Returns the example, the head and the tile of the i-th tile of queries; causal tiles begin with the longest."""
    i, tile = lax.div(i, jnp.int32(self.tiles)), lax.rem(i, jnp.int32(self.tiles))
    tile = self.tiles - 1 - tile if self.causal else tile
    return lax.div(i, jnp.int32(self.heads)), lax.rem(i, jnp.int32(self.heads)), tile

  def first(self, index: Any, head: Array, tile: Array, step: Array) -> Array:
    """Returns the first key of a step."""
    block = index[head, lax.div(tile * QUERIES, jnp.int32(self.block_q)), lax.div(step, jnp.int32(self.parts))]
    return block * self.block_k + lax.rem(step, jnp.int32(self.parts)) * self.keys

  def buffer(self, i: Array) -> Array:
    """Returns the buffer in shared memory that holds the queries of the i-th tile."""
    return lax.rem(lax.div(i, jnp.int32(self.blocks)), jnp.int32(AHEAD))

  def slot(self, count: Array) -> Array:
    """Returns the slot in shared memory that holds the keys and the values of a step, after `count` steps."""
    return lax.rem(count, jnp.int32(self.slots))


def make_plan(q: Array, k: Array, index: Array, counts: Array | None, block_q: int, block_k: int, causal: bool,
              scale: float, interpret: bool, segmented: bool = False) -> AttentionPlan:
  """Returns the plan for attention of `q` to the blocks of keys that `index` lists, maybe with numbers of segments."""
  batch, length, heads, d = q.shape
  rest, tiles = (AHEAD + 1) * hopper.nbytes((QUERIES, d), q.dtype), length // QUERIES
  rest += hopper.nbytes((AHEAD * QUERIES + 4 * 128,), jnp.int32) if segmented else 0  # numbers of queries and keys
  fitting = lambda keys: hopper.slots(hopper.nbytes((2 * keys, d), q.dtype), rest, 4)
  keys = 128 if block_k % 128 == 0 and fitting(128) > 1 else 64
  slots = fitting(keys)
  work = batch * heads * tiles
  steps = index.shape[2] * (block_k // keys) if counts is None and not causal else None
  return AttentionPlan(heads, heads // k.shape[2], tiles, work, block_q, block_k, keys, d, slots,
               min(hopper.cores(interpret), work), causal, scale, steps)


def steps(plan: AttentionPlan, index: Array, counts: Array) -> tuple[Array, Array]:
  """Returns, for each tile of queries, how many of its first steps need no mask, and how many steps it has.

  Both are `int32[heads, tiles]`.
  """
  repeats = plan.block_q // QUERIES
  trips = jnp.repeat(counts * plan.parts, repeats, axis=1).astype(jnp.int32)
  if not plan.causal:
    return trips, trips
  starts = index[..., None] * plan.block_k + lax.broadcasted_iota(
      jnp.int32, (*index.shape, plan.parts), 3) * plan.keys
  starts = jnp.repeat(starts.reshape(*index.shape[:2], -1), repeats, axis=1)
  listed = lax.broadcasted_iota(jnp.int32, starts.shape, 2) < trips[..., None]
  begin = lax.broadcasted_iota(jnp.int32, (*trips.shape, 1), 1) * QUERIES
  count = lambda which: jnp.sum(listed & which, -1, dtype=jnp.int32)
  return count(starts + plan.keys - 1 <= begin), count(starts < begin + QUERIES)
