"""Computes attention to listed tokens on Hopper, through Mosaic GPU.

A single query meets each token, so tensor cores would not help: the kernel is as fast as the rows of listed tokens
arrive. A warpgroup copies rows (TMA) into a ring, and two warpgroups weigh 64 tokens each. A list is cut into parts, so
that few heads still occupy all multiprocessors. Each of the 64 rows of a warpgroup is a softmax of its own, over every
64th token. The kernel writes the sums of each row, their largest score and the total of their weights, and XLA merges
the rows.
"""

import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from sparsejax.types import Array

ROWS = 64  # tokens of a warpgroup
TOKENS = hopper.COMPUTE * ROWS  # tokens of a step
_NOTHING = -1e30  # largest score of a row that has seen no token: finite, because inf - inf is NaN
_EXTRA = 64  # columns beside the sums: the first half holds the largest score, the second half the total


class GatheredPlan(NamedTuple):
  """A `GatheredPlan` holds the sizes of the kernel for gathered attention, and says what the number of a part means."""

  heads: int
  group: int  # heads of q that share a head of k and v
  share: int  # heads of q that share a list
  steps: int  # steps of a whole list
  parts: int  # parts of a list
  d: int
  slots: int
  blocks: int

  @property
  def work(self) -> int:
    return self.heads * self.parts

  def place(self, i: Array) -> tuple[Array, Array, Array]:
    """Returns the example and the head of the i-th part, and the first step of the part."""
    flat, part = lax.div(i, jnp.int32(self.parts)), lax.rem(i, jnp.int32(self.parts))
    return flat, part, part * self.each

  @property
  def each(self) -> int:
    """The steps of a part."""
    return -(-self.steps // self.parts)


def make_plan(q: Array, k: Array, index: Array, interpret: bool) -> GatheredPlan:
  """Returns the plan for attention of `q` to the tokens that `index` lists."""
  work, steps, blocks = q.shape[0] * q.shape[1], -(-index.shape[2] // TOKENS), hopper.cores(interpret)
  parts = min(steps, max(1, blocks // work))
  stage = hopper.nbytes((2 * TOKENS, q.shape[2]), q.dtype)
  slots = hopper.slots(stage, hopper.nbytes((2 * TOKENS, 64), np.float32), 4)
  return GatheredPlan(work, q.shape[1] // k.shape[2], q.shape[1] // index.shape[1], steps, parts, q.shape[2], slots,
                      min(blocks, work * parts))


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array, *, scale: float,
              interpret: bool = False) -> Array:
  """Returns the attention of `q [B, H, d]` to the tokens of `k` and `v [B, T, Hkv, d]` that `index` lists, `[B, H, d]`.

  `index` is `int32[B, L, R]`, a list for each H / L neighbouring heads. The first `counts`, `int32[B, L]`, tokens of a
  list are used. A number out of range stands for the first or the last token. Sums are float32.
  """
  plan = make_plan(q, k, index, interpret)
  listed = jnp.pad(jnp.clip(index, 0, k.shape[1] - 1), ((0, 0), (0, 0), (0, plan.each * plan.parts * TOKENS -
                                                                         index.shape[2])))
  heads, lists = q.shape[1], index.shape[1]
  counts = jnp.clip(counts, 0, index.shape[2])

  def body(listed, counts, q, k, v, out, **shared):
    refs = types.SimpleNamespace(**shared, listed=listed, counts=counts, q=q, k=k, v=v, out=out)

    def described(i):
      """Returns i, the example, the head, the list, the first step of the part, and how many steps the part has."""
      flat, _, first = plan.place(i)
      example, head = lax.div(flat, jnp.int32(heads)), lax.rem(flat, jnp.int32(heads))
      row = lax.div(head, jnp.int32(heads // lists))
      needed = lax.div(counts[example, row] + (TOKENS - 1), jnp.int32(TOKENS))
      return i, example, head, row, first, lax.clamp(jnp.int32(0), needed - first, jnp.int32(plan.each))

    loop = hopper.share(plan.work, plan.blocks, described)
    pl.when(lax.axis_index('wg') == hopper.COMPUTE)(lambda: _copy(plan, refs, loop))
    pl.when(lax.axis_index('wg') < hopper.COMPUTE)(lambda: _compute(plan, refs, loop, scale, interpret))

  shape = jax.ShapeDtypeStruct((plan.work, hopper.COMPUTE, ROWS, plan.d + _EXTRA), jnp.float32)
  out = hopper.kernel(body, shape, (listed, counts, q, k, v), blocks=plan.blocks, scratch=_scratch(plan, q.dtype),
                      lanes=True, approximate=True, interpret=interpret)
  return _merged(out.reshape(*q.shape[:2], -1, plan.d + _EXTRA), plan.d).astype(q.dtype)


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array) -> str | None:
  """Returns why attention to these tokens cannot run on Hopper, with the remedy, or `None`."""
  del index, counts
  if why := hopper.refused_dtype(q.dtype):
    return why
  if q.shape[2] not in (64, 128) or v.shape[3] != q.shape[2]:
    return f'heads of 64 and 128 fit, not of {k.shape[3]} and {v.shape[3]}; pad with zeros'
  return None


def _scratch(plan: GatheredPlan, dtype: Any) -> dict[str, Any]:
  """Returns the shared memory and the barriers: a ring with the keys and the values of a step in each slot."""
  rows = plgpu.SMEM((plan.slots, hopper.COMPUTE, ROWS, plan.d), dtype)
  return {'key': rows, 'value': rows, 'staging': hopper.shared((hopper.COMPUTE, 1, ROWS, 64), jnp.float32),
          **dict(zip(('full', 'free'), hopper.barriers(plan.slots, 2 * TOKENS)))}


def _copy(plan: GatheredPlan, refs: Any, loop: Any) -> None:
  plgpu.set_max_registers(40, action='decrease')

  def copy_part(described, count):
    _, example, head, row, first, n = described
    shared = lax.div(head, jnp.int32(plan.group))

    def step(j, count):
      slot = lax.rem(count, jnp.int32(plan.slots))
      plgpu.barrier_wait(refs.free.at[slot])

      def token(t, _):
        half, place = lax.div(t, jnp.int32(ROWS)), lax.rem(t, jnp.int32(ROWS))
        number = refs.listed[example, row, (first + j) * TOKENS + t]
        for source, to in ((refs.k, refs.key), (refs.v, refs.value)):
          plgpu.copy_gmem_to_smem(source.at[example, number, shared], to.at[slot, half, place], refs.full.at[slot])

      lax.fori_loop(jnp.int32(0), jnp.int32(TOKENS), token, None)
      return count + 1

    return lax.fori_loop(jnp.int32(0), n, step, count)

  count = loop(copy_part)
  # A thread block must not end before the last arrivals on its barriers.
  lax.fori_loop(0, plan.slots, lambda i, _: plgpu.barrier_wait(refs.free.at[lax.rem(count + i, jnp.int32(plan.slots))]),
                None)


def _compute(plan: GatheredPlan, refs: Any, loop: Any, scale: float, interpret: bool) -> None:
  wg = lax.axis_index('wg')
  # Interpret mode has no loads into a layout.
  read = lambda ref, layout: (ref[...] if interpret else hopper.load(ref, layout, optimized=False)).astype(jnp.float32)
  hopper.start((refs.free,), plan.slots)
  unit = scale * math.log2(math.e)  # The hardware computes powers of two.
  columns = lambda row, n=plan.d: lax.broadcast_in_dim(row, (ROWS, n), [0])

  def weigh_part(described, count):
    i, example, head, row, first, n = described
    query = read(refs.q.at[example, head], plgpu.Layout.WGMMA.reduce(0))
    query = lax.broadcast_in_dim(query, (ROWS, plan.d), [1])
    seen = refs.counts[example, row] - wg * ROWS

    def step(j, carry):
      count, most, total, sums = carry
      slot = lax.rem(count, jnp.int32(plan.slots))
      plgpu.barrier_wait(refs.full.at[slot])
      keys, values = (read(ref.at[slot, wg], plgpu.Layout.WGMMA) for ref in (refs.key, refs.value))
      plgpu.barrier_arrive(refs.free.at[slot])
      token = plgpu.broadcasted_iota(jnp.int32, (ROWS, plan.d), 0, layout=plgpu.Layout.WGMMA)
      listed = token + (first + j) * TOKENS < seen
      score = (keys * query).sum(axis=1) * unit
      score = jnp.where(listed, columns(score), _NOTHING).max(axis=1)
      new = jnp.maximum(most, score)
      less, weight = jnp.exp2(most - new), jnp.exp2(score - new)
      sums = sums * columns(less) + jnp.where(listed, columns(weight) * values, 0.0)
      return count + 1, new, total * less + weight, sums

    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    sums = plgpu.layout_cast(jnp.zeros((ROWS, plan.d), jnp.float32), plgpu.Layout.WGMMA)
    count, most, total, sums = lax.fori_loop(jnp.int32(0), n, step, (count, zero + _NOTHING, zero, sums))
    target = lambda r, c: refs.out.at[i, wg, pl.ds(r, ROWS), pl.ds(c, 64)]
    hopper.store(sums, refs.staging.at[wg], target)
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, _EXTRA), 1, layout=plgpu.Layout.WGMMA)
    extra = jnp.where(column < _EXTRA // 2, columns(most, _EXTRA), columns(total, _EXTRA))
    hopper.store(extra, refs.staging.at[wg], lambda r, c: target(r, plan.d + c))
    return count

  loop(weigh_part)
  plgpu.wait_smem_to_gmem(0)


def _merged(rows: Array, d: int) -> Array:
  """Returns the attention `[B, H, d]` of `rows [B, H, N, d + _EXTRA]`, each a softmax over some of the tokens."""
  sums, most, total = rows[..., :d], rows[..., d], rows[..., d + _EXTRA // 2]
  # A row without tokens has weights of 1, since its scores are all the same: its share is none.
  total = jnp.where(most > _NOTHING / 2, total, 0)
  share = jnp.where(total > 0, jnp.exp2(most - jnp.max(most, -1, keepdims=True)), 0)
  weights = jnp.sum(share * total, -1)
  return jnp.einsum('bhn,bhnd->bhd', share, sums) / jnp.where(weights == 0, 1, weights)[..., None]
