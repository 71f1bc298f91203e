"""Block-sparse flash attention on Hopper, forward, through Mosaic GPU.

After FlashAttention-3 (arXiv 2407.08608): two warpgroups have 64 queries each, and a third only copies. The two take
turns: each starts two products together, of queries and a step's keys, and of the last step's weights and values, and
has its softmax while the other multiplies. New is that the tiles of keys are those that an index lists, and that
nothing stops between two tiles of queries: with short lists, starting one costs most.
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
from kernels_pallas.attention.heads import lists
from sparsejax.types import Array

ROWS = 64  # queries of a warpgroup
AHEAD = 2  # tiles of queries in shared memory
QUERIES = hopper.COMPUTE * ROWS
_NOTHING = -1e30  # the largest score so far of a query that saw no key: finite, because inf - inf is NaN


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
              causal: bool, scale: float, interpret: bool = False) -> Array:
  """Attention of `q [batch, Tq, heads, d]` to those blocks of `k`, `v` `[batch, Tk, heads, d]` that `index` lists.

  `index` is `int32[heads, Tq / block_q, R]`: the blocks of keys that a block of queries sees, increasing, of which the
  first `counts`, `int32[heads, Tq / block_q]`, count, or all. If `causal`, query i sees keys 0 to i of these. A query
  that sees no key gives zeros. `k` and `v` may have fewer heads, which neighbouring heads of `q` then share. What it
  gives is like `q`; sums are float32.
  """
  plan = _plan(q, k, index, counts, block_q, block_k, causal, scale, interpret)
  if plan.steps is not None:
    whole = trips = index  # not read
  else:
    whole, trips = _steps(plan, *lists(1, index, counts))

  def body(index, whole, trips, q, k, v, out, **shared):
    refs = types.SimpleNamespace(**{'sums': None, 'weights': None, **shared}, index=index, trips=trips, q=q, k=k, v=v,
                                 out=out, wg=lax.axis_index('wg'))

    def named(i):
      """The i-th tile, how many steps it has, and how many of these need no mask."""
      if plan.steps is not None:
        return i, jnp.int32(plan.steps), jnp.int32(plan.steps)
      _, head, tile = plan.place(i)
      n = lax.max(trips[head, tile], jnp.int32(1))  # there is one, if only to be forgotten
      return i, n, whole[head, tile] if causal else n

    loop = hopper.share(plan.work, plan.blocks, named)
    pl.when(refs.wg == hopper.COMPUTE)(lambda: _copy(plan, refs, loop))
    pl.when(refs.wg < hopper.COMPUTE)(lambda: _compute(plan, refs, loop))

  return hopper.kernel(body, jax.ShapeDtypeStruct(q.shape, q.dtype), (index, whole, trips, q, k, v), blocks=plan.blocks,
                    scratch=_scratch(plan, q.dtype, interpret), lanes=True, approximate=True, interpret=interpret)


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
            causal: bool, scale: float) -> str | None:
  """Why attention to these blocks cannot run on Hopper, with the remedy."""
  del counts, index, scale
  if why := hopper.refused_dtype(q.dtype):
    return why
  if len(dtypes := {str(a.dtype) for a in (q, k, v)}) > 1:
    return f'q, k and v must have one dtype, not {" and ".join(sorted(dtypes))}; cast them to one'
  if q.shape[3] not in (64, 128) or not q.shape[3] == k.shape[3] == v.shape[3]:
    return f'heads of 64 and 128 fit, not of {q.shape[3]}, {k.shape[3]} and {v.shape[3]}; fill up with zeros'
  if block_q % QUERIES or block_k % 64:
    return (f'blocks of queries must be multiples of {QUERIES} and of keys multiples of 64, not {block_q} and '
            f'{block_k}; list other blocks')
  if q.shape[1] % block_q or k.shape[1] % block_k:
    return (f'{q.shape[1]} queries and {k.shape[1]} keys do not divide into blocks of {block_q} and {block_k}; fill up '
            'with zeros')
  if q.shape[2] % k.shape[2]:
    return f'{q.shape[2]} heads of q cannot share {k.shape[2]} of k evenly; repeat those of k and v'
  if causal and (version := _cuda()) and 12080 <= version < 12091:
    return f'ptxas of CUDA {version // 1000}.{version % 1000 // 10} miscompiles causal masks; take 12.9.1 or later'
  return None


def _cuda() -> int | None:
  """The version of the CUDA runtime that JAX has, if any."""
  try:
    from jax._src.lib import cuda_versions
  except ImportError:
    return None
  return cuda_versions.cuda_runtime_get_version() if cuda_versions is not None else None


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What is known at trace time: sizes, and which tile of queries is where."""

  heads: int
  group: int  # heads that share one of k and v
  tiles: int  # of queries of a head
  work: int  # tiles of all heads
  block_q: int
  block_k: int
  keys: int  # of a step
  d: int
  slots: int  # steps in shared memory
  blocks: int  # of the grid
  causal: bool
  scale: float
  steps: int | None  # of each tile, where that is known

  @property
  def parts(self) -> int:
    """Steps of a block of keys."""
    return self.block_k // self.keys

  def place(self, i: Array) -> tuple[Array, Array, Array]:
    """Which of the batch, head and tile, longest first if causal."""
    i, tile = lax.div(i, jnp.int32(self.tiles)), lax.rem(i, jnp.int32(self.tiles))
    tile = self.tiles - 1 - tile if self.causal else tile
    return lax.div(i, jnp.int32(self.heads)), lax.rem(i, jnp.int32(self.heads)), tile

  def first(self, index: Any, head: Array, tile: Array, step: Array) -> Array:
    """The first key of a step."""
    block = index[head, lax.div(tile * QUERIES, jnp.int32(self.block_q)), lax.div(step, jnp.int32(self.parts))]
    return block * self.block_k + lax.rem(step, jnp.int32(self.parts)) * self.keys

  def buffer(self, i: Array) -> Array:
    """Where the queries of the i-th tile lie."""
    return lax.rem(lax.div(i, jnp.int32(self.blocks)), jnp.int32(AHEAD))

  def slot(self, count: Array) -> Array:
    """Where the keys and the values of a step lie."""
    return lax.rem(count, jnp.int32(self.slots))


