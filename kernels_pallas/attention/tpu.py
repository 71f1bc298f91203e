"""Block-sparse attention on TPUs through JAX's own splash attention, to which an index of blocks is a `MaskInfo`.

Splash visits, for each block of queries, the blocks of keys that a list in scalar memory names. Its builders make that
list of a dense mask, known at trace time. Here it is the index itself, so it may be traced, no mask is made, and the
grid is as wide as the longest list. The causal mask is computed inside of the kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kernels_pallas import mosaic_tpu
from kernels_pallas.attention import heads
from sparsejax.types import Array

_COMPUTED = 512  # keys at a time, at most


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
              causal: bool, scale: float, interpret: Any = False) -> Array:
  """Attention of `q [batch, Tq, heads, d]` to those blocks of `k`, `v` `[batch, Tk, heads, d]` that `index` lists.

  `index` is `int32[heads, Tq / block_q, R]`: the blocks of keys that a block of queries sees, increasing, of which the
  first `counts`, `int32[heads, Tq / block_q]`, count, or all. If `causal`, query i sees keys 0 to i of these. A query
  that sees no key gives zeros. `k` and `v` may have fewer heads, which neighbouring heads of `q` then share. What it
  gives is like `q`. Differentiable in q, k and v, by splash's own kernels.
  """
  fixed = dict(block_sizes=_sizes(block_q, block_k), is_mqa=False, save_residuals=False, attn_logits_soft_cap=None,
               mask_value=splash.DEFAULT_MASK_VALUE, residual_checkpoint_name=None,
               mask_function=_causal if causal else None, interpret=interpret)

  def some(args):
    q, k, v, index, counts = args
    keys, queries = _infos(index, counts, k.shape[1] // block_k, block_q, block_k, causal)
    return splash.SplashAttentionKernel(keys, keys, queries, **fixed)(q, k, v)

  def of_heads(q, k, v, index, counts):
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    parts = q.shape[0] // _together(q.shape[0] // k.shape[0], k.shape[1], index, block_k)
    if parts == 1:
      y = some((scaled, k, v, index, counts))
    else:
      split = lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:])
      y = jax.lax.map(some, tuple(map(split, (scaled, k, v, index, counts)))).reshape(*q.shape[:2], v.shape[2])
    return jnp.where(_sees(index, counts, block_q, block_k, causal)[..., None], y, jnp.zeros((), y.dtype))

  return heads.first(of_heads)(q, k, v, index, counts)


def refusal(q: Array, k: Array, v: Array, index: Array, counts: Array | None = None, *, block_q: int, block_k: int,
            causal: bool, scale: float) -> str | None:
  """Why attention to these blocks cannot run on a TPU, with the remedy."""
  if why := mosaic_tpu.refused_dtypes(q, k, v):
    return why
  if len(dtypes := {str(a.dtype) for a in (q, k, v)}) > 1:
    return f'q, k and v must have one dtype, not {" and ".join(sorted(dtypes))}; cast them to one'
  if block_q % mosaic_tpu.LANES or block_k % mosaic_tpu.LANES:
    return f'TPUs take blocks of multiples of {mosaic_tpu.LANES}, not {block_q} and {block_k}; list larger blocks'
  if q.shape[1] % block_q or k.shape[1] % block_k:
    return (f'{q.shape[1]} queries and {k.shape[1]} keys do not divide into blocks of {block_q} and {block_k}; fill up '
            'with zeros')
  if q.shape[2] % k.shape[2]:
    return f'{q.shape[2]} heads of q cannot share {k.shape[2]} of k evenly; repeat those of k and v'
  if any(jax.typeof(a).manual_axis_type.varying for a in (q, k, v)):
    return 'splash attention does not say over which axes of a mesh it varies; use shard_map with check_vma=False'
  if _tiles(q, v, block_q, block_k) > mosaic_tpu.TILES:
    return f'blocks of {block_q} and {block_k} do not fit into the memory of a TPU core; list blocks of 512 or smaller'
  if _together(q.shape[2] // k.shape[2], k.shape[1], index, block_k) == 0:
    return (f'an index of shape {index.shape} does not fit into scalar memory, not even for one head of k; list blocks '
            f'larger than {block_q} and {block_k}')
  return None


def _infos(index: Array, counts: Array, key_blocks: int, block_q: int, block_k: int,
           causal: bool) -> tuple[MaskInfo, MaskInfo]:
  """The blocks of keys of each block of queries, and the other way round.

  A step that has nothing to do names the block of the step before it, which is there already.
  """
  heads, query_blocks, _ = index.shape
  head, row, slot = (jax.lax.broadcasted_iota(jnp.int32, index.shape, axis) for axis in range(3))
  index = jnp.clip(index, 0, key_blocks - 1)
  seen = slot < counts[..., None]
  if causal:
    seen &= index * block_k < (row + 1) * block_q
  last = jnp.maximum(jnp.sum(seen, -1, keepdims=True, dtype=jnp.int32) - 1, 0)
  sequence = jnp.arange(query_blocks * block_q, dtype=jnp.int32) if causal else None
  named = jnp.take_along_axis(index, jnp.minimum(slot, last), -1, mode='promise_in_bounds')
  met = jnp.zeros((heads, query_blocks, key_blocks), bool).at[head, row, index].max(seen)
  latest = jax.lax.cummax(jnp.where(met, jax.lax.broadcasted_iota(jnp.int32, met.shape, 1), 0), axis=1)
  return _info(named, seen, key_blocks, sequence), _info(latest, met, query_blocks, sequence)


def _info(block: Array, visited: Array, n_blocks: int, sequence: Array | None) -> MaskInfo:
  """`block` is visited where `visited`, as a whole (2), but for what the mask function says."""
  return MaskInfo(data_next=block.astype(_integer(n_blocks)), mask_next=None, partial_mask_blocks=None,
                  block_mask=jnp.where(visited, 2, 0).astype(jnp.int8), q_sequence=sequence)


def _sees(index: Array, counts: Array, block_q: int, block_k: int, causal: bool) -> Array:
  """Whether each query sees a key: `[heads, Tq]`."""
  some = counts > 0
  if not causal:
    return jnp.repeat(some, block_q, 1)
  first = jnp.repeat(jnp.where(some, index[..., 0] * block_k, jnp.iinfo(jnp.int32).max), block_q, 1)
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
  """The bytes of VMEM of a step: logits, their exponentials and mask, sums, and q, k, v and y twice."""
  size, lengths = q.dtype.itemsize, q.shape[3] + v.shape[3]
  return block_q * (12 * block_k + 4 * (2 * mosaic_tpu.LANES + v.shape[3])) + 2 * size * lengths * (block_q + block_k)


def _together(least: int, keys: int, index: Array, block_k: int) -> int:
  """How many heads, with all that share theirs of k, `least` each, have their lists in scalar memory at a time."""
  n, query_blocks, width = index.shape
  key_blocks = keys // block_k
  each = query_blocks * max(width * (1 + _integer(key_blocks).itemsize),
                            key_blocks * (1 + _integer(query_blocks).itemsize))
  fitting = [some for some in range(least, n + 1, least) if n % some == 0 and some * each <= mosaic_tpu.SCALARS]
  return max(fitting, default=0)


def _integer(n: int) -> np.dtype:
  """The shortest integers up to n."""
  return np.min_scalar_type(-n - 1)
