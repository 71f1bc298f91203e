"""Computes the gradients of block-sparse attention on Hopper, through Mosaic GPU.

Nothing of queries times keys is made. The first kernel goes through the keys of each tile of queries twice: for the
sums of the softmax, and for `dq`. The second kernel goes through the queries of each tile of keys, by the lists turned
around, for `dk` and `dv`. Both compute the weights again, as FlashAttention does (arXiv 2307.08691, algorithm 2).

A row's *lse* is the logarithm, base 2, of the sum of its exponentials. Its *delta* is the sum of the derivatives of its
weights, each times the weight.
"""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.attention.gpu_parts import (
  NOTHING,
  added,
  broadcast,
  drained,
  loops,
  numbers,
  products,
  read,
  row,
  same,
  seen,
  zeros,
)
from kernels_pallas.attention.gpu_plan import QUERIES, ROWS, AttentionPlan, make_plan, steps
from kernels_pallas.attention.heads import lists
from kernels_pallas.attention.segments import batched
from sparsejax.types import Array

KEYS = 64  # of a step of the first kernel, and of a tile of the second


def attention_gradients(dy: Array, q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *,
                        block_q: int, block_k: int, causal: bool, scale: float,
                        segments: tuple[Array, Array] | None = None, interpret: bool = False
                        ) -> tuple[Array, Array, Array]:
  """Returns the gradients of `q`, `k` and `v` for the cotangent `dy`; arguments as those of `gpu.attention`.

  Sums are float32, and the gradients have the dtypes of their arrays.
  """
  index, counts = lists(1, index, counts)
  plan = dataclasses.replace(make_plan(q, k, index, counts, block_q, block_k, causal, scale, interpret), keys=KEYS,
                             slots=2, steps=None)
  ids, dy = () if segments is None else segments, dy.astype(q.dtype)
  dq, lse, delta = _of_queries(plan, dy, q, k, v, index, steps(plan, index, counts)[1], ids, interpret)
  dk, dv = _of_keys(plan, dy, q, k, v, lse, delta, *_turned(plan, index, counts, k), ids, interpret)
  shared = lambda total: total.sum(0).reshape(*k.shape[:3], plan.group, plan.d).sum(3)
  dv = shared(dv).astype(v.dtype)
  if ids:  # Queries without a key of their number have the value of their own key.
    own = lambda v: batched(jnp.zeros_like(q), v, index, counts, *ids, block_q=block_q, block_k=block_k, causal=causal)
    dv += jax.vjp(own, v)[1](dy)[0]
  return dq, shared(dk).astype(k.dtype), dv


def _turned(plan: AttentionPlan, index: Array, counts: Array, k: Array) -> tuple[Array, Array]:
  """Returns the blocks of queries that see each block of keys, `int32[heads, nk, nq]`, and how many see it."""
  heads, rows, width = index.shape
  columns = k.shape[1] // plan.block_k
  listed = lax.broadcasted_iota(jnp.int32, index.shape, 2) < counts[..., None]
  head, row = (lax.broadcasted_iota(jnp.int32, index.shape, axis) for axis in (0, 1))
  seen = jnp.zeros((heads, columns, rows), bool).at[head, jnp.clip(index, 0, columns - 1), row].max(listed)
  if plan.causal:
    seen &= (jnp.arange(rows)[None, None] + 1) * plan.block_q > jnp.arange(columns)[None, :, None] * plan.block_k
  return jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32), jnp.sum(seen, -1, dtype=jnp.int32)


# The first kernel: a tile has 128 queries, and goes through its keys twice.


def _of_queries(plan: AttentionPlan, dy: Array, q: Array, k: Array, v: Array, index: Array, trips: Array,
                ids: tuple[Array, ...], interpret: bool) -> tuple[Array, Array, Array]:
  """Returns `dq`, and lse and delta of each query, `float32[batch, heads, Tq]`."""
  def body(index, trips, q, k, v, dy, *rest, **shared):
    *ids, dq, lse, delta = rest
    refs = types.SimpleNamespace(**{'weights': None, **shared}, index=index, q=q, k=k, v=v, dy=dy, dq=dq, lse=lse,
                                 delta=delta, numbers=ids)

    def described(i):
      _, head, tile = plan.place(i)
      return i, trips[head, tile]

    loop = hopper.share(plan.work, plan.blocks, described)
    loops(lambda: _copy_keys(plan, refs, loop), lambda: _compute_queries(plan, refs, loop, interpret))

  pair, rows = (hopper.COMPUTE, ROWS, plan.d), plgpu.SMEM((hopper.COMPUTE, ROWS), jnp.float32)
  full, free = hopper.barriers(plan.slots, 2 + bool(ids))
  scratch = {'query': hopper.shared(pair, q.dtype), 'out': hopper.shared(pair, q.dtype),
             'key': hopper.shared((plan.slots, KEYS, plan.d), q.dtype),
             'value': hopper.shared((plan.slots, KEYS, plan.d), q.dtype),
             'staging': hopper.shared((hopper.COMPUTE, 1, ROWS, 64), q.dtype), 'sums': rows, 'means': rows,
             'asked': plgpu.Barrier(num_arrivals=2 + bool(ids), num_barriers=hopper.COMPUTE),
             'answered': plgpu.Barrier(num_barriers=hopper.COMPUTE), 'full': full, 'free': free,
             **numbers(bool(ids), of_queries=pair[:2], of_keys=(plan.slots, KEYS)), **_held(interpret, q.dtype)}
  of_each = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
  out = jax.ShapeDtypeStruct(q.shape, q.dtype), of_each, of_each
  return hopper.kernel(body, out, (index, trips, q, k, v, dy, *ids), blocks=plan.blocks, scratch=scratch, lanes=True,
                       approximate=True, interpret=interpret)