def _plan(q: Array, k: Array, index: Array, counts: Array | None, block_q: int, block_k: int, causal: bool,
          scale: float, interpret: bool) -> _Plan:
  batch, length, heads, d = q.shape
  keys, tiles = 128 if block_k % 128 == 0 else 64, length // QUERIES
  slots = hopper.slots(hopper.nbytes((2 * keys, d), q.dtype), (AHEAD + 1) * hopper.nbytes((QUERIES, d), q.dtype), 4)
  work = batch * heads * tiles
  steps = index.shape[2] * (block_k // keys) if counts is None and not causal else None
  return _Plan(heads, heads // k.shape[2], tiles, work, block_q, block_k, keys, d, slots,
               min(hopper.cores(interpret), work), causal, scale, steps)


def _steps(plan: _Plan, index: Array, counts: Array) -> tuple[Array, Array]:
  """How many steps of each tile of queries, the first ones, need no mask, and how many there are: `[heads, tiles]`."""
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


def _scratch(plan: _Plan, dtype: Any, interpret: bool) -> dict[str, Any]:
  """Shared memory and barriers: queries are asked for and answered, keys and values go through two rings."""
  keys, d, slots, pairs = plan.keys, plan.d, plan.slots, (AHEAD, hopper.COMPUTE)
  scratch = {
      'queries': hopper.shared((*pairs, ROWS, d), dtype), 'key': hopper.shared((slots, keys, d), dtype),
      'value': hopper.shared((slots, keys, d), dtype), 'staging': hopper.shared((hopper.COMPUTE, 2, ROWS, 64), dtype),
      'asked': plgpu.Barrier(num_barriers=pairs), 'answered': plgpu.Barrier(num_barriers=pairs),
      **dict(zip(('key_full', 'key_free'), hopper.barriers(slots, 1))),
      **dict(zip(('value_full', 'value_free'), hopper.barriers(slots, 1))),
      'turn': plgpu.Barrier(num_barriers=hopper.COMPUTE)}
  if interpret:  # which has no accumulators that last, and no wgmma of registers
    scratch['sums'] = plgpu.SMEM((hopper.COMPUTE, ROWS, d), jnp.float32)
    scratch['weights'] = plgpu.SMEM((hopper.COMPUTE, ROWS, keys), dtype)
  return scratch


# What a warpgroup does, the one that copies and the two that multiply.


def _copy(plan: _Plan, refs: Any, loop: Any) -> None:
  plgpu.set_max_registers(40, action='decrease')

  def tile(named, count):
    i, n, _ = named
    one, head, tile = plan.place(i)
    shared = lax.div(head, jnp.int32(plan.group))
    for half in range(hopper.COMPUTE):
      at = plan.buffer(i), half
      plgpu.barrier_wait(refs.answered.at[at])
      some = pl.ds(tile * QUERIES + half * ROWS, ROWS)
      plgpu.copy_gmem_to_smem(refs.q.at[one, some, head], refs.queries.at[at], refs.asked.at[at])

    def step(j, count):
      slot, there = plan.slot(count), pl.ds(plan.first(refs.index, head, tile, j), plan.keys)
      plgpu.barrier_wait(refs.key_free.at[slot])
      plgpu.copy_gmem_to_smem(refs.k.at[one, there, shared], refs.key.at[slot], refs.key_full.at[slot])
      plgpu.barrier_wait(refs.value_free.at[slot])
      plgpu.copy_gmem_to_smem(refs.v.at[one, there, shared], refs.value.at[slot], refs.value_full.at[slot])
      return count + 1

    return lax.fori_loop(jnp.int32(0), n, step, count)

  loop(tile)


def _compute(plan: _Plan, refs: Any, loop: Any) -> None:
  wg = refs.wg
  hopper.start((refs.key_free, refs.value_free), plan.slots)
  for ahead in range(AHEAD):
    plgpu.barrier_arrive(refs.answered.at[ahead, wg])
  pl.when(wg == 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))
  answer = functools.partial(_answer, plan, refs, loop)
  if refs.sums is None:
    pl.run_scoped(answer, plgpu.ACC((ROWS, plan.d), jnp.float32))
  else:
    answer(refs.sums.at[wg])
  pl.when(wg == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))
  plgpu.wait_smem_to_gmem(0)


