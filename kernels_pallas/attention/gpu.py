"""Computes block-sparse flash attention on Hopper, forward, through Mosaic GPU.

The kernel follows FlashAttention-3 (arXiv 2407.08608): two warpgroups have 64 queries each, and a third warpgroup only
copies. The two warpgroups take turns. A warpgroup starts two products together: of its queries and the keys of a step,
and of the weights and the values of the step before. Each warpgroup computes its softmax while the other multiplies.

Two things are new. An index lists the tiles of keys. Nothing stops between two tiles of queries, because with short
lists the start of a tile costs most.
"""

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
from kernels_pallas.attention.gpu_parts import NOTHING, broadcast, numbers, read, row, same, seen, zeros
from kernels_pallas.attention.gpu_plan import AHEAD, QUERIES, ROWS, AttentionPlan, make_plan, steps
from kernels_pallas.attention.heads import lists
from kernels_pallas.attention.segments import batched
from sparsejax.types import Array


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
              causal: bool, scale: float, segments: tuple[Array, Array] | None = None, interpret: bool = False
              ) -> Array:
  """Returns the attention of `q [batch, Tq, heads, d]` to the blocks of `k` and `v` that `index` lists, shaped like
  `q`.

  `k` and `v` are `[batch, Tk, kv_heads, d]`; neighbouring heads of `q` share a head of `k`. `index` is
  `int32[heads, Tq / block_q, R]`: the blocks of keys that a block of queries sees, in increasing order. The first
  `counts`, `int32[heads, Tq / block_q]`, blocks of a list are used, or all. If `causal`, query i sees only listed keys
  from 0 to i. The result of a query that sees no key is zero. Sums are float32.

  `segments`, `int32[batch, Tq]` and `int32[batch, Tk]`: a query sees the keys of its own number alone. If none of its
  listed keys has this number, the query sees its own key, if that key is listed.
  """
  ids = () if segments is None else segments
  plan = make_plan(q, k, index, counts, block_q, block_k, causal, scale, interpret, bool(ids))
  given = lists(1, index, counts)
  if plan.steps is not None:
    unmasked = trips = index  # The kernel does not read them.
  else:
    unmasked, trips = steps(plan, *given)

  def body(index, unmasked, trips, q, k, v, *rest, **shared):
    *ids, out = rest
    refs = types.SimpleNamespace(**{'sums': None, 'weights': None, **shared}, index=index, trips=trips, q=q, k=k, v=v,
                                 numbers=ids, out=out, wg=lax.axis_index('wg'))

    def described(i):
      """Returns i, the number of steps of the i-th tile, and the number of steps that need no mask."""
      if plan.steps is not None:
        return i, jnp.int32(plan.steps), jnp.int32(plan.steps)
      _, head, tile = plan.place(i)
      n = lax.max(trips[head, tile], jnp.int32(1))  # A tile without keys has one step, whose result is dropped.
      return i, n, unmasked[head, tile] if causal else n

    loop = hopper.share(plan.work, plan.blocks, described)
    pl.when(refs.wg == hopper.COMPUTE)(lambda: _copy(plan, refs, loop))
    pl.when(refs.wg < hopper.COMPUTE)(lambda: _compute(plan, refs, loop))

  operands = (index, unmasked, trips, q, k, v, *ids)
  y = hopper.kernel(body, jax.ShapeDtypeStruct(q.shape, q.dtype), operands, blocks=plan.blocks,
                    scratch=_scratch(plan, q.dtype, bool(ids), interpret), lanes=True, approximate=True,
                    interpret=interpret)
  return batched(y, v, *given, *ids, block_q=block_q, block_k=block_k, causal=causal) if ids else y


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
            causal: bool, scale: float, segmented: bool = False) -> str | None:
  """Returns why attention to these blocks cannot run on Hopper, with the remedy, or `None`."""
  del counts, index, scale, segmented
  if why := hopper.refused_dtype(q.dtype):
    return why
  if len(dtypes := {str(a.dtype) for a in (q, k, v)}) > 1:
    return f'q, k and v must have one dtype, not {" and ".join(sorted(dtypes))}; cast them to one'
  if q.shape[3] not in (64, 128) or not q.shape[3] == k.shape[3] == v.shape[3]:
    return f'heads of 64 and 128 fit, not of {q.shape[3]}, {k.shape[3]} and {v.shape[3]}; pad with zeros'
  if block_q % QUERIES or block_k % 64:
    return (f'blocks of queries must be multiples of {QUERIES} and of keys multiples of 64, not {block_q} and '
            f'{block_k}; list other blocks')
  if q.shape[1] % block_q or k.shape[1] % block_k:
    return (f'{q.shape[1]} queries and {k.shape[1]} keys do not divide into blocks of {block_q} and {block_k}; pad '
            'with zeros')
  if q.shape[2] % k.shape[2]:
    return f'{q.shape[2]} heads of q cannot share {k.shape[2]} heads of k evenly; repeat the heads of k and v'
  if causal and (version := _cuda()) and 12080 <= version < 12091:
    return f'ptxas of CUDA {version // 1000}.{version % 1000 // 10} miscompiles causal masks; take 12.9.1 or later'
  return None


