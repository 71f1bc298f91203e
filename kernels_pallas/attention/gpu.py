"""Block-sparse flash attention on Hopper, forward, through Mosaic GPU.

As FlashAttention-3 (arXiv 2407.08608) and JAX's own `attention_mgpu`, which this is after: two warpgroups have 64
queries each and take turns, so that one multiplies while the other has its softmax; a third only copies. New is that
the tiles of keys are those that an index lists, and that blocks of the grid persist: with short lists, starting one
costs most.
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
  slots = gpu.slots(stage, 2 * gpu.nbytes((QUERIES, d), q.dtype), 4)
  blocks = min(gpu.cores(interpret), work)

  def body(index, whole, trips, q, k, v, out, queries, key, value, staging, asked, answered, key_full, key_free,
           value_full, value_free, turn, weights=None):
    wg = lax.axis_index('wg')

    def named(i):
      """Which of the batch, head, tile (longest first, if causal), steps, and how many of these need no mask."""
      tile, i = lax.rem(i, jnp.int32(tiles)), lax.div(i, jnp.int32(tiles))
      one, head, tile = lax.div(i, jnp.int32(heads)), lax.rem(i, jnp.int32(heads)), tiles - 1 - tile if causal else tile
      n = jnp.int32(index.shape[2] * parts) if known else trips[head, tile]
      return one, head, tile, n, whole[head, tile] if causal else n

    loop = gpu.share(work, blocks, named)

    def first(head, tile, step):
      """The first key of a step."""
      block = index[head, lax.div(tile * QUERIES, jnp.int32(block_q)), lax.div(step, jnp.int32(parts))]
      return block * block_k + lax.rem(step, jnp.int32(parts)) * keys

    at = lambda count: lax.rem(count, jnp.int32(slots))

    @pl.when(wg == gpu.COMPUTE)
    def _():
      plgpu.set_max_registers(40, action='decrease')

      @loop
      def _(at_tile, count):
        one, head, tile, n, _ = at_tile
        shared = lax.div(head, jnp.int32(group))

        def step(i, count):
          slot, there = at(count), pl.ds(first(head, tile, i), keys)
          plgpu.barrier_wait(key_free.at[slot])
          plgpu.copy_gmem_to_smem(k.at[one, there, shared], key.at[slot], key_full.at[slot])

          @pl.when(i == 0)
          def _():
            for half in range(gpu.COMPUTE):  # the second ends its tile only once the first has begun the next
              plgpu.barrier_wait(answered.at[half])
              some = pl.ds(tile * QUERIES + half * ROWS, ROWS)
              plgpu.copy_gmem_to_smem(q.at[one, some, head], queries.at[half], asked.at[half])

          plgpu.barrier_wait(value_free.at[slot])
          plgpu.copy_gmem_to_smem(v.at[one, there, shared], value.at[slot], value_full.at[slot])
          return count + 1

        return lax.fori_loop(jnp.int32(0), n, step, count)

    @pl.when(wg < gpu.COMPUTE)
    def _():
      gpu.start((key_free, value_free), slots)
      plgpu.barrier_arrive(answered.at[wg])
      pl.when(wg == 1)(lambda: _take_turns(turn))

      @loop
      def _(at_tile, count):
        one, head, tile, n, plain = at_tile
        pl.when(n > 0)(lambda: plgpu.barrier_wait(asked.at[wg]))
        begin = tile * QUERIES + wg * ROWS

        def step(i, carry, masked=False):
          count, state = carry
          slot = at(count)
          mask = _seen(begin, first(head, tile, i), keys) if masked else None
          score = _score(queries.at[wg], key.at[slot], key_full.at[slot], key_free.at[slot], turn)
          pl.when(i == n - 1)(lambda: plgpu.barrier_arrive(answered.at[wg]))
          p, state = _softmax(score, mask, state, scale)
          plgpu.barrier_arrive(turn)
          plgpu.barrier_wait(value_full.at[slot])
          plgpu.barrier_wait(turn)
          acc = _weighted(state[0], p.astype(q.dtype), value.at[slot], None if weights is None else weights.at[wg])
          plgpu.barrier_arrive(value_free.at[slot])
          return count + 1, (acc, *state[1:])

        carry = lax.fori_loop(jnp.int32(0), plain, step, (count, _nothing(d)))
        if causal:
          masked = lambda i, carry: step(i, carry, masked=True)
          carry = lax.fori_loop(plain, n, masked, carry)
        count, (acc, _, total) = carry
        inverse = 1.0 / jnp.maximum(total, 1e-30)
        y = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(q.dtype)
        gpu.store(y, staging.at[wg], lambda row, col: out.at[
            one, pl.ds(begin + row, ROWS), head, pl.ds(col, 64)])
        return count

      pl.when(wg == 0)(lambda: _take_turns(turn))
      plgpu.wait_smem_to_gmem(0)

  scratch = {
      'queries': gpu.shared((gpu.COMPUTE, ROWS, d), q.dtype), 'key': gpu.shared((slots, keys, d), q.dtype),
      'value': gpu.shared((slots, keys, d), q.dtype), 'staging': gpu.shared((gpu.COMPUTE, 2, ROWS, 64), q.dtype),
      'asked': plgpu.Barrier(num_barriers=gpu.COMPUTE), 'answered': plgpu.Barrier(num_barriers=gpu.COMPUTE),
      **dict(zip(('key_full', 'key_free'), gpu.barriers(slots, 1))),
      **dict(zip(('value_full', 'value_free'), gpu.barriers(slots, 1))),
      'turn': plgpu.Barrier(num_arrivals=gpu.COMPUTE)}
  if interpret:
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


def _take_turns(turn: Any) -> None:
  plgpu.barrier_arrive(turn)
  plgpu.barrier_wait(turn)


def _nothing(d: int) -> tuple[Array, Array, Array]:
  """The sum of values, the largest score in log2 and the sum of weights of 64 queries that saw no key yet."""
  row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
  return plgpu.layout_cast(jnp.zeros((ROWS, d), jnp.float32), plgpu.Layout.WGMMA), row(_NOTHING), row(0.0)


def _score(queries: Any, keys: Any, full: Any, free: Any, turn: Any) -> Array:
  plgpu.barrier_wait(full)

  def product(acc):
    plgpu.wgmma(acc, queries, gpu.transposed(keys))
    _take_turns(turn)
    return acc[...]

  score = pl.run_scoped(product, plgpu.ACC((ROWS, keys.shape[0]), jnp.float32))
  plgpu.barrier_arrive(free)
  return score


def _weighted(acc: Array, p: Array, values: Any, through: Any) -> Array:
  """`acc` plus `p` times `values`; `through` shared memory in interpret mode, which has no wgmma of registers."""
  if through is None:
    return pl.run_state(lambda acc: plgpu.wgmma(acc, p, values))(plgpu.ACC.init(acc))
  through[...] = p

  def product(more):
    plgpu.wgmma(more, through, values)
    return more[...]

  return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def _seen(query: Array, key: Array, keys: int) -> Array:
  """Which of these keys each of 64 queries may see, given the first of both."""
  iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), axis, layout=plgpu.Layout.WGMMA)
  return iota(0) + query >= iota(1) + key


def _softmax(score: Array, mask: Array | None, state: tuple[Array, ...], scale: float) -> tuple[Array, Any]:
  """The weights of a step, relative to the largest score so far, and the state behind it but for their values."""
  acc, largest, total = state
  rows = lambda a, shape: lax.broadcast_in_dim(a, shape, [0])
  if mask is not None:
    score = jnp.where(mask, score, -jnp.inf)
  unit = scale * math.log2(math.e)  # powers of two are what the hardware has
  new = jnp.maximum(largest, score.max(axis=1) * unit)
  less = jnp.exp2(largest - new)
  p = jnp.exp2(score * unit - rows(new, score.shape))
  acc, total = acc * rows(less, acc.shape), total * less + p.sum(axis=1)
  acc, total, new, p = lax.optimization_barrier((acc, total, new, p))
  return p, (acc, new, total)