def _answer(plan: _Plan, refs: Any, loop: Any, acc: Any) -> None:
  """All tiles, with `acc` for the sums of weighted values. A step's weights wait for the next step's keys."""
  acc[...] = _zeros(plan.d)  # which it is; but without this, ptxas orders everything otherwise than what was measured

  def tile(named, carry):
    count, before, total, p = carry
    i, n, plain = named
    at = plan.buffer(i), refs.wg
    plgpu.barrier_wait(refs.asked.at[at])
    step = functools.partial(_step, plan, refs, acc, i)
    carry = step(jnp.int32(0), (count, _row(_NOTHING), total, p), masked=plan.causal, before=before)
    carry = lax.fori_loop(jnp.int32(1), plain, step, carry)
    if plan.causal:
      carry = lax.fori_loop(lax.max(plain, jnp.int32(1)), n, functools.partial(step, masked=True), carry)
    count, _, total, p = carry
    plgpu.barrier_arrive(refs.answered.at[at])
    return count, i, total, p

  nothing = plgpu.layout_cast(jnp.zeros((ROWS, plan.keys), refs.q.dtype), plgpu.Layout.WGMMA)
  count, before, total, p = loop(tile, (jnp.int32(0), jnp.int32(0), _row(0.0), nothing))
  last = plan.slot(count + plan.slots - 1)
  plgpu.barrier_wait(refs.value_full.at[last])
  _weigh(refs, acc, p, last)
  _finish(plan, refs, acc, before, total)


