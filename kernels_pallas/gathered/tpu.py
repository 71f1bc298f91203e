"""Computes attention to listed tokens on TPUs: copies listed tokens to VMEM, some at a time, while others are weighed.

A tile of a cache `[T, kv_heads, d]` holds all heads of a token, and a copy takes whole tiles. Lists that several heads
share therefore read the least; a list for each head reads `kv_heads` times the rows that it needs. Every list weighs
all heads of its tokens, elementwise in the layout of the tiles, and the heads that are not its own are dropped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.gathered import reference
from sparsejax.types import Array

_TOGETHER = 16  # tokens that are copied, and weighed, at a time
_NOTHING = -1e30  # largest score of a query that has seen no token: finite, because inf - inf is NaN


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array, *, scale: float,
              interpret: Any = False) -> Array:
  """Returns the attention of `q [B, H, d]` to the tokens of `k` and `v [B, T, Hkv, d]` that `index` lists, `[B, H, d]`.

  `index` is `int32[B, L, R]`, a list for each H / L neighbouring heads. The first `counts`, `int32[B, L]`, tokens of a
  list are used. A number out of range stands for the first or the last token. Sums are float32.
  """
  heads, own = _heads(q.shape[1], k.shape[2], index.shape[1])
  queries = jnp.where(own[None, ..., None], q[:, heads], jnp.zeros((), q.dtype))
  listed = mosaic_tpu.filled(jnp.clip(index, 0, k.shape[1] - 1), 2, _TOGETHER)
  y = _call(queries, k, v, listed, jnp.clip(counts, 0, index.shape[2]), scale, interpret)
  return y.reshape(q.shape[0], -1, v.shape[3])[:, _places(heads, own)]


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array) -> str | None:
  """Returns why attention to these tokens cannot run on a TPU, with the remedy, or `None`."""
  if why := mosaic_tpu.refused_dtypes(q, k, v):
    return why
  if q.shape[2] != v.shape[3]:
    return f'heads of k and v have {q.shape[2]} and {v.shape[3]} numbers; pad the shorter with zeros'
  held = 2 * k.dtype.itemsize * _TOGETHER * k.shape[2] * (q.shape[2] + v.shape[3])
  if held + 16 * q.shape[1] * k.shape[2] * q.shape[2] > mosaic_tpu.TILES:
    return f'{_TOGETHER} tokens of {k.shape[2]} heads of {q.shape[2]} do not fit into the memory of a core; shard heads'
  if 4 * (index.size + counts.size) > mosaic_tpu.SCALARS:
    return f'lists of shape {index.shape} do not fit into scalar memory; share lists among heads, or split the batch'
  return None


def _heads(heads: int, shared: int, lists: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the head of q at each place `[L, n, Hkv]` of a kernel's queries, and whether the list of L is its own."""
  groups = max(lists, shared)
  n = heads // groups
  group = np.arange(groups)
  numbers, own = np.zeros((lists, n, shared), np.int32), np.zeros((lists, n, shared), bool)
  place = group * lists // groups, slice(None), reference.kv_heads(groups, shared)
  numbers[place], own[place] = (group[:, None] * n + np.arange(n)), True
  return numbers, own


def _places(heads: np.ndarray, own: np.ndarray) -> np.ndarray:
  """Returns where each head of q stands among the places of `_heads`, flat."""
  places = np.flatnonzero(own)
  return places[np.argsort(heads.reshape(-1)[places])]


def _call(queries: Array, k: Array, v: Array, listed: Array, counts: Array, scale: float, interpret: Any) -> Array:
  """Returns the attention of `queries [B, L, n, Hkv, d]`, of the same shape."""
  batch, lists, n, shared, d = queries.shape
  block = (1, 1, n, shared, d)
  spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(batch, lists),
      in_specs=[pl.BlockSpec(block, lambda b, l, *scalars: (b, l, 0, 0, 0)), *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
      out_specs=pl.BlockSpec(block, lambda b, l, *scalars: (b, l, 0, 0, 0)),
      scratch_shapes=[pltpu.VMEM((2, 2, _TOGETHER, shared, d), k.dtype), pltpu.VMEM((n, shared, d), jnp.float32),
                      *[pltpu.VMEM((n, shared, 1), jnp.float32)] * 2, pltpu.SemaphoreType.DMA((2,))])
  call = pl.pallas_call(
      functools.partial(_kernel, scale=scale), grid_spec=spec, interpret=interpret, name='gathered_attention',
      out_shape=mosaic_tpu.result(queries.shape, queries.dtype, queries, k, v, listed, counts),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')))
  return call(listed, counts, queries, k, v)


def _kernel(listed, counts, q_ref, k_ref, v_ref, y_ref, tile_ref, sum_ref, most_ref, total_ref, arrived, *,
            scale: float):
  example, row = pl.program_id(0), pl.program_id(1)
  count = counts[example, row]
  steps = jax.lax.div(count + (_TOGETHER - 1), jnp.int32(_TOGETHER))
  slot = lambda step: jax.lax.rem(step, 2)

  def copies(step):
    for i in range(_TOGETHER):
      token = listed[example, row, step * _TOGETHER + i]
      for place, ref in enumerate((k_ref, v_ref)):
        to = tile_ref.at[slot(step), place, i]
        yield pltpu.make_async_copy(ref.at[example, token], to, arrived.at[slot(step)])

  def start(step):
    for copy in copies(step):
      copy.start()

  def weigh(step, _):
    pl.when(step + 1 < steps)(lambda: start(step + 1))
    for copy in copies(step):
      copy.wait()
    keys, values = (tile_ref[slot(step), place].astype(jnp.float32) for place in range(2))
    token = step * _TOGETHER + jax.lax.broadcasted_iota(jnp.int32, (_TOGETHER, 1, 1), 0)
    for i in range(q_ref.shape[2]):
      score = jnp.sum(keys * q_ref[0, 0, i].astype(jnp.float32)[None], -1, keepdims=True) * scale
      score = jnp.where(token < count, score, _NOTHING)
      most = jnp.maximum(most_ref[i], jnp.max(score, 0))
      less, weight = jnp.exp(most_ref[i] - most), jnp.where(token < count, jnp.exp(score - most[None]), 0.0)
      most_ref[i], total_ref[i] = most, total_ref[i] * less + jnp.sum(weight, 0)
      weighed = jnp.where(token < count, weight * values, 0.0)
      sum_ref[i] = sum_ref[i] * less + jnp.sum(weighed, 0)

  sum_ref[...], total_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(total_ref)
  most_ref[...] = jnp.full_like(most_ref, _NOTHING)
  pl.when(steps > 0)(lambda: start(jnp.int32(0)))
  jax.lax.fori_loop(0, steps, weigh, None)
  y_ref[0, 0] = (sum_ref[...] / jnp.maximum(total_ref[...], 1e-30)).astype(y_ref.dtype)
