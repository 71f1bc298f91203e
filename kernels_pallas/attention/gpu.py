"""Block-sparse flash attention on Hopper, forward, through Mosaic GPU.

After FlashAttention-3 (arXiv 2407.08608): two warpgroups have 64 queries each, and a third only copies. The two take
turns: each starts two products together, of queries and a step's keys, and of the last step's weights and values, and
has its softmax while the other multiplies. New is that the tiles of keys are those that an index lists, and that
nothing stops between two tiles of queries: with short lists, starting one costs most.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu
from kernels_pallas.attention.heads import lists
from sparsejax.types import Array

ROWS = 64  # queries of a warpgroup
AHEAD = 2  # tiles of queries in shared memory
QUERIES = gpu.COMPUTE * ROWS
_NOTHING = -1e30  # the largest score so far of a query that saw no key: finite, because inf - inf is NaN


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
              causal: bool, scale: float, interpret: bool = False) -> Array:
  """Attention of `q [batch, Tq, heads, d]` to those blocks of `k`, `v` `[batch, Tk, heads, d]` that `index` lists.

  `index` is `int32[heads, Tq / block_q, R]`: the blocks of keys that a block of queries sees, increasing, of which the
  first `counts`, `int32[heads, Tq / block_q]`, count, or all. If `causal`, query i sees keys 0 to i of these. A query
  that sees no key gives zeros. `k` and `v` may have fewer heads, which neighbouring heads of `q` then share. What it
  gives is like `q`; sums are float32.
  """
  batch, length, heads, d = q.shape
  keys = 128 if block_k % 128 == 0 else 64  # of a step
  parts, tiles, group = block_k // keys, length // QUERIES, heads // k.shape[2]
  work = batch * heads * tiles
  if known := counts is None and not causal:  # how many steps each tile has: nothing to read
    whole = trips = index
  else:
    whole, trips = _steps(*lists(1, index, counts), tiles, block_q, block_k, keys, causal)
  stage = gpu.nbytes((2 * keys, d), q.dtype)
  slots = gpu.slots(stage, (AHEAD + 1) * gpu.nbytes((QUERIES, d), q.dtype), 4)
  blocks = min(gpu.cores(interpret), work)

  def body(index, whole, trips, q, k, v, out, queries, key, value, staging, asked, answered, key_full, key_free,
           value_full, value_free, turn, sums=None, weights=None):
    wg = lax.axis_index('wg')

    def named(i):
      """The i-th tile, how many steps it has, and how many of these need no mask."""
      if known:
        return i, jnp.int32(index.shape[2] * parts), jnp.int32(index.shape[2] * parts)
      _, head, tile = place(i)
      n = lax.max(trips[head, tile], jnp.int32(1))  # there is one, if only to be forgotten
      return i, n, whole[head, tile] if causal else n

    def place(i):
      """Which of the batch, head and tile, longest first if causal."""
      i, tile = lax.div(i, jnp.int32(tiles)), lax.rem(i, jnp.int32(tiles))
      return lax.div(i, jnp.int32(heads)), lax.rem(i, jnp.int32(heads)), tiles - 1 - tile if causal else tile

    def first(head, tile, step):
      """The first key of a step."""
      block = index[head, lax.div(tile * QUERIES, jnp.int32(block_q)), lax.div(step, jnp.int32(parts))]
      return block * block_k + lax.rem(step, jnp.int32(parts)) * keys

    def buffer(i):
      return lax.rem(lax.div(i, jnp.int32(blocks)), jnp.int32(AHEAD))

    loop, at = gpu.share(work, blocks, named), lambda count: lax.rem(count, jnp.int32(slots))

    @pl.when(wg == gpu.COMPUTE)
    def _():
      plgpu.set_max_registers(40, action='decrease')

      def copies(at_tile, count):
        i, n, _ = at_tile
        one, head, tile = place(i)
        shared = lax.div(head, jnp.int32(group))
        for half in range(gpu.COMPUTE):
          plgpu.barrier_wait(answered.at[buffer(i), half])
          some = pl.ds(tile * QUERIES + half * ROWS, ROWS)
          plgpu.copy_gmem_to_smem(q.at[one, some, head], queries.at[buffer(i), half], asked.at[buffer(i), half])

        def step(j, count):
          slot, there = at(count), pl.ds(first(head, tile, j), keys)
          plgpu.barrier_wait(key_free.at[slot])
          plgpu.copy_gmem_to_smem(k.at[one, there, shared], key.at[slot], key_full.at[slot])
          plgpu.barrier_wait(value_free.at[slot])
          plgpu.copy_gmem_to_smem(v.at[one, there, shared], value.at[slot], value_full.at[slot])
          return count + 1

        return lax.fori_loop(jnp.int32(0), n, step, count)

      loop(copies)

    def answer(acc):
      """All tiles, with `acc` for the sums of weighted values. A step's weights wait for the next step's keys."""
      acc[...] = _zeros(d)

      def finish(i, total):
        one, head, tile = place(i)
        y = (acc[...] * _columns(1.0 / jnp.maximum(total, 1e-30), d)).astype(q.dtype)
        gpu.store(y, staging.at[wg], lambda row, col: out.at[
            one, pl.ds(tile * QUERIES + wg * ROWS + row, ROWS), head, pl.ds(col, 64)])

      def each(at_tile, carry):
        count, before, total, p = carry
        i, n, plain = at_tile
        _, head, tile = place(i)
        plgpu.barrier_wait(asked.at[buffer(i), wg])

        def step(j, carry, masked=False, new=False):
          """Weights of step j, and the sum with the values of the step before, which if `new` ends another tile."""
          count, largest, total, p = carry
          slot, last = at(count), at(count + slots - 1)
          mask = _seen(tile * QUERIES + wg * ROWS, first(head, tile, j), keys) if masked else None

          def products(score):
            plgpu.barrier_wait(key_full.at[slot])
            plgpu.barrier_wait(turn.at[wg])
            plgpu.wgmma(score, queries.at[buffer(i), wg], gpu.transposed(key.at[slot]))
            there = lambda: plgpu.barrier_wait(value_full.at[last])
            pl.when(count > 0)(there) if new else there()  # before the first step of all, zeros times what is there
            _weigh(acc, p, value.at[last], None if weights is None else weights.at[wg])
            plgpu.barrier_arrive(turn.at[1 - wg])
            return plgpu.wgmma_accumulator_load(score, wait_n=1)

          score = pl.run_scoped(products, plgpu.ACC((ROWS, keys), jnp.float32))
          plgpu.barrier_arrive(key_free.at[slot])
          p, less, largest, after = _softmax(score, mask, largest, jnp.zeros_like(total) if new else total, scale)
          plgpu.wgmma_wait(0)
          done = lambda: plgpu.barrier_arrive(value_free.at[last])
          if new:
            pl.when(count > 0)(lambda: (done(), finish(before, total))[0])
            acc[...] = _zeros(d)
          else:
            done()
            acc[...] = acc[...] * _columns(less, d)
          return count + 1, largest, after, p.astype(q.dtype)

        carry = step(jnp.int32(0), (count, _row(_NOTHING), total, p), masked=causal, new=True)
        carry = lax.fori_loop(jnp.int32(1), plain, step, carry)
        if causal:
          masked = lambda j, carry: step(j, carry, masked=True)
          carry = lax.fori_loop(lax.max(plain, jnp.int32(1)), n, masked, carry)
        count, _, total, p = carry
        plgpu.barrier_arrive(answered.at[buffer(i), wg])
        if not known:
          total = jnp.where(trips[head, tile] > 0, total, jnp.inf)
        return count, i, total, p

      nothing = plgpu.layout_cast(jnp.zeros((ROWS, keys), q.dtype), plgpu.Layout.WGMMA)
      count, before, total, p = loop(each, (jnp.int32(0), jnp.int32(0), _row(0.0), nothing))
      last = at(count + slots - 1)
      plgpu.barrier_wait(value_full.at[last])
      _weigh(acc, p, value.at[last], None if weights is None else weights.at[wg])
      finish(before, total)

    @pl.when(wg < gpu.COMPUTE)
    def _():
      gpu.start((key_free, value_free), slots)
      for ahead in range(AHEAD):
        plgpu.barrier_arrive(answered.at[ahead, wg])
      pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
      if interpret:
        answer(sums.at[wg])
      else:
        pl.run_scoped(answer, plgpu.ACC((ROWS, d), jnp.float32))
      pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
      plgpu.wait_smem_to_gmem(0)

  pairs = (AHEAD, gpu.COMPUTE)
  scratch = {
      'queries': gpu.shared((*pairs, ROWS, d), q.dtype), 'key': gpu.shared((slots, keys, d), q.dtype),
      'value': gpu.shared((slots, keys, d), q.dtype), 'staging': gpu.shared((gpu.COMPUTE, 2, ROWS, 64), q.dtype),
      'asked': plgpu.Barrier(num_barriers=pairs), 'answered': plgpu.Barrier(num_barriers=pairs),
      **dict(zip(('key_full', 'key_free'), gpu.barriers(slots, 1))),
      **dict(zip(('value_full', 'value_free'), gpu.barriers(slots, 1))),
      'turn': plgpu.Barrier(num_barriers=gpu.COMPUTE)}
  if interpret:
    scratch['sums'] = plgpu.SMEM((gpu.COMPUTE, ROWS, d), jnp.float32)
    scratch['weights'] = plgpu.SMEM((gpu.COMPUTE, ROWS, keys), q.dtype)
  return gpu.kernel(body, jax.ShapeDtypeStruct(q.shape, q.dtype), (index, whole, trips, q, k, v), blocks=blocks,
                    scratch=scratch, lanes=True, approximate=True, interpret=interpret)


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
            causal: bool, scale: float) -> str | None:
  """Why attention to these blocks cannot run on Hopper, with the remedy."""
  del counts, index, scale
  if why := gpu.refused_dtype(q.dtype):
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


def _steps(index: Array, counts: Array, tiles: int, block_q: int, block_k: int, keys: int,
           causal: bool) -> tuple[Array, Array]:
  """How many steps of each tile of queries, the first ones, need no mask, and how many there are: `[heads, tiles]`."""
  parts, repeats = block_k // keys, block_q // QUERIES
  trips = jnp.repeat(counts * parts, repeats, axis=1).astype(jnp.int32)
  if not causal:
    return trips, trips
  starts = index[..., None] * block_k + lax.broadcasted_iota(jnp.int32, (*index.shape, parts), 3) * keys
  starts = jnp.repeat(starts.reshape(*index.shape[:2], -1), repeats, axis=1)
  listed = lax.broadcasted_iota(jnp.int32, starts.shape, 2) < trips[..., None]
  begin = lax.broadcasted_iota(jnp.int32, (*trips.shape, 1), 1) * QUERIES
  count = lambda which: jnp.sum(listed & which, -1, dtype=jnp.int32)
  return count(starts + keys - 1 <= begin), count(starts < begin + QUERIES)


# One warpgroup's share of a step.


def _row(value: float) -> Array:
  """One number for each query."""
  return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _columns(row: Array, n: int) -> Array:
  return lax.broadcast_in_dim(row, (ROWS, n), [0])


def _zeros(d: int) -> Array:
  return plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), plgpu.Layout.WGMMA)


def _weigh(acc: Any, p: Array, values: Any, through: Any) -> None:
  """Add `p` times `values` to `acc`; `through` shared memory in interpret mode, which has no wgmma of registers."""
  if through is None:
    return plgpu.wgmma(acc, p, values)
  through[...] = p

  def product(more):
    plgpu.wgmma(more, through, values)
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
