"""Computes block-sparse attention on TPUs through JAX's own splash attention, which takes an index as a `MaskInfo`.

For each block of queries, splash attention visits the blocks of keys that a list in scalar memory names. The builders
of splash attention make the list from a dense mask that is known at trace time. This module passes the index itself as
the list. The index may therefore be traced, no mask is made, and the grid is as wide as the longest list. The causal
mask, and segments, are computed in the kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kernels_pallas import mosaic_tpu
from kernels_pallas.attention import heads
from kernels_pallas.attention.segments import with_own_values
from sparsejax.types import Array

_COMPUTED = 512  # keys that are computed at a time, at most


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
              causal: bool, scale: float, segments: tuple[Array, Array] | None = None, interpret: Any = False) -> Array:
  """Returns the attention of `q [batch, Tq, heads, d]` to the blocks of `k` and `v` that `index` lists, shaped like
  `q`.

  `k` and `v` are `[batch, Tk, kv_heads, d]`; neighbouring heads of `q` share a head of `k`. `index` is
  `int32[heads, Tq / block_q, R]`: the blocks of keys that a block of queries sees, in increasing order. The first
  `counts`, `int32[heads, Tq / block_q]`, blocks of a list are used, or all. If `causal`, query i sees only listed keys
  from 0 to i. The result of a query that sees no key is zero. The result is differentiable in q, k and v, by the
  kernels of splash attention.

  `segments`, `int32[batch, Tq]` and `int32[batch, Tk]`: a query sees the keys of its own number alone. If none of its
  listed keys has this number, the query sees its own key, if that key is listed. Examples run one after the other.
  """
  fixed = dict(block_sizes=_sizes(block_q, block_k), is_mqa=False, save_residuals=False, attn_logits_soft_cap=None,
               mask_value=splash.DEFAULT_MASK_VALUE, residual_checkpoint_name=None,
               mask_function=_causal if causal else None, interpret=interpret)

  def part(args, ids=None):
    q, k, v, index, counts = args
    keys, queries = _infos(index, counts, k.shape[1] // block_k, block_q, block_k, causal)
    return splash.SplashAttentionKernel(keys, keys, queries, **fixed)(q, k, v, ids)

  def of_heads(q, k, v, index, counts, ids=None):
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    parts = q.shape[0] // _together(q.shape[0] // k.shape[0], k.shape[1], index, block_k)
    if parts == 1:
      y = part((scaled, k, v, index, counts), ids)
    else:
      split = lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:])
      y = jax.lax.map(functools.partial(part, ids=ids), tuple(map(split, (scaled, k, v, index, counts))))
      y = y.reshape(*q.shape[:2], v.shape[2])
    if ids is None:
      return jnp.where(_sees(index, counts, block_q, block_k, causal)[..., None], y, jnp.zeros((), y.dtype))
    return with_own_values(y, v, index, counts, ids.q, ids.kv, block_q=block_q, block_k=block_k, causal=causal)

  if segments is None:
    return heads.first(of_heads)(q, k, v, index, counts)

  def of_example(args):
    run = heads.first(functools.partial(of_heads, ids=splash.SegmentIds(*args[3:])))
    return run(*(a[None] for a in args[:3]), index, counts)[0]

  return jax.lax.map(of_example, (q, k, v, *segments))


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
            causal: bool, scale: float, segmented: bool = False) -> str | None:
  """Returns why attention to these blocks cannot run on a TPU, with the remedy, or `None`."""
  if why := mosaic_tpu.refused_dtypes(q, k, v):
    return why
  if len(dtypes := {str(a.dtype) for a in (q, k, v)}) > 1:
    return f'q, k and v must have one dtype, not {" and ".join(sorted(dtypes))}; cast them to one'
  if block_q % mosaic_tpu.LANES or block_k % mosaic_tpu.LANES:
    return f'TPUs take blocks of multiples of {mosaic_tpu.LANES}, not {block_q} and {block_k}; list larger blocks'
  if q.shape[1] % block_q or k.shape[1] % block_k:
    return (f'{q.shape[1]} queries and {k.shape[1]} keys do not divide into blocks of {block_q} and {block_k}; pad '
            'with zeros')
  if q.shape[2] % k.shape[2]:
    return f'{q.shape[2]} heads of q cannot share {k.shape[2]} heads of k evenly; repeat the heads of k and v'
  if any(jax.typeof(a).manual_axis_type.varying for a in (q, k, v)):
    return 'splash attention does not say over which axes of a mesh it varies; use shard_map with check_vma=False'
  ids = 8 * (mosaic_tpu.LANES * block_q + mosaic_tpu.SUBLANES * block_k) * segmented  # 32-bit numbers, twice
  if _tiles(q, v, block_q, block_k) + ids > mosaic_tpu.TILES:
    return f'blocks of {block_q} and {block_k} do not fit into the memory of a TPU core; list blocks of 512 or smaller'
  if _together(q.shape[2] // k.shape[2], k.shape[1], index, block_k) == 0:
    return (f'an index of shape {index.shape} does not fit into scalar memory, not even for one head of k; list blocks '
            f'larger than {block_q} and {block_k}')
  return None


def _infos(index: Array, counts: Array, key_blocks: int, block_q: int, block_k: int,
           causal: bool) -> tuple[MaskInfo, MaskInfo]:
  """Returns the blocks of keys that each block of queries sees, and the blocks of queries that see each block of keys.

  A step without work names the block of the step before, which is in memory already.
  """
  heads, query_blocks, _ = index.shape
  head, row, slot = (jax.lax.broadcasted_iota(jnp.int32, index.shape, axis) for axis in range(3))
  index = jnp.clip(index, 0, key_blocks - 1)
  seen = slot < counts[..., None]
  if causal:
    seen &= index * block_k < (row + 1) * block_q
  last = jnp.maximum(jnp.sum(seen, -1, keepdims=True, dtype=jnp.int32) - 1, 0)
  sequence = jnp.arange(query_blocks * block_q, dtype=jnp.int32) if causal else None
  block = jnp.take_along_axis(index, jnp.minimum(slot, last), -1, mode='promise_in_bounds')
  met = jnp.zeros((heads, query_blocks, key_blocks), bool).at[head, row, index].max(seen)
  latest = jax.lax.cummax(jnp.where(met, jax.lax.broadcasted_iota(jnp.int32, met.shape, 1), 0), axis=1)
  return _info(block, seen, key_blocks, sequence), _info(latest, met, query_blocks, sequence)


def _info(block: Array, visited: Array, n_blocks: int, sequence: Array | None) -> MaskInfo:
  """Returns the `MaskInfo` that visits `block` where `visited` is `True`.

  A visited block is marked as whole (2); the mask function can still hide keys.
  """
  return MaskInfo(data_next=block.astype(_integer(n_blocks)), mask_next=None, partial_mask_blocks=None,
                  block_mask=jnp.where(visited, 2, 0).astype(jnp.int8), q_sequence=sequence)


def _sees(index: Array, counts: Array, block_q: int, block_k: int, causal: bool) -> Array:
  """Returns whether each query sees a key, `bool[heads, Tq]`."""
  listed = counts > 0
  if not causal:
    return jnp.repeat(listed, block_q, 1)
  first = jnp.repeat(jnp.where(listed, index[..., 0] * block_k, jnp.iinfo(jnp.int32).max), block_q, 1)
  return first <= jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)


def _causal(query: Array, key: Array) -> Array:
  return query >= key


def _sizes(block_q: int, block_k: int) -> splash.BlockSizes:
  computed = _computed(block_k)
  return splash.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=computed, block_q_dkv=block_q,
                           block_kv_dkv=block_k, block_kv_dkv_compute=computed, block_q_dq=block_q, block_kv_dq=block_k)


def _computed(block_k: int) -> int:
  return max(n for n in range(mosaic_tpu.LANES, _COMPUTED + 1, mosaic_tpu.LANES) if block_k % n == 0)


def _tiles(q: Array, v: Array, block_q: int, block_k: int) -> int:
  """Returns the bytes of VMEM of a step: logits, their exponentials and mask, sums, and q, k, v and y twice."""
  size, lengths = q.dtype.itemsize, q.shape[3] + v.shape[3]
  return block_q * (12 * block_k + 4 * (2 * mosaic_tpu.LANES + v.shape[3])) + 2 * size * lengths * (block_q + block_k)


def _together(least: int, keys: int, index: Array, block_k: int) -> int:
  """Returns how many heads have their lists in scalar memory at a time, or 0 if `least` heads do not fit.

  The number is a multiple of `least`, the heads of q that share a head of k, and divides the number of heads.
  """
  n, query_blocks, width = index.shape
  key_blocks = keys // block_k
  each = query_blocks * max(width * (1 + _integer(key_blocks).itemsize),
                            key_blocks * (1 + _integer(query_blocks).itemsize))
  fitting = [count for count in range(least, n + 1, least) if n % count == 0 and count * each <= mosaic_tpu.SCALARS]
  return max(fitting, default=0)


def _integer(n: int) -> np.dtype:
  """Returns the shortest integer dtype that holds numbers up to n."""
  return np.min_scalar_type(-n - 1)