def _step(plan: _Plan, refs: Any, acc: Any, i: Array, j: Array, carry: tuple[Array, ...], masked: bool = False,
          before: Array | None = None) -> tuple[Array, ...]:
  """Weights of step j of the i-th tile, and the sum with the values of the step before.

  The first step of a tile so ends the tile `before`.
  """
  count, largest, total, p = carry
  wg, slot, last = refs.wg, plan.slot(count), plan.slot(count + plan.slots - 1)
  mask = None
  if masked:
    _, head, tile = plan.place(i)
    mask = _seen(tile * QUERIES + wg * ROWS, plan.first(refs.index, head, tile, j), plan.keys)

  def products(score):
    plgpu.barrier_wait(refs.key_full.at[slot])
    plgpu.barrier_wait(refs.turn.at[wg])
    plgpu.wgmma(score, refs.queries.at[plan.buffer(i), wg], hopper.transposed(refs.key.at[slot]))
    there = lambda: plgpu.barrier_wait(refs.value_full.at[last])
    there() if before is None else pl.when(count > 0)(there)  # the first step of all adds zeros times what is there
    _weigh(refs, acc, p, last)
    plgpu.barrier_arrive(refs.turn.at[1 - wg])
    return plgpu.wgmma_accumulator_load(score, wait_n=1)

  score = pl.run_scoped(products, plgpu.ACC((ROWS, plan.keys), jnp.float32))
  plgpu.barrier_arrive(refs.key_free.at[slot])
  so_far = total if before is None else jnp.zeros_like(total)
  p, less, largest, so_far = _softmax(score, mask, largest, so_far, plan.scale)
  plgpu.wgmma_wait(0)
  if before is None:
    plgpu.barrier_arrive(refs.value_free.at[last])
    acc[...] = acc[...] * _columns(less, plan.d)
  else:
    @pl.when(count > 0)
    def _():
      plgpu.barrier_arrive(refs.value_free.at[last])
      _finish(plan, refs, acc, before, total)
    acc[...] = _zeros(plan.d)
  return count + 1, largest, so_far, p.astype(refs.q.dtype)


def _finish(plan: _Plan, refs: Any, acc: Any, i: Array, total: Array) -> None:
  """Write the i-th tile."""
  one, head, tile = plan.place(i)
  y = acc[...] * _columns(1.0 / jnp.maximum(total, 1e-30), plan.d)
  if plan.steps is None:
    y = jnp.where(refs.trips[head, tile] > 0, y, 0.0)
  hopper.store(y.astype(refs.q.dtype), refs.staging.at[refs.wg], lambda row, col: refs.out.at[
      one, pl.ds(tile * QUERIES + refs.wg * ROWS + row, ROWS), head, pl.ds(col, 64)])


# The parts of a step.


def _row(value: float) -> Array:
  """One number for each query."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _columns(row: Array, n: int) -> Array:
  return lax.broadcast_in_dim(row, (ROWS, n), [0])


def _zeros(d: int) -> Array:
  return plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), plgpu.Layout.WGMMA)


def _weigh(refs: Any, acc: Any, p: Array, slot: Array) -> None:
  """Add `p` times the values in this slot to `acc`."""
  if refs.weights is None:
    return plgpu.wgmma(acc, p, refs.value.at[slot])
  weights = refs.weights.at[refs.wg]
  weights[...] = p

  def product(more):
    plgpu.wgmma(more, weights, refs.value.at[slot])
    return more[...]

  acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def _seen(query: Array, key: Array, keys: int) -> Array:
  """Which of these keys each of 64 queries may see, given the first of both."""
  iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), axis, layout=plgpu.Layout.WGMMA)
  return iota(0) + query >= iota(1) + key


def _softmax(score: Array, mask: Array | None, largest: Array, total: Array,
             scale: float) -> tuple[Array, Array, Array, Array]:
  """The weights of a step, by what those before shrink, the largest score so far in log2 and the sum of weights."""
  if mask is not None:
    score = jnp.where(mask, score, -jnp.inf)
  unit = scale * math.log2(math.e)  # powers of two are what the hardware has
  new = jnp.maximum(largest, score.max(axis=1) * unit)
  less = jnp.exp2(largest - new)
  p = jnp.exp2(score * unit - _columns(new, score.shape[1]))
  return lax.optimization_barrier((p, less, new, total * less + p.sum(axis=1)))