def _cuda() -> int | None:
  """Returns the version of JAX's CUDA runtime, or `None` without one."""
  try:
    from jax._src.lib import cuda_versions
  except ImportError:
    return None
  return cuda_versions.cuda_runtime_get_version() if cuda_versions is not None else None


def _scratch(plan: AttentionPlan, dtype: Any, segmented: bool, interpret: bool) -> dict[str, Any]:
  """Returns the shared memory and the barriers: buffers of queries, a ring of keys, and a ring of values.

  On the barrier `asked` the queries of a buffer arrive, and on `answered` the warpgroup that has read them. If
  `segmented`, the numbers of queries and keys arrive with them.
  """
  keys, d, slots, pairs = plan.keys, plan.d, plan.slots, (AHEAD, hopper.COMPUTE)
  scratch = {
      'queries': hopper.shared((*pairs, ROWS, d), dtype), 'key': hopper.shared((slots, keys, d), dtype),
      'value': hopper.shared((slots, keys, d), dtype), 'staging': hopper.shared((hopper.COMPUTE, 2, ROWS, 64), dtype),
      'asked': plgpu.Barrier(num_arrivals=1 + segmented, num_barriers=pairs),
      'answered': plgpu.Barrier(num_barriers=pairs),
      **dict(zip(('key_full', 'key_free'), hopper.barriers(slots, 1 + segmented))),
      **dict(zip(('value_full', 'value_free'), hopper.barriers(slots, 1))),
      'turn': plgpu.Barrier(num_barriers=hopper.COMPUTE)}
  scratch |= numbers(segmented, of_queries=(*pairs, ROWS), of_keys=(slots, keys))
  if interpret:  # Interpret mode has no accumulators that last, and no wgmma of registers.
    scratch['sums'] = plgpu.SMEM((hopper.COMPUTE, ROWS, d), jnp.float32)
    scratch['weights'] = plgpu.SMEM((hopper.COMPUTE, ROWS, keys), dtype)
  return scratch


# Work of a warpgroup: a single warpgroup copies, and two multiply.


def _copy(plan: AttentionPlan, refs: Any, loop: Any) -> None:
  plgpu.set_max_registers(40, action='decrease')

  def copy_tile(described, count):
    i, n, _ = described
    example, head, tile = plan.place(i)
    shared = lax.div(head, jnp.int32(plan.group))
    for half in range(hopper.COMPUTE):
      buffer = plan.buffer(i), half
      plgpu.barrier_wait(refs.answered.at[buffer])
      queries = pl.ds(tile * QUERIES + half * ROWS, ROWS)
      plgpu.copy_gmem_to_smem(refs.q.at[example, queries, head], refs.queries.at[buffer], refs.asked.at[buffer])
      if refs.numbers:
        plgpu.copy_gmem_to_smem(refs.numbers[0].at[example, queries], refs.of_queries.at[buffer],
                                refs.asked.at[buffer])

    def step(j, count):
      slot, keys = plan.slot(count), pl.ds(plan.first(refs.index, head, tile, j), plan.keys)
      plgpu.barrier_wait(refs.key_free.at[slot])
      plgpu.copy_gmem_to_smem(refs.k.at[example, keys, shared], refs.key.at[slot], refs.key_full.at[slot])
      if refs.numbers:
        plgpu.copy_gmem_to_smem(refs.numbers[1].at[example, keys], refs.of_keys.at[slot], refs.key_full.at[slot])
      plgpu.barrier_wait(refs.value_free.at[slot])
      plgpu.copy_gmem_to_smem(refs.v.at[example, keys, shared], refs.value.at[slot], refs.value_full.at[slot])
      return count + 1

    return lax.fori_loop(jnp.int32(0), n, step, count)

  loop(copy_tile)


def _compute(plan: AttentionPlan, refs: Any, loop: Any) -> None:
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


def _answer(plan: AttentionPlan, refs: Any, loop: Any, acc: Any) -> None:
  """Computes all tiles of a warpgroup, with `acc` for the sums of weighted values.

  The weights of a step are multiplied by their values together with the product of the next step's keys.
  """
  # The accumulator is zero already. Without this line, ptxas orders the instructions differently from what was
  # measured.
  acc[...] = zeros(plan.d)

  def answer_tile(described, carry):
    count, before, total, p = carry
    i, n, plain = described
    buffer = plan.buffer(i), refs.wg
    plgpu.barrier_wait(refs.asked.at[buffer])
    step = functools.partial(_step, plan, refs, acc, i)
    carry = step(jnp.int32(0), (count, row(NOTHING), total, p), masked=plan.causal, before=before)
    carry = lax.fori_loop(jnp.int32(1), plain, step, carry)
    if plan.causal:
      carry = lax.fori_loop(lax.max(plain, jnp.int32(1)), n, functools.partial(step, masked=True), carry)
    count, _, total, p = carry
    plgpu.barrier_arrive(refs.answered.at[buffer])
    return count, i, total, p

  nothing = plgpu.layout_cast(jnp.zeros((ROWS, plan.keys), refs.q.dtype), plgpu.Layout.WGMMA)
  count, before, total, p = loop(answer_tile, (jnp.int32(0), jnp.int32(0), row(0.0), nothing))
  last = plan.slot(count + plan.slots - 1)
  plgpu.barrier_wait(refs.value_full.at[last])
  _weigh(refs, acc, p, last)
  _finish(plan, refs, acc, before, total)


