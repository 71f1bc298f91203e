"""Computes block-sparse attention in plain `jnp`, for XLA on any platform: only the listed blocks are computed.

A loop over blocks of queries, of all heads, takes the blocks of keys that the index lists. The gradient computes the
weights again and adds to the gradients of the listed blocks in place. Neither direction makes an array of Tq x Tk.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from sparsejax.attention.edits import ScoreEdit, edited, weighed
from sparsejax.types import Array


def attention(q: Array, k: Array, v: Array, index: Array, counts: Array, *, block_q: int, block_k: int, causal: bool,
              scale: float, length: int, edits: Sequence[ScoreEdit] = ()) -> Array:
  """Returns the attention of `q [heads, Tq, d]` to the blocks of `k` and `v` that `index` lists: `[heads, Tq, d]`.

  `k` and `v` are `[kv_heads, Tk, d]`; `kv_heads` divides `heads`, and neighbouring heads of `q` share a head of `k`.
  `index` is `int32[heads, Tq / block_q, R]`, and the first `counts`, `int32[heads, Tq / block_q]`, blocks of a list are
  used. The blocks divide the lengths. Keys from `length` on are padding. The arrays of `edits` are
  `[batch, h, Tq, Tk]`, and any of the lengths may be 1. `q` has the heads of one example after the other.
  """
  keys, values = _blocks(k, block_k, len(q)), _blocks(v, block_k, len(q))

  def block(args):
    i, queries, listed, count = args
    here = [edit._replace(array=_edit_at(edit.array, i, listed, block_q, block_k)) for edit in edits]
    weights = _weights(queries, _at(keys, listed), i, listed, count, block_k, causal, scale, length, here)
    return jnp.einsum('hqk,hkd->hqd', weights.astype(v.dtype), _at(values, listed),
                      preferred_element_type=jnp.float32).astype(q.dtype)

  block = jax.checkpoint(block) if edits else block  # Their derivatives are JAX's own, and keep no weights.
  outputs = jax.lax.map(block, _steps(q, index, counts, block_q))
  return outputs.transpose(1, 0, 2, 3).reshape(*q.shape[:2], v.shape[2])


def gradients(dy: Array, q: Array, k: Array, v: Array, index: Array, counts: Array, *, block_q: int, block_k: int,
              causal: bool, scale: float, length: int) -> tuple[Array, Array, Array]:
  """Returns the gradients of `q`, `k` and `v`, in their dtypes, for the cotangent `dy` of the result."""
  keys, values = _blocks(k, block_k, len(q)), _blocks(v, block_k, len(q))

  def block(carry, args):
    (dk, dv), (i, queries, listed, count, dy) = carry, args
    taken, summed = _at(keys, listed), dict(preferred_element_type=jnp.float32)
    weights = _weights(queries, taken, i, listed, count, block_k, causal, scale, length)
    dweights = jnp.einsum('hqd,hkd->hqk', dy, _at(values, listed), **summed)
    dscores = weights * (dweights - jnp.sum(weights * dweights, -1, keepdims=True)) * scale
    dq = jnp.einsum('hqk,hkd->hqd', dscores.astype(k.dtype), taken, **summed)
    add = lambda total, a, b: _added(total, listed, jnp.einsum('hqk,hqd->hkd', a.astype(b.dtype), b, **summed))
    return (add(dk, dscores, queries), add(dv, weights, dy)), dq

  dk, dv, *_ = dispatch.varying_alike(*(jnp.zeros(a.shape, jnp.float32) for a in (keys, values)), dy)
  (dk, dv), dq = jax.lax.scan(block, (dk, dv), (*_steps(q, index, counts, block_q), _split(dy, block_q)))
  shared = lambda total, like: total.reshape(len(like), -1, *like.shape[1:]).sum(1).astype(like.dtype)
  return dq.transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype), shared(dk, k), shared(dv, v)


def _steps(q: Array, index: Array, counts: Array, block_q: int) -> tuple[Array, ...]:
  """Returns, for each block of queries, its number, the queries of all heads, their lists, and the lists' lengths."""
  return jnp.arange(index.shape[1]), _split(q, block_q), index.transpose(1, 0, 2), counts.T