def _held(interpret: bool, dtype: Any) -> dict[str, Any]:
  return {'weights': plgpu.SMEM((hopper.COMPUTE, ROWS, ROWS), dtype)} if interpret else {}


def _copy_keys(plan: AttentionPlan, refs: Any, loop: Any) -> None:
  plgpu.set_max_registers(40, action='decrease')

  def copy_tile(described, count):
    i, n = described
    example, head, tile = plan.place(i)
    shared = lax.div(head, jnp.int32(plan.group))
    for half in range(hopper.COMPUTE):
      plgpu.barrier_wait(refs.answered.at[half])
      own = pl.ds(tile * QUERIES + half * ROWS, ROWS)
      plgpu.copy_gmem_to_smem(refs.q.at[example, own, head], refs.query.at[half], refs.asked.at[half])
      plgpu.copy_gmem_to_smem(refs.dy.at[example, own, head], refs.out.at[half], refs.asked.at[half])
      if refs.numbers:
        plgpu.copy_gmem_to_smem(refs.numbers[0].at[example, own], refs.of_queries.at[half], refs.asked.at[half])

    def step(j, count):
      slot, keys = plan.slot(count), pl.ds(plan.first(refs.index, head, tile, j), KEYS)
      plgpu.barrier_wait(refs.free.at[slot])
      plgpu.copy_gmem_to_smem(refs.k.at[example, keys, shared], refs.key.at[slot], refs.full.at[slot])
      plgpu.copy_gmem_to_smem(refs.v.at[example, keys, shared], refs.value.at[slot], refs.full.at[slot])
      if refs.numbers:
        plgpu.copy_gmem_to_smem(refs.numbers[1].at[example, keys], refs.of_keys.at[slot], refs.full.at[slot])
      return count + 1

    count = lax.fori_loop(jnp.int32(0), n, step, count)
    return lax.fori_loop(jnp.int32(0), n, step, count)

  drained(refs.free, loop(copy_tile), plan.slots)
  for half in range(hopper.COMPUTE):
    plgpu.barrier_wait(refs.answered.at[half])


def _compute_queries(plan: AttentionPlan, refs: Any, loop: Any, interpret: bool) -> None:
  wg = lax.axis_index('wg')
  hopper.start((refs.free,), plan.slots)
  plgpu.barrier_arrive(refs.answered.at[wg])
  held = None if refs.weights is None else refs.weights.at[wg]
  unit = plan.scale * math.log2(math.e)  # The hardware computes powers of two.

  def compute_tile(described, count):
    i, n = described
    example, head, tile = plan.place(i)
    first = tile * QUERIES + wg * ROWS
    plgpu.barrier_wait(refs.asked.at[wg])

    def pair(j, slot):
      """Returns the scores in log2, and the derivatives of the weights, of one step."""
      plgpu.barrier_wait(refs.full.at[slot])
      score = products(refs.query.at[wg], refs.key.at[slot]) * unit
      if plan.causal:
        score = jnp.where(seen(first, plan.first(refs.index, head, tile, j)), score, -jnp.inf)
      if refs.numbers:
        own = same(read(refs.of_queries.at[wg], 0, interpret), read(refs.of_keys.at[slot], 1, interpret))
        score = jnp.where(own, score, -jnp.inf)
      return score, products(refs.out.at[wg], refs.value.at[slot])

    def sum_up(j, carry):
      count, most, total, mean = carry
      slot = plan.slot(count)
      score, dweights = pair(j, slot)
      plgpu.barrier_arrive(refs.free.at[slot])
      new = jnp.maximum(most, score.max(axis=1))
      less, weights = jnp.exp2(most - new), jnp.exp2(score - broadcast(new, 0))
      return count + 1, new, total * less + weights.sum(axis=1), mean * less + (weights * dweights).sum(axis=1)

    count, most, total, mean = lax.fori_loop(jnp.int32(0), n, sum_up, (count, row(NOTHING), row(0.0), row(0.0)))
    some = jnp.maximum(total, 1e-30)
    lse = jnp.where(total > 0, most + jnp.log(some) * math.log2(math.e), -NOTHING)
    delta = mean / some

    def add(j, carry):
      count, dq = carry
      slot = plan.slot(count)
      score, dweights = pair(j, slot)
      dscore = jnp.exp2(score - broadcast(lse, 0)) * (dweights - broadcast(delta, 0)) * plan.scale
      dq = added(dq, dscore.astype(refs.q.dtype), refs.key.at[slot], held)
      plgpu.barrier_arrive(refs.free.at[slot])
      return count + 1, dq

    count, dq = lax.fori_loop(jnp.int32(0), n, add, (count, zeros(plan.d)))
    plgpu.barrier_arrive(refs.answered.at[wg])
    _write_queries(refs, dq, lse, delta, (example, head, first))
    return count

  loop(compute_tile)
  plgpu.wait_smem_to_gmem(0)