def _step(plan: AttentionPlan, refs: Any, acc: Any, i: Array, j: Array, carry: tuple[Array, ...], masked: bool = False,
          before: Array | None = None) -> tuple[Array, ...]:
  """Computes the weights of step j of the i-th tile, adds the weighted values of the step before, returns the carry.

  The first step of a tile therefore ends the tile `before`. The carry holds the count, each query's largest score and
  sum of weights, and the weights.
  """
  count, largest, total, p = carry
  wg, slot, last = refs.wg, plan.slot(count), plan.slot(count + plan.slots - 1)
  mask = None
  if masked:
    _, head, tile = plan.place(i)
    mask = seen(tile * QUERIES + wg * ROWS, plan.first(refs.index, head, tile, j), plan.keys)

  def products(score):
    plgpu.barrier_wait(refs.key_full.at[slot])
    plgpu.barrier_wait(refs.turn.at[wg])
    plgpu.wgmma(score, refs.queries.at[plan.buffer(i), wg], hopper.transposed(refs.key.at[slot]))
    wait = lambda: plgpu.barrier_wait(refs.value_full.at[last])
    wait() if before is None else pl.when(count > 0)(wait)  # The very first step adds zeros times unread memory.
    _weigh(refs, acc, p, last)
    plgpu.barrier_arrive(refs.turn.at[1 - wg])
    return plgpu.wgmma_accumulator_load(score, wait_n=1)

  score = pl.run_scoped(products, plgpu.ACC((ROWS, plan.keys), jnp.float32))
  if refs.numbers:
    interpret = refs.weights is not None
    own = same(read(refs.of_queries.at[plan.buffer(i), wg], 0, interpret), read(refs.of_keys.at[slot], 1, interpret))
    mask = own if mask is None else mask & own
  plgpu.barrier_arrive(refs.key_free.at[slot])
  partial = total if before is None else jnp.zeros_like(total)
  p, less, largest, partial = _softmax(score, mask, largest, partial, plan.scale)
  plgpu.wgmma_wait(0)
  if before is None:
    plgpu.barrier_arrive(refs.value_free.at[last])
    acc[...] = acc[...] * broadcast(less, 0, (ROWS, plan.d))
  else:
    @pl.when(count > 0)
    def _():
      plgpu.barrier_arrive(refs.value_free.at[last])
      _finish(plan, refs, acc, before, total)
    acc[...] = zeros(plan.d)
  return count + 1, largest, partial, p.astype(refs.q.dtype)


def _finish(plan: AttentionPlan, refs: Any, acc: Any, i: Array, total: Array) -> None:
  """Writes the i-th tile of the result."""
  example, head, tile = plan.place(i)
  y = acc[...] * broadcast(1.0 / jnp.maximum(total, 1e-30), 0, (ROWS, plan.d))
  if plan.steps is None:
    y = jnp.where(refs.trips[head, tile] > 0, y, 0.0)
  hopper.store(y.astype(refs.q.dtype), refs.staging.at[refs.wg], lambda row, col: refs.out.at[
      example, pl.ds(tile * QUERIES + refs.wg * ROWS + row, ROWS), head, pl.ds(col, 64)])


# The parts of a step.


def _weigh(refs: Any, acc: Any, p: Array, slot: Array) -> None:
  """Adds `p` times the values in this slot to `acc`."""
  if refs.weights is None:
    return plgpu.wgmma(acc, p, refs.value.at[slot])
  weights = refs.weights.at[refs.wg]
  weights[...] = p

  def product(more):
    plgpu.wgmma(more, weights, refs.value.at[slot])
    return more[...]

  acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def _softmax(score: Array, mask: Array | None, largest: Array, total: Array,
             scale: float) -> tuple[Array, Array, Array, Array]:
  """Returns the weights of a step, the factor for earlier weights, the new largest score in log2, and the new total.

  `largest` is the largest score of each query over the steps before, in log2, and `total` is the sum of its weights.
  """
  if mask is not None:
    score = jnp.where(mask, score, -jnp.inf)
  unit = scale * math.log2(math.e)  # The hardware computes powers of two.
  new = jnp.maximum(largest, score.max(axis=1) * unit)
  less = jnp.exp2(largest - new)
  p = jnp.exp2(score * unit - broadcast(new, 0, score.shape))
  return lax.optimization_barrier((p, less, new, total * less + p.sum(axis=1)))