def _split(a: Array, block: int) -> Array:
  """Returns `a [heads, T, d]` in blocks of tokens, `[T / block, heads, block, d]`."""
  return a.reshape(a.shape[0], -1, block, a.shape[2]).transpose(1, 0, 2, 3)


def _blocks(a: Array, block: int, heads: int) -> Array:
  """Returns `a [kv_heads, Tk, d]` in blocks of keys, `[heads, Tk / block, block, d]`, repeated for heads that share."""
  return jnp.repeat(a.reshape(a.shape[0], -1, block, a.shape[2]), heads // a.shape[0], 0)


def _at(blocks: Array, listed: Array) -> Array:
  """Returns the listed blocks of each head, one after the other: `[heads, R block, d]`."""
  taken = jnp.take_along_axis(blocks, listed[:, :, None, None], 1, mode='clip')
  return taken.reshape(len(blocks), -1, blocks.shape[3])


def _added(total: Array, listed: Array, more: Array) -> Array:
  """Returns `total [heads, Tk / block, block, d]` plus `more`, `[heads, R block, d]`, at the listed blocks."""
  heads = jnp.arange(len(total))[:, None]
  return total.at[heads, listed].add(more.reshape(*listed.shape, *total.shape[2:]), mode='drop')


def _weights(queries: Array, keys: Array, i: Array, listed: Array, count: Array, block_k: int, causal: bool,
             scale: float, length: int, edits: Sequence[ScoreEdit] = ()) -> Array:
  """Returns the attention weights of each query of block `i`, `float32[heads, block_q, R block_k]`.

  With `edits`, a query whose listed keys are all hidden sees its own key, if that key is listed.
  """
  scores = jnp.einsum('hqd,hkd->hqk', queries, keys, preferred_element_type=jnp.float32) * scale
  key = (listed[:, :, None] * block_k + jnp.arange(block_k)[None, None]).reshape(len(listed), 1, -1)
  seen = jnp.repeat(jnp.arange(listed.shape[1])[None] < count[:, None], block_k, 1)[:, None] & (key < length)
  query = (i * queries.shape[1] + jnp.arange(queries.shape[1]))[None, :, None]
  if causal:
    seen = seen & (key <= query)
  if not edits:
    return softmax(scores, seen)
  scores, left = edited(scores, seen, edits)
  return weighed(softmax(scores, own_key(left, seen, key == jnp.minimum(query, length - 1))), edits)


def own_key(left: Array, seen: Array, own: Array) -> Array:
  """Returns the keys of `left`, and a query's own key where `left` has none for the query."""
  return left | (~jnp.any(left, -1, keepdims=True) & seen & own)


def _edit_at(array: Array | None, i: Array, listed: Array, block_q: int, block_k: int) -> Array | None:
  """Returns the part of an edit's array for block `i` of queries and the listed blocks: `[heads, bq, R block_k]`.

  Lengths of 1 along queries or keys stay.
  """
  if array is None:
    return None
  batch, heads, tq, tk = array.shape
  rows = array if tq == 1 else jax.lax.dynamic_slice_in_dim(array, i * block_q, block_q, 2)
  rows = jnp.broadcast_to(rows, (batch, len(listed) // batch if batch > 1 else heads, *rows.shape[2:]))
  rows = rows.reshape(-1, *rows.shape[2:])  # of each head of each example, of each head, or of all
  head = jnp.arange(len(listed)) % len(rows)
  if tk == 1:
    return rows[head]
  blocks = rows.reshape(len(rows), rows.shape[1], -1, block_k)
  taken = blocks.at[head[:, None], :, listed].get(mode='clip')
  return taken.swapaxes(1, 2).reshape(len(listed), rows.shape[1], -1)


def softmax(scores: Array, seen: Array) -> Array:
  """Returns the softmax over the last axis of the scores where `seen` is `True`, and zeros elsewhere.

  A row without a `True` is zero.
  """
  largest = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True, initial=-jnp.inf, where=seen))
  weights = jnp.exp(jnp.where(seen, scores - jnp.where(largest == -jnp.inf, 0, largest), -jnp.inf))
  total = jnp.sum(weights, -1, keepdims=True)
  return weights / jnp.where(total == 0, 1, total)