def _write_queries(refs: Any, dq: Array, lse: Array, delta: Array, place: tuple[Array, Array, Array]) -> None:
  (example, head, first), wg = place, lax.axis_index('wg')
  hopper.store(dq.astype(refs.q.dtype), refs.staging.at[wg], lambda row, column: refs.dq.at[
      example, pl.ds(first + row, ROWS), head, pl.ds(column, 64)])
  for each, staging, target in ((lse, refs.sums, refs.lse), (delta, refs.means, refs.delta)):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging.at[wg][...] = each
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.at[wg], target.at[example, head, pl.ds(first, ROWS)])


# The second kernel: a tile has 64 keys. Each warpgroup has half of the queries of a step, and a sum of its own.


def _of_keys(plan: AttentionPlan, dy: Array, q: Array, k: Array, v: Array, lse: Array, delta: Array, index: Array,
             counts: Array, ids: tuple[Array, ...], interpret: bool) -> tuple[Array, Array]:
  """Returns `dk` and `dv` of each head of `q`, in two parts: `float32[2, batch, Tk, heads, d]`."""
  repeats, tiles = plan.block_q // QUERIES, k.shape[1] // KEYS
  work = q.shape[0] * plan.heads * tiles
  blocks = min(hopper.cores(interpret), work)

  def place(i):
    """Returns the example, the head and the tile of keys with this number."""
    i, tile = lax.div(i, jnp.int32(tiles)), lax.rem(i, jnp.int32(tiles))
    return lax.div(i, jnp.int32(plan.heads)), lax.rem(i, jnp.int32(plan.heads)), tile

  def body(index, counts, q, k, v, dy, lse, delta, *rest, **shared):
    *ids, dk, dv = rest
    refs = types.SimpleNamespace(**{'weights': None, **shared}, q=q, k=k, v=v, dy=dy, lse=lse, delta=delta, dk=dk,
                                 dv=dv, numbers=ids)

    def block(tile):
      return lax.div(tile * KEYS, jnp.int32(plan.block_k))

    def described(i):
      _, head, tile = place(i)
      return i, counts[head, block(tile)] * repeats

    def first(head, tile, j):
      """Returns the first query of a step."""
      listed = index[head, block(tile), lax.div(j, jnp.int32(repeats))]
      return (listed * repeats + lax.rem(j, jnp.int32(repeats))) * QUERIES

    own = refs, hopper.share(work, blocks, described), place, first
    loops(functools.partial(_copy_queries, plan, *own), functools.partial(_compute_keys, plan, *own, interpret))

  out = jax.ShapeDtypeStruct((hopper.COMPUTE, *k.shape[:2], plan.heads, plan.d), jnp.float32)
  tile, ring = (KEYS, plan.d), (plan.slots, QUERIES, plan.d)
  full, free = hopper.barriers(plan.slots, 2 + (2 + bool(ids)) * hopper.COMPUTE)
  of_each = plgpu.SMEM((plan.slots, hopper.COMPUTE, ROWS), jnp.float32)
  scratch = {'key': hopper.shared(tile, q.dtype), 'value': hopper.shared(tile, q.dtype),
             'query': hopper.shared(ring, q.dtype), 'out': hopper.shared(ring, q.dtype), 'sums': of_each,
             'means': of_each, 'staging': hopper.shared((hopper.COMPUTE, 1, ROWS, 64), jnp.float32),
             'asked': plgpu.Barrier(num_arrivals=2 + bool(ids)),
             'answered': plgpu.Barrier(num_arrivals=hopper.COMPUTE), 'full': full, 'free': free,
             **numbers(bool(ids), of_queries=(plan.slots, hopper.COMPUTE, ROWS), of_keys=(KEYS,)),
             **_held(interpret, q.dtype)}
  return hopper.kernel(body, (out, out), (index, counts, q, k, v, dy, lse, delta, *ids), blocks=blocks, scratch=scratch,
                       lanes=True, approximate=True, interpret=interpret)


def _copy_queries(plan: AttentionPlan, refs: Any, loop: Any, place: Any, first: Any) -> None:
  plgpu.set_max_registers(40, action='decrease')

  def copy_tile(described, count):
    i, n = described
    example, head, tile = place(i)
    shared, keys = lax.div(head, jnp.int32(plan.group)), pl.ds(tile * KEYS, KEYS)
    plgpu.barrier_wait(refs.answered)
    plgpu.copy_gmem_to_smem(refs.k.at[example, keys, shared], refs.key, refs.asked)
    plgpu.copy_gmem_to_smem(refs.v.at[example, keys, shared], refs.value, refs.asked)
    if refs.numbers:
      plgpu.copy_gmem_to_smem(refs.numbers[1].at[example, keys], refs.of_keys, refs.asked)

    def step(j, count):
      slot, query = plan.slot(count), first(head, tile, j)
      plgpu.barrier_wait(refs.free.at[slot])
      for source, to in ((refs.q, refs.query), (refs.dy, refs.out)):
        plgpu.copy_gmem_to_smem(source.at[example, pl.ds(query, QUERIES), head], to.at[slot], refs.full.at[slot])
      for half in range(hopper.COMPUTE):
        own = pl.ds(query + half * ROWS, ROWS)
        for source, to in ((refs.lse, refs.sums), (refs.delta, refs.means)):
          plgpu.copy_gmem_to_smem(source.at[example, head, own], to.at[slot, half], refs.full.at[slot])
        if refs.numbers:
          plgpu.copy_gmem_to_smem(refs.numbers[0].at[example, own], refs.of_queries.at[slot, half], refs.full.at[slot])
      return count + 1

    return lax.fori_loop(jnp.int32(0), n, step, count)

  drained(refs.free, loop(copy_tile), plan.slots)
  plgpu.barrier_wait(refs.answered)


def _compute_keys(plan: AttentionPlan, refs: Any, loop: Any, place: Any, first: Any, interpret: bool) -> None:
  wg = lax.axis_index('wg')
  hopper.start((refs.free,), plan.slots)
  plgpu.barrier_arrive(refs.answered)
  held = None if refs.weights is None else refs.weights.at[wg]
  unit, half = plan.scale * math.log2(math.e), pl.ds(wg * ROWS, ROWS)

  def compute_tile(described, count):
    i, n = described
    example, head, tile = place(i)
    plgpu.barrier_wait(refs.asked)

    def add(j, carry):
      count, dk, dv = carry
      slot = plan.slot(count)
      plgpu.barrier_wait(refs.full.at[slot])
      queries, out = refs.query.at[slot, half], refs.out.at[slot, half]
      score = products(refs.key, queries) * unit
      if plan.causal:
        score = jnp.where(seen(first(head, tile, j) + wg * ROWS, tile * KEYS, turned=True), score, -jnp.inf)
      if refs.numbers:
        own = same(read(refs.of_keys, 0, interpret), read(refs.of_queries.at[slot, wg], 1, interpret))
        score = jnp.where(own, score, -jnp.inf)
      sums, means = (broadcast(read(ref.at[slot, wg], 1, interpret), 1) for ref in (refs.sums, refs.means))
      weights = jnp.exp2(score - sums)
      dv = added(dv, weights.astype(refs.q.dtype), out, held)
      dscore = weights * (products(refs.value, out) - means) * plan.scale
      dk = added(dk, dscore.astype(refs.q.dtype), queries, held)
      plgpu.barrier_arrive(refs.free.at[slot])
      return count + 1, dk, dv

    count, dk, dv = lax.fori_loop(jnp.int32(0), n, add, (count, zeros(plan.d), zeros(plan.d)))
    plgpu.barrier_arrive(refs.answered)
    for value, target in ((dk, refs.dk), (dv, refs.dv)):
      hopper.store(value, refs.staging.at[wg], lambda row, column, target=target: target.at[
          wg, example, pl.ds(tile * KEYS + row, ROWS), head, pl.ds(column, 64)])
    return count

  loop(compute_tile)
  plgpu.wait_smem_to_gmem(0)
